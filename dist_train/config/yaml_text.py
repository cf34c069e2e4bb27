"""YAML in which an unquoted word keeps the text that was typed, whatever YAML takes it for.

To YAML 1.1 `007`, `1e3`, `12:30`, `yes` and `null` are numbers, a boolean and nothing. Whether that was meant is known
only where the type of the key is: `load.py` asks for the text or for the value.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

_MAX_VALUES = 1_000_000
# YAML 1.1 takes 1e-3 for text: its numbers have a point.
_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


@dataclass(frozen=True)
class Plain:
    """What stood without quotes, `text`, and what YAML makes of it, `value`.

    In a file these are words that YAML takes for a number, a boolean or nothing. On the command line it is all that
    follows `key=`; `value` is then an error of YAML where it takes it for nothing at all.
    """

    text: str
    value: Any

    def __str__(self) -> str:
        return self.text


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it; what stands for bytes that are no text cannot be written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_yaml(text: str) -> Any:
    """Mappings, lists, text and `Plain`. The keys of mappings are text.

    Raises:
        yaml.YAMLError: this is not YAML, or it holds what no configuration can hold.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
        _count_values(content)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or holds itself") from None
    return content


def parse_argument(text: str) -> Any:
    """What follows `key=` on the command line: text where all of it is quoted, else `Plain`."""
    text = text.strip()
    try:
        value: Any = parse_yaml(text)
    except yaml.YAMLError as error:
        return Plain(text, error)
    if isinstance(value, str) and text[:1] in ("'", '"'):
        return value
    return Plain(text, value.value if isinstance(value, Plain) else value)


def plain_values(content: Any) -> Any:
    """The same with the values that YAML gives in place of every `Plain`. Raises yaml.YAMLError."""
    if isinstance(content, Plain):
        content = content.value
    if isinstance(content, yaml.YAMLError):
        raise content
    if isinstance(content, dict):
        return {key: plain_values(value) for key, value in content.items()}
    return [plain_values(value) for value in content] if isinstance(content, list) else content


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # it has no types
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        self.flatten_mapping(node)
        return {_key(key): self.construct_object(value, deep=deep) for key, value in node.value}


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "a key must be a word", node.start_mark)
    return str(node.value)


def _plain(loader: _Loader, node: yaml.ScalarNode) -> Any:
    try:
        value = yaml.SafeLoader.yaml_constructors[node.tag](loader, node)
    except ValueError:
        return node.value  # it only looked like one, as 0x_ does
    return Plain(node.value, value) if node.style is None else value


def _text(_loader: _Loader, node: yaml.ScalarNode) -> str:
    return str(node.value)


def _count_values(content: Any, counted: int = 0) -> int:
    """Refuse what is neither a mapping, a list nor a scalar, and what references make larger than any configuration."""
    counted += 1
    if counted > _MAX_VALUES:
        raise yaml.YAMLError("it holds too many values")
    if isinstance(content, (dict, list)):
        for value in (*content, *content.values()) if isinstance(content, dict) else content:
            counted = _count_values(value, counted)
    elif isinstance(content, str) and not is_text(content):
        raise yaml.YAMLError("it holds half of a surrogate pair")
    elif not isinstance(content, (str, Plain, int, float, bool, type(None))):
        raise yaml.YAMLError(f"it holds a value of the type {type(content).__name__}")
    return counted


_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
for _kind in ("null", "bool", "int", "float"):
    _Loader.add_constructor(_TAG + _kind, _plain)
for _kind in ("timestamp", "value", "merge"):
    _Loader.add_constructor(_TAG + _kind, _text)
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
