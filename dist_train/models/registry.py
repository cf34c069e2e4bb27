"""Models by name. A family of models is one function: `build(spec, its block of the configuration) -> nn.Module`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from torch import nn

from dist_train.config import families
from dist_train.config.schema import ModelConfig
from dist_train.data.encoding.spec import FeatureSpec
from dist_train.determinism.keyed_random import seeded
from dist_train.errors import UserError

Build = Callable[[FeatureSpec, Any], nn.Module]
"""Makes a model of a table; its `forward(numeric, flags, codes)` gives (rows, classes) or (rows, members, classes).

The second argument is the family's block of the configuration. Random numbers may be drawn from torch's generator: it
is seeded around the call.
"""
_Decorated = TypeVar("_Decorated", bound=Build)

_BUILDS: dict[str, Build] = {}
# What torch says of a tensor that cannot be, on the CPU.
_NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")


def register_model(name: str, config_block: type[Any] | None = None) -> Callable[[_Decorated], _Decorated]:
    """Decorator that makes a build function the model `name`.

    `config_block` is a frozen dataclass whose fields have defaults: they become the keys `model.<name>.<field>`, and
    an object of it is the second argument of the function. A method `problems()` of it, if there is one, yields
    (field, text) for each value that the types allow and the model does not. Without a block the second argument is
    the ModelConfig.

        @register_model("linear", LinearConfig)
        def build(spec: FeatureSpec, config: LinearConfig) -> nn.Module: ...

    Raises:
        ValueError: the name is not an identifier, or is taken by a key of `model` or by another family's block.
    """
    if config_block is not None:
        families.register_block(name, config_block)

    def register(build: _Decorated) -> _Decorated:
        families.register_name(name)
        _BUILDS[name] = build
        return build

    return register


def build_model(spec: FeatureSpec, model: ModelConfig, *, seed: int) -> nn.Module:
    """The model with initial weights that are a function of the seed, float32 on the CPU.

    Raises:
        UserError: there is no model of that name, or its weights do not fit into the memory.
    """
    build = _build_of(model.name)
    try:
        with seeded("initial weights", seed):
            return build(spec, families.block_of(model))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
            raise UserError(
                f"model {model.name}: its weights do not fit into the memory of this machine: lower its sizes, such as "
                "model.hidden_dim"
            ) from None
        raise


def _build_of(name: str) -> Build:
    if name not in _BUILDS:
        if name in families.BUILT_IN:
            import_module(f"dist_train.models.{name}")
        else:
            families.find(name)
    if name not in _BUILDS:
        raise UserError(f"model.name: {families.unknown(name)}")
    return _BUILDS[name]
