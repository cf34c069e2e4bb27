"""Command line -> typed, frozen configuration. The only place that knows OmegaConf and YAML.

A value flows one way: default of the schema <- YAML files, left to right <- `key=value`, left to right.
All mistakes are collected and reported at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_train.config import families
from dist_train.config.auto import AUTO, KEYS_SET_TO_AUTO, RULE, has_key, with_auto_written_out
from dist_train.config.compatibility import migrated, unknown_keys, with_renamed_keys
from dist_train.config.rules import problems_of
from dist_train.config.schema import JobConfig
from dist_train.errors import UserError

Setting = tuple[str, str, Any]  # (where it was written, dotted key, value)


def load_config(arguments: Sequence[str], base: JobConfig | None = None) -> JobConfig:
    """Configuration from `file.yaml ... key=value ...`, on top of `base` or the defaults.

    Raises:
        UserError: There is a mistake; the message lists all of them.
    """
    given = [("the configuration", with_auto_written_out(asdict(base)), list[str]())] if base else []
    contents = [*given, *_contents(arguments)]
    tree = _tree(content for _, content, _ in contents)
    problems: list[str] = []
    return _resolved(_settings(contents, tree, problems), tree, problems)


def read_config(path: Path) -> JobConfig:
    """The resolved configuration of a run folder, of this version or an older one. Raises UserError."""
    problems: list[str] = []
    content = _read_yaml(path, problems)
    if problems:
        raise UserError(_listing(problems))
    return config_from_tree(content, str(path))


def config_from_tree(content: Mapping[str, Any], source: str) -> JobConfig:
    """A resolved configuration that was saved as nested mappings, by this version or an older one. Raises UserError."""
    content = with_auto_written_out(migrated(content))
    unknown = unknown_keys(content)
    if unknown:
        raise UserError(
            f"{source}: this version of dist_train does not know the key{'s' * (len(unknown) > 1)} "
            f"{', '.join(unknown)}: use the version that wrote it"
        )
    tree = _tree([content])
    return _resolved(_leaves(source, "", content, tree), tree, [])


def _resolved(settings: Iterable[Setting], tree: DictConfig, problems: list[str]) -> JobConfig:
    sources: dict[str, str] = {}
    auto: dict[str, None] = {}
    for source, key, value in settings:
        if value == AUTO and key in RULE:
            auto[key] = None
            continue
        auto.pop(key, None)
        if key == KEYS_SET_TO_AUTO and value:
            problems.append(f"{source}: {key}: is made by the program: write {AUTO} as the value of each key instead")
            continue
        try:
            # Mappings merge, as sections do: `train.class_weights.high=2` leaves the other classes as they are.
            merges = isinstance(value, dict) and isinstance(OmegaConf.select(tree, key), DictConfig)
            OmegaConf.update(tree, key, value, merge=merges)
            sources[key] = source
        except OmegaConfBaseException as error:
            problems.append(f"{source}: {_explain(key, value, error)}")
    config = _freeze(tree, sources, problems)
    if config is not None:
        problems += problems_of(config)
    if problems or config is None:
        raise UserError(_listing(problems))
    return _with_auto(families.without_other_blocks(config), auto)


def _with_auto(config: JobConfig, keys: Iterable[str]) -> JobConfig:
    """Keys of a family that the configuration does not choose are left out."""
    return replace(config, task=replace(config.task, auto=[key for key in sorted(keys) if has_key(config, key)]))


def config_to_yaml(config: JobConfig) -> str:
    """The resolved configuration as YAML; `read_config` gives back the same object."""
    # Not by way of yaml itself: a name like 1e5 is text to it, and stays without quotes, but a number to OmegaConf.
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def _tree(contents: Iterable[Mapping[Any, Any]]) -> DictConfig:
    """The schema with its defaults, and with the blocks of all families of models that the mappings name."""
    return _writable(OmegaConf.structured(families.complete_config(contents)))


def _writable(node: DictConfig) -> DictConfig:
    """Frozen dataclasses become read-only nodes; while values are being merged they must not be."""
    OmegaConf.set_readonly(node, False)
    for name in node:
        child = node._get_node(name)
        if isinstance(child, DictConfig) and is_dataclass(OmegaConf.get_type(child)):
            _writable(child)
    return node


def _contents(arguments: Sequence[str]) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """For each argument where it stands, what it says, and why it cannot be read; lowest precedence first."""
    files = [a for a in arguments if a.endswith((".yaml", ".yml")) and "=" not in a]
    for name in files:
        problems: list[str] = []
        yield name, with_renamed_keys(_read_yaml(Path(name), problems)), problems
    for argument in arguments:
        if argument in files:
            continue
        key, equals, _ = argument.partition("=")
        if not equals or not key:
            yield argument, {}, [f"{argument!r}: an argument is either a file that ends in .yaml or key=value"]
            continue
        try:
            content = OmegaConf.to_container(OmegaConf.from_dotlist([argument]))
        except (OmegaConfBaseException, yaml.YAMLError):
            yield argument, {}, [f"{argument!r}: the value is not valid YAML"]
            continue
        yield "command line", with_renamed_keys(cast(dict[str, Any], content)), []


def _settings(
    contents: Iterable[tuple[str, dict[str, Any], list[str]]], tree: DictConfig, problems: list[str]
) -> Iterator[Setting]:
    """Every assignment in order of precedence, lowest first."""
    for source, content, unreadable in contents:
        problems += unreadable
        yield from _leaves(source, "", content, tree)


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        problems.append(f"{path}: no such file; `dist-train sample DIR` writes examples into DIR")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problems.append(f"{path}: not valid YAML: {where}{getattr(error, 'problem', None) or error}")
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        text = _first_line(error)
        if "Invalid loaded object type" in text:
            text = "a configuration is a mapping of sections"
        problems.append(f"{path}: cannot be read: {text}")
    else:
        if isinstance(content, dict):
            return cast(dict[str, Any], content)
        problems.append(f"{path}: a configuration is a mapping of sections, this is a {type(content).__name__}")
    return {}


def _leaves(source: str, prefix: str, content: Any, node: Any) -> Iterator[Setting]:
    """Cut a nested mapping into single assignments, so that each mistake is found on its own."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        child = node._get_node(name) if isinstance(node, DictConfig) and name in node else None
        is_section = isinstance(child, DictConfig) and OmegaConf.get_type(child) is not dict
        if is_section and isinstance(value, dict):
            yield from _leaves(source, f"{key}.", value, child)
        else:
            yield source, key, value


def _freeze(tree: DictConfig, sources: Mapping[str, str], problems: list[str]) -> JobConfig | None:
    # Only now are references to other keys, `${section.key}`, looked up. One by one: each mistake is found.
    found = len(problems)
    for section in map(str, tree):
        for name in tree[section]:
            key = f"{section}.{name}"
            try:
                OmegaConf.to_container(OmegaConf.create({"value": tree[section][name]}), throw_on_missing=True)
            except OmegaConfBaseException as error:
                problems.append(f"{sources.get(key, 'default')}: {key}: {_first_line(error)}")
    return cast(JobConfig, OmegaConf.to_object(tree)) if len(problems) == found else None


def _explain(key: str, value: Any, error: OmegaConfBaseException) -> str:
    text = _first_line(error)
    if "not in" in text and "Key" in text:
        return f"unknown key {key!r}. {_hint(key, text)}"
    if "is not Optional" in text:
        return f"{key}: must have a value, is empty"
    if "is not a subclass of" in text:
        return f"{key}={value!r}: is a section: set its keys, as in {key}.KEY=value"
    if "is not a ListConfig" in text:
        return f"{key}={value!r}: must be a list, as in {key}=[first,second]"
    return f"{key}={value!r}: {text}"


def _hint(key: str, text: str) -> str:
    if "Did you mean" in text:
        return text[text.index("Did you mean") :]
    default = JobConfig()
    homes = [f"{section.name}.{key}" for section in fields(default) if hasattr(getattr(default, section.name), key)]
    return f"Did you mean: {' or '.join(map(repr, homes))}?" if homes else "docs/configuration.md lists every key"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _listing(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} mistakes in the configuration:\n" + "\n".join(f"  - {p}" for p in problems)
