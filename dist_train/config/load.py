"""Command line -> typed, frozen configuration. The only place that knows OmegaConf.

A value flows one way: default of the schema <- YAML files, left to right <- `key=value`, left to right.
`key+=[...]`, in a file `key+: [...]`, adds to a list. All mistakes are collected and reported at once.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from omegaconf import DictConfig, ListConfig, LiteralNode, OmegaConf, StringNode, UnionNode
from omegaconf.errors import OmegaConfBaseException

from dist_train.config import families
from dist_train.config.auto import AUTO, KEYS_SET_TO_AUTO, RULE, has_key, with_auto_written_out
from dist_train.config.compatibility import migrated, unknown_keys, with_renamed_keys
from dist_train.config.rules import problems_of
from dist_train.config.schema import JobConfig, ModelConfig
from dist_train.config.yaml_text import Plain, is_text, parse_argument, parse_yaml, plain_values
from dist_train.errors import Mistakes, UserError

Setting = tuple[str, str, Any]  # (where it was written, dotted key, value)

_REFUSALS = (OmegaConfBaseException, ValueError, TypeError, ArithmeticError, RecursionError)
"""What OmegaConf raises: not only errors of its own."""
_NOTHING = ("~", "null", "Null", "NULL")
_KEY = re.compile(r"[^\W\d]\w*\.[^/]+", re.DOTALL)


@dataclass(frozen=True)
class _Added:
    """What is added to the list that a key has so far."""

    values: list[Any]


def is_setting(argument: str) -> bool:
    """Whether an argument is `section.key=value`, and not the path of a file or folder with `=` in it."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and _KEY.fullmatch(key) is not None and not os.path.exists(argument)  # noqa: PTH110 (never raises)


def is_too_long(path: str) -> bool:
    """Whether no file system can hold a path: some name in it, or all of it, has too many bytes."""
    return len(os.fsencode(path)) >= 4096 or any(len(os.fsencode(name)) > 255 for name in path.split("/"))


def load_config(arguments: Sequence[str], base: JobConfig | None = None) -> JobConfig:
    """Configuration from `file.yaml ... key=value ...`, on top of `base` or the defaults.

    A `~` in `run.dir` and `data.path` becomes the home folder.

    Raises:
        UserError: There is a mistake; the message lists all of them.
    """
    given = [("the configuration", _literal(with_auto_written_out(asdict(base))), list[str]())] if base else []
    contents = [*given, *_contents(arguments)]
    tree = _tree(content for _, content, _ in contents)
    problems: list[str] = []
    return _with_home_folders(_resolved(_settings(contents, tree, problems), tree, problems))


def read_config(path: Path) -> JobConfig:
    """The resolved configuration of a run folder, of this version or an older one. Raises UserError."""
    problems: list[str] = []
    content = _read_yaml(path, problems)
    if problems:
        raise Mistakes(problems)
    return _saved(content, str(path))


def config_from_tree(content: Mapping[str, Any], source: str) -> JobConfig:
    """A resolved configuration that was saved as nested mappings, by this version or an older one. Raises UserError."""
    return _saved(_literal(content), source)


def _saved(content: Mapping[str, Any], source: str) -> JobConfig:
    content = with_auto_written_out(migrated(content))
    unknown = unknown_keys(content)
    if unknown:
        raise UserError(
            f"{source}: this version of dist_train does not know the key{'s' * (len(unknown) > 1)} "
            f"{', '.join(unknown)}: use the version that wrote it"
        )
    tree, problems = _tree([content]), list[str]()
    return _resolved(_leaves(source, "", content, tree, problems), tree, problems)


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
            if isinstance(value, _Added):
                value = [*cast(list[Any], OmegaConf.to_container(OmegaConf.select(tree, key))), *value.values]
            # Mappings merge, as sections do: `train.class_weights.high=2` leaves the other classes as they are. An
            # empty one empties: nothing else takes a name away that a file has.
            merges = isinstance(value, dict) and bool(value) and isinstance(OmegaConf.select(tree, key), DictConfig)
            OmegaConf.update(tree, key, value, merge=merges)
            sources[key] = source
        except _REFUSALS as error:
            problems.append(f"{source}: {_explain(key, value, error)}")
    config = _freeze(tree, sources, problems)
    if config is not None:
        problems += problems_of(config)
    if problems or config is None:
        raise Mistakes(problems)
    return _with_auto(families.without_other_blocks(config), auto)


def _with_auto(config: JobConfig, keys: Iterable[str]) -> JobConfig:
    """Keys of a family that the configuration does not choose are left out."""
    return replace(config, task=replace(config.task, auto=[key for key in sorted(keys) if has_key(config, key)]))


def config_to_yaml(config: JobConfig) -> str:
    """The resolved configuration as YAML; `read_config` gives back the same object."""
    # Not by way of yaml itself: a name like 1e5 is text to it, and stays without quotes, but a number to OmegaConf.
    return OmegaConf.to_yaml(OmegaConf.create(_literal(asdict(config))))


def _literal(content: Any) -> Any:
    """The same where no text is taken for a reference to another key."""
    if isinstance(content, Mapping):
        return {key: _literal(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_literal(value) for value in content]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", content) if isinstance(content, str) else content


def _with_home_folders(config: JobConfig) -> JobConfig:
    """`~` at the beginning of a path as the home folder: a shell leaves it alone after `=`."""
    found, problems = {"run.dir": config.run.dir, "data.path": config.data.path}, list[str]()
    for key, folder in found.items():
        try:
            found[key] = str(Path(folder).expanduser()) if folder.startswith("~") else folder
        except RuntimeError:
            problems.append(f"{key}={folder}: there is no such home folder; ./{folder} is a folder of that name")
    if is_too_long(config.data.path):
        problems.append(f"data.path: a name of {len(config.data.path)} characters is too long")
    for key, name in (("run.name", config.run.name), ("run.dir", config.run.dir)):
        if is_too_long(name):
            problems.append(f"{key}: a name of {len(name)} characters is too long")
        if any(unicodedata.category(c) == "Cc" for c in name):
            problems.append(f"{key}: {name!r} has control characters: give a folder that a terminal can show")
    if problems:
        raise Mistakes(problems)
    run, data = replace(config.run, dir=found["run.dir"]), replace(config.data, path=found["data.path"])
    return replace(config, run=run, data=data)


def _tree(contents: Iterable[Mapping[Any, Any]]) -> DictConfig:
    """The schema with its defaults, and with the blocks of all families of models that the mappings name."""
    model: Any = type(families.complete_config(map(_for_families, contents)).model)
    return deepcopy(_default_tree(model))


@cache
def _default_tree(model: type[Any]) -> DictConfig:
    return _writable(OmegaConf.structured(JobConfig(model=model())))


def _for_families(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The section `model` as YAML reads it."""
    section = content.get("model")
    if isinstance(section, Plain):
        section = section.value
    if not isinstance(section, dict):
        return {}
    unwrapped = {key: value.value if isinstance(value, Plain) else value for key, value in section.items()}
    return {"model": unwrapped | ({"name": str(section["name"])} if "name" in section else {})}


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
    files = [a for a in arguments if a.endswith((".yaml", ".yml")) and not is_setting(a)]
    for name in files:
        problems: list[str] = []
        yield name, with_renamed_keys(_read_yaml(Path(name).expanduser(), problems)), problems
    for argument in arguments:
        if argument in files:
            continue
        key, equals, value = argument.partition("=")
        if not equals or not key:
            yield argument, {}, [f"{argument!r}: an argument is either a file that ends in .yaml or key=value"]
            continue
        if not argument.isascii() and not is_text(argument):
            yield argument, {}, [f"{argument!r}: is not UTF-8"]
            continue
        content = parse_argument(value)
        for name in reversed(_parts(key)):
            content = {name: content}
        yield "command line", with_renamed_keys(content), []


def _parts(key: str) -> list[str]:
    """A dotted key cut at the sections; what follows belongs to one name, as that of the class 1.5."""
    in_block = key.startswith("model.") and key.split(".")[1].rstrip("+") not in {f.name for f in fields(ModelConfig)}
    return key.split(".", 3 if in_block else 2)


def _settings(
    contents: Iterable[tuple[str, dict[str, Any], list[str]]], tree: DictConfig, problems: list[str]
) -> Iterator[Setting]:
    """Every assignment in order of precedence, lowest first."""
    for source, content, unreadable in contents:
        problems += unreadable
        yield from _leaves(source, "", content, tree, problems)


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path}: no such file; `dist-train sample DIR` writes examples into DIR")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problems.append(f"{path}: not valid YAML: {where}{getattr(error, 'problem', None) or _first_line(error)}")
    except (OSError, ValueError) as error:
        problems.append(f"{path}: cannot be read: {_first_line(error)}")
    else:
        if content is None or (isinstance(content, Plain) and content.value is None):
            return {}
        if isinstance(content, dict):
            return content
        found = "list" if isinstance(content, list) else f"single value, {str(content)!r}"
        problems.append(f"{path}: a configuration is a mapping of sections, this is a {found}")
    return {}


def _leaves(source: str, prefix: str, content: Any, node: Any, problems: list[str]) -> Iterator[Setting]:
    """Cut a nested mapping into single assignments, so that each mistake is found on its own."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        child = node._get_node(name) if name in node else None
        is_section = isinstance(child, DictConfig) and OmegaConf.get_type(child) is not dict
        try:
            if is_section:
                section = value.value if isinstance(value, Plain) else value
                if isinstance(section, dict):
                    yield from _leaves(source, f"{key}.", section, child, problems)
                elif section is None:
                    problems.append(f"{source}: {key}: the section is empty: set one of its keys, or leave it out")
                else:
                    problems.append(f"{source}: {key}={value}: is a section: set its keys, as in {key}.KEY=value")
            elif child is None and name.endswith("+") and name[:-1] in node:
                yield source, key[:-1], _added(key, value, node._get_node(name[:-1]))
            elif child is None and re.search(r"[.\[\]]", name):
                problems.append(f"{source}: unknown key {key!r}. {_hint(key, '')}")
            else:
                yield source, key, _as_declared(value, child)
        except yaml.YAMLError:
            problems.append(f"{f'{key}={value}'!r}: the value is not valid YAML")
        except UserError as error:
            problems.append(f"{source}: {error}")


def _added(key: str, value: Any, node: Any) -> _Added:
    if not isinstance(node, ListConfig):
        raise UserError(f"{key}={value}: only to a list can something be added, and {key[:-1]} is none")
    values = _as_declared(value, node)
    if not isinstance(values, list):
        raise UserError(f"{key}={value}: must be a list, as in {key}=[first,second]")
    return _Added(values)


def _as_declared(value: Any, node: Any) -> Any:
    """A value for a key of the schema: text where the key holds text, else what YAML makes of it."""
    if _holds_text(node):
        return _text(value, optional=node._is_optional())
    if isinstance(node, ListConfig) and node._metadata.element_type is str:
        items = value.value if isinstance(value, Plain) else value
        if isinstance(items, list):
            return [_text(item, optional=False) for item in items]
    return plain_values(value)


def _holds_text(node: Any) -> bool:
    return isinstance(node, (StringNode, LiteralNode)) or (
        isinstance(node, UnionNode) and not {int, float, bool} & {*get_args(node._metadata.ref_type)}
    )


def _text(value: Any, *, optional: bool) -> Any:
    if not isinstance(value, Plain):
        return plain_values(value)
    if not value.text or (optional and value.text in _NOTHING):
        return None
    if isinstance(value.value, yaml.YAMLError) and value.text[0] in "'\"":
        raise value.value  # a quote that is not closed
    return value.text


def _freeze(tree: DictConfig, sources: Mapping[str, str], problems: list[str]) -> JobConfig | None:
    # Only now are references to other keys, `${section.key}`, looked up. One by one: each mistake is found.
    found = len(problems)
    for section in map(str, tree):
        for name in tree[section]:
            key = f"{section}.{name}"
            try:
                value = tree[section][name]
                if isinstance(value, (DictConfig, ListConfig)):
                    OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            except _REFUSALS as error:
                problems.append(f"{sources.get(key, 'default')}: {key}: {_first_line(error)}")
    try:
        return cast(JobConfig, OmegaConf.to_object(tree)) if len(problems) == found else None
    except _REFUSALS as error:  # text in the place of a list, written so that it only looks like a reference
        problems.append(f"{getattr(error, 'full_key', None) or 'the configuration'}: {_first_line(error)}")
        return None


def _explain(key: str, value: Any, error: Exception) -> str:
    text = _first_line(error)
    if "not in" in text and "Key" in text:
        return f"unknown key {key!r}. {_hint(key, text)}"
    if "is not Optional" in text:
        return f"{key}: must have a value, is empty"
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
