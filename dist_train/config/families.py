"""Families of models: their names, and the block of configuration keys that each of them has.

`model.name` chooses a family. The keys of the default family stand in `model` itself, those of another one in
`model.<name>`. A family comes with this package (BUILT_IN), is registered by a program (`register_model`), or belongs
to an installed package that names it as an entry point of the group `dist_train.models`; such a package is imported
when a configuration names its family, and no sooner.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import cache
from typing import Any, ClassVar, Literal

from dist_train.config.bounds import at_least, probability, size
from dist_train.config.schema import JobConfig, ModelConfig
from dist_train.plugins import declared, load_declared

DEFAULT = "financial_classifier"
ENTRY_POINTS = "dist_train.models"


@dataclass(frozen=True, kw_only=True)
class FeatureKeys:
    """How a family represents the columns of a table; a block of keys that is derived from it has them too."""

    numeric_embedding: Literal["none", "piecewise_linear", "periodic"] = "piecewise_linear"
    """What each number becomes (Gorishniy, Rubachev and Babenko 2022): itself, a learned piecewise linear function with `numeric_width` values whose knots are quantiles of the training rows, or `numeric_width` values of learned sines and cosines."""
    numeric_width: int = 8
    """Values that each number becomes."""
    numeric_bins: int = 16
    """Pieces of the piecewise linear functions, at most 32; fewer where quantiles coincide."""
    numeric_bins_by: Literal["quantiles", "target"] = "quantiles"
    """Where the pieces meet: at evenly spaced quantiles, or at splits of a decision tree of the column on the target, fitted to the training rows and kept with the model (docs/training.md). A prepared table has no such splits."""
    numeric_frequencies: int = 16
    """Sines and cosines of each number, for `periodic`."""
    numeric_frequency_scale: float = 0.1
    """Standard deviation of the initial frequencies, for `periodic`."""
    one_hot_categories: int = 16
    """Categorical columns with at most so many codes (categories, missing, unknown) are one-hot, the others are learned embeddings."""
    category_frequencies: bool = False
    """Give the model of each embedded column how frequent its category was in the training rows, as a number."""
    category_widths: dict[str, int] = field(default_factory=dict)
    """Column -> width of its learned embedding, however many codes it has. Columns that are not named here follow a rule: min(64, round(1.6 * codes ** 0.56))."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Key and text of each value that cannot be."""
        for key in ("numeric_width", "numeric_frequencies"):
            yield from size(key, getattr(self, key))
        if not 1 <= self.numeric_bins <= 32:
            yield "numeric_bins", f"must be from 1 to 32, is {self.numeric_bins}"
        if not self.numeric_frequency_scale > 0:
            yield "numeric_frequency_scale", f"must be above 0, is {self.numeric_frequency_scale}"
        yield from at_least("one_hot_categories", self.one_hot_categories, 0)
        for column, width in self.category_widths.items():
            if width < 1:
                yield "category_widths", f"must be at least 1, is {width} for the column {column!r}"


@dataclass(frozen=True, kw_only=True)
class TabMConfig(FeatureKeys):
    """TabM: members that share a multilayer perceptron up to scaling factors (Gorishniy, Kotelnikov and Babenko 2025)."""

    members: int = 16
    """Members, trained side by side; their probabilities are averaged."""
    blocks: int = 2
    """Hidden layers of each member."""
    width: int = 64
    """Units of a hidden layer."""
    dropout: float = 0.1
    """Dropout probability after each hidden layer."""
    adapters: Literal["all", "first", "packed"] = "all"
    """Where members differ: scaling factors at each layer (the authors' `tabm`), at the first one (`tabm-mini`), or everywhere, since nothing is shared (`tabm-packed`)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Key and text of each value that cannot be."""
        yield from super().problems()
        for key in ("members", "blocks", "width"):
            yield from size(key, getattr(self, key))
        yield from probability("dropout", self.dropout)


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(FeatureKeys):
    """ResNet: residual blocks (Gorishniy, Rubachev, Khrulkov and Babenko 2021)."""

    blocks: int = 2
    """Residual blocks, of two Linears each."""
    width: int = 128
    """Units that a block reads and adds to."""
    hidden_ratio: float = 2.0
    """Units between the two Linears of a block, as a multiple of `width`."""
    dropout: float = 0.2
    """Dropout probability between the two Linears of a block."""
    residual_dropout: float = 0.0
    """Dropout probability of what a block adds."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Key and text of each value that cannot be."""
        yield from super().problems()
        for key in ("blocks", "width"):
            yield from size(key, getattr(self, key))
        if not self.width * self.hidden_ratio >= 1:
            yield "hidden_ratio", f"leaves no unit, is {self.hidden_ratio}"
        for key in ("dropout", "residual_dropout"):
            yield from probability(key, getattr(self, key))


@dataclass(frozen=True, kw_only=True)
class RealMLPConfig(FeatureKeys):
    """RealMLP: a multilayer perceptron with scaled inputs and parametric activations (Holzmüller, Grinsztajn and Steinwart 2024). Its weights bear a learning rate ten times that of other families; `configs/realmlp.yaml` has one."""

    blocks: int = 3
    """Hidden layers of the network."""
    width: int = 256
    """Units of a hidden layer."""
    activation: Literal["selu", "mish"] = "selu"
    """Function of a hidden layer, which each unit mixes with the identity by a learned share."""
    dropout: float = 0.15
    """Dropout probability after each hidden layer."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Key and text of each value that cannot be."""
        yield from super().problems()
        for key in ("blocks", "width"):
            yield from size(key, getattr(self, key))
        yield from probability("dropout", self.dropout)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A pretrained Transformer with a classification head, for the task `text` (docs/text.md)."""

    section: ClassVar[str] = "model.transformer"

    pretrained: str = "sentence-transformers/all-MiniLM-L6-v2"
    """The model that training starts from: a folder that transformers has saved, `package:NAME` for one that an installed Python package holds, or a name on the Hugging Face hub. Its weights must be safetensors or GGUF, which is computed in `train.precision`; pickled ones are refused."""
    tokenizer: str | None = None
    """The tokenizer, written as `pretrained` is; null: that of `pretrained`."""
    tuning: Literal["lora", "full", "head"] = "lora"
    """What is trained. `lora`: low-rank adapters (Hu et al. 2021) and the head; `full`: all parameters; `head`: the head alone."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lora_alpha: int = 32
    """An adapter's product is scaled by `lora_alpha` / `lora_rank`."""
    lora_dropout: float = 0.0
    """Dropout probability of an adapter's input."""
    lora_targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the Linear modules that get an adapter, as peft's `target_modules`; `all-linear`: all but the head."""
    modules_to_save: list[str] = field(default_factory=list)
    """Further modules, beside the head, that are trained whole under `lora`."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Key and text of each value that cannot be."""
        if not self.pretrained.strip():
            yield "pretrained", "must name a folder, a package or a model of the Hugging Face hub"
        for key in ("lora_rank", "lora_alpha"):
            yield from size(key, getattr(self, key))
        yield from probability("lora_dropout", self.lora_dropout)
        if not self.lora_targets:
            yield "lora_targets", "must name a module, or all-linear"


@dataclass(frozen=True, kw_only=True)
class CausalConfig(TransformerConfig):
    """A pretrained causal language model that answers with the class of a text, for the task `instruction` (docs/text.md)."""

    section: ClassVar[str] = "model.causal_lm"

    pretrained: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """The model that training starts from, written as that of `model.transformer`."""
    tuning: Literal["lora", "full"] = "lora"
    """What is trained. `lora`: low-rank adapters (Hu et al. 2021); `full`: all parameters."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules that are trained whole under `lora`."""
    system: str | None = None
    """System message of the chat; null: what the tokenizer's chat template has where there is none. A tokenizer without a chat template gets it as a paragraph before the instruction."""
    instruction: str = "Which of these describes the text: {answers}?\n\n{text}"
    """Message of the user: `{text}` is the text, `{answers}` are all answers."""
    answers: dict[str, str] = field(default_factory=dict)
    """Class -> what the model is to answer. A class that is not named here is answered with its name."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Key and text of each value that cannot be."""
        yield from super().problems()
        if self.instruction.count("{text}") != 1:
            yield "instruction", f"must hold {{text}} once, holds it {self.instruction.count('{text}')} times"
        for name, answer in self.answers.items():
            if not answer.strip():
                yield "answers", f"must not be empty, is for the class {name!r}"


BUILT_IN: dict[str, type[Any] | None] = {
    DEFAULT: None,
    "tabm": TabMConfig,
    "resnet": ResNetConfig,
    "realmlp": RealMLPConfig,
}
"""Block of each family of this package, None where the keys of `model` are its own. Its module has the same name."""

OF_TEXT: dict[str, type[Any] | None] = {"transformer": TransformerConfig, "causal_lm": CausalConfig}
"""Block of each family of this package that is a model of texts."""

TASKS_OF_TEXT = {"text": "transformer", "instruction": "causal_lm"}
"""Each task on texts, and the family of its models."""

_registered: dict[str, type[Any] | None] = {}


def register_block(name: str, block: type[Any]) -> None:
    """Make the fields of a frozen dataclass the keys `model.<name>.<field>`.

    Raises:
        ValueError: the name is not an identifier, or is taken; the block is not a dataclass.
    """
    if not is_dataclass(block):
        raise ValueError(f"the block of the model {name!r} must be a dataclass, is {block!r}")
    if not name.isidentifier() or name in {key.name for key in fields(ModelConfig)}:
        raise ValueError(f"{name!r} cannot name a model with a block: it must be an identifier and no key of `model`")
    known = _blocks().get(name, block)
    if known is not block and (known is None or _place(known) != _place(block)):
        raise ValueError(f"there is a model {name!r} with another block")
    register_name(name, block)


def register_name(name: str, block: type[Any] | None = None) -> None:
    """Make a family known that has no block of its own, or has it registered already."""
    if name not in BUILT_IN | OF_TEXT:
        _registered[name] = block or _registered.get(name)


def find(name: str) -> bool:
    """Whether there is such a family; an installed package that has it is imported.

    Raises:
        UserError: the package cannot be imported.
    """
    if name not in _blocks() and name in declared(ENTRY_POINTS):
        load_declared(ENTRY_POINTS, name, "model.name: the model")
        register_name(name)
    return name in _blocks()


def names() -> list[str]:
    """Names of all families."""
    return [*_blocks(), *(name for name in declared(ENTRY_POINTS) if name not in _blocks())]


def unknown(name: str) -> str:
    """What to say of a name that no family has."""
    return f"there is no model {name!r}; there is {', '.join(names())}"


def block_of(model: ModelConfig) -> Any:
    """The block of the chosen family: the `model` section itself where the family has no block."""
    block = _blocks().get(model.name)
    return model if block is None else getattr(model, model.name, None) or block()


def target_bins(model: ModelConfig) -> int | None:
    """Bins of each numeric column that the chosen family wants fitted by the target; None: it wants none."""
    keys = block_of(model)
    if not isinstance(keys, FeatureKeys) or keys.numeric_embedding != "piecewise_linear":
        return None
    return keys.numeric_bins if keys.numeric_bins_by == "target" else None


def complete_config(contents: Iterable[Mapping[Any, Any]]) -> JobConfig:
    """The default configuration with the block of every family that is known, or named in one of these mappings."""
    for content in contents:
        section = content.get("model")
        if isinstance(section, dict):
            blocks = [key for key, value in section.items() if isinstance(value, dict)]
            for name in (section.get("name", DEFAULT), *blocks):
                find(str(name))
    return JobConfig(model=_with_blocks({name: block() for name, block in _blocks().items() if block}))


def without_other_blocks(config: JobConfig) -> JobConfig:
    """The configuration without the blocks of families that it does not choose."""
    model, block = config.model, _blocks().get(config.model.name)
    own = {model.name: getattr(model, model.name)} if block else {}
    values = {key.name: getattr(model, key.name) for key in fields(ModelConfig)}
    return replace(config, model=replace(_with_blocks(own), **values))


def _with_blocks(blocks: Mapping[str, Any]) -> ModelConfig:
    """The default `model` section with blocks as further keys."""
    if not blocks:
        return ModelConfig()
    kind: type[ModelConfig] = _section(tuple((name, type(block)) for name, block in blocks.items()))
    return kind(**blocks)


@cache
def _section(blocks: tuple[tuple[str, type[Any]], ...]) -> type[ModelConfig]:
    keys = [(name, block, field(default_factory=block)) for name, block in blocks]
    section: type[ModelConfig] = make_dataclass(
        "ModelConfig", keys, bases=(ModelConfig,), frozen=True, kw_only=True, namespace={"__reduce__": _reduce}
    )
    return section


def _reduce(section: ModelConfig) -> tuple[Any, ...]:
    """For pickle, which cannot find a class that was made: the values it is made of."""
    values = {key.name: getattr(section, key.name) for key in fields(section)}
    own = {key.name for key in fields(ModelConfig)}
    return _restored, (
        {name: value for name, value in values.items() if name not in own},
        {name: value for name, value in values.items() if name in own},
    )


def _restored(blocks: Mapping[str, Any], values: Mapping[str, Any]) -> ModelConfig:
    return replace(_with_blocks(blocks), **values)


def _blocks() -> dict[str, type[Any] | None]:
    return BUILT_IN | OF_TEXT | _registered


def _place(block: type[Any]) -> tuple[str, str]:
    """Where a class is defined: a module that was imported anew defines the same one again."""
    return block.__module__, block.__qualname__
