"""Classification of texts by a pretrained Transformer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import polars as pl
import torch
from torch import Tensor, nn

from dist_train.config import families
from dist_train.config.compatibility import FORMATS, require_format
from dist_train.config.families import TransformerConfig
from dist_train.config.rules import split_seed
from dist_train.config.run_path import path_of_run
from dist_train.config.schema import JobConfig
from dist_train.data.encoding.unfamiliar import Unfamiliar
from dist_train.data.splits.split import SPLITS
from dist_train.data.tables.table import locate
from dist_train.data.texts import Texts, read_labelled_texts, read_texts, texts_of, texts_sha256
from dist_train.data.tokens import Padding, TokenRows, Tokens
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError
from dist_train.models.text import build_text_classifier, shipped_files
from dist_train.models.text_base import Pretrained, load_tokenizer, locate_pretrained, read_config, tokenizer_sha256
from dist_train.system.console import log
from dist_train.tasks.base import Description, Task
from dist_train.tasks.classification import Classification
from dist_train.tasks.text_baselines import FROZEN, embed, frozen_probabilities, tfidf_probabilities
from dist_train.tasks.text_reader import TextReader
from dist_train.training.metrics import check_metrics
from dist_train.training.protocols import Source
from dist_train.watchdog.processes import host_name

TOKENS = "tokens.npz"
"""The tokenized texts, in the run folder."""

_ROWS_OF_CHUNK = 512


class Data(NamedTuple):
    """What rank 0 made of the files: class indices and index in SPLITS of each row, (rows,)."""

    tokens: Tokens
    targets: Tensor
    splits: Tensor
    class_names: list[str]
    sha256: str
    key: str


class TextTask(Classification):
    """Texts with a class each. `data` are those of the configuration; None: a trained model's task, without any."""

    name: ClassVar[str] = "text"

    def __init__(
        self,
        config: JobConfig,
        collectives: Collectives,
        base: Pretrained,
        identity: Mapping[str, str],
        tokenizer: Any,
        reader: TextReader,
        class_names: Sequence[str],
        data: Data | None = None,
        fingerprint: str = "",
    ) -> None:
        self._collectives = collectives
        self._base = base
        self._identity = dict(identity)
        self._tokenizer = tokenizer
        self._reader = reader
        self._data = data
        self._padding = _padding(config, tokenizer)
        self.fingerprint = data.sha256 if data else fingerprint
        self.splits: Mapping[str, Source] = {name: self._split(data, name) for name in SPLITS} if data else {}
        super().__init__(config, class_names, self.splits, collectives)

    @classmethod
    def load(cls, config: JobConfig, collectives: Collectives, fitted: Description | None = None) -> Self:
        """Find the pretrained model, read the texts, and tokenize them unless the run folder has the tokens already.

        Raises:
            UserError: the files, the pretrained model or the configuration for them have a mistake.
            Stopped: the ranks have agreed to stop.
        """
        check_metrics(config.evaluation.metrics)
        base, tokenizer, identity = _pretrained(config, collectives, fitted)
        class_names = list(fitted["class_names"]) if fitted else None
        reader_of = partial(cls._reader_of, config, tokenizer, fitted)
        with collectives.heartbeat.phase("reading the data"):
            data = collectives.on_rank_zero(lambda: _read(config, reader_of, identity, class_names))
        collectives.raise_if_stop_agreed()
        reader = reader_of(data.class_names)
        return cls(config, collectives, base, identity, tokenizer, reader, data.class_names, data)

    @classmethod
    def restore(cls, config: JobConfig, collectives: Collectives, fitted: Description, fingerprint: str) -> Self:
        """The task of a trained model, without texts; UserError where the pretrained model is another one by now."""
        require_format(f"{cls.name} task", fitted.get("format"), "the model's task")
        base, tokenizer, identity = _pretrained(config, collectives, fitted)
        names = list(fitted["class_names"])
        reader = cls._reader_of(config, tokenizer, fitted, names)
        return cls(config, collectives, base, identity, tokenizer, reader, names, fingerprint=fingerprint)

    @classmethod
    def _reader_of(
        cls,
        config: JobConfig,
        tokenizer: Any,
        fitted: Description | None,  # noqa: ARG003 (another task reads by it)
        class_names: Sequence[str],  # noqa: ARG003
    ) -> TextReader:
        """What makes tokens of a text; `fitted` describes the task of a trained model."""
        return TextReader(tokenizer, config.text.max_tokens)

    @property
    def num_inputs(self) -> int:
        """Tokens of a text at most."""
        return self._config.text.max_tokens

    def model(self, device: torch.device | None = None) -> nn.Module:
        """The classifier; what is not pretrained is a function of the seed."""
        block: TransformerConfig = families.block_of(self._config.model)
        seed = self._config.run.seed
        with self.initial_values():
            model = build_text_classifier(self._base, block, self._class_names, self._padding, seed)
        return model.to(device or self._collectives.device, self._dtype)

    def description(self) -> Description:
        """The classes, and what identifies the pretrained model, the tokenizer and the cut of a text."""
        return {
            "task": self.name,
            "format": FORMATS[f"{self.name} task"],
            "class_names": self.class_names,
            "column": self._config.text.column,
            "max_tokens": self._config.text.max_tokens,
            "base": families.block_of(self._config.model).pretrained,
            **self._identity,
        }

    def as_trained(self, description: Description) -> Task:
        """This task; UserError where the one that is described so had another pretrained model or tokenizer."""
        _require_same(self._base.name, self._identity, description)
        return self

    def matches(self, description: Description) -> bool:
        """Whether a task described so has the same classes, tokens and pretrained model, wherever that lies."""
        own, other = dict(self.description()), dict(description)
        return {**own, "base": None} == {**other, "base": None}

    def labelled(self, split: str, file: Path | None = None) -> Source:
        """A split of the run's own data, or all rows of another file."""
        if file is not None:
            texts, targets = self._collectives.on_rank_zero(
                lambda: read_labelled_texts(locate(str(file)), self._config.data, self._config.text, self._class_names)
            )
            return self._rows(self._reader.tokens(texts), targets)
        if self._data is None:
            self._data = self._collectives.on_rank_zero(
                lambda: _read(self._config, lambda _: self._reader, self._identity, self._class_names)
            )
            if self._data.sha256 != self.fingerprint:
                log.warning("%s is not what the model was trained on", self._config.data.path)
        return self._split(self._data, split)

    @property
    def input_columns(self) -> Sequence[str]:
        """The column of texts."""
        return [self._config.text.column]

    @property
    def rows_of_chunk(self) -> int:
        """Some passes of the model over rows of similar length."""
        return _ROWS_OF_CHUNK

    def unfamiliar(self, rows: Source, table: pl.DataFrame | None = None) -> Unfamiliar:  # noqa: ARG002
        """Nothing is: a tokenizer knows every text."""
        return Unfamiliar()

    def inputs(self) -> list[str]:
        """What a text becomes."""
        text = self._config.text
        lines = [f"texts of column {text.column!r}, as tokens of {self._base.name}"]
        if text.tokens_per_pass is not None:
            lines.append(f"a pass has at most {text.tokens_per_pass:,} padded tokens over all ranks")
        if self._data:
            lengths = self._data.tokens.lengths.double()
            lines.append(
                f"{lengths.mean():.1f} tokens a text on average; {self._data.tokens.cut:,} of {len(lengths):,} texts "
                f"are cut to their first {text.max_tokens} tokens"
            )
        return lines

    def unlabelled(self, table: pl.DataFrame, source: str, first_row: int = 0) -> Source:
        """Texts to score."""
        texts = texts_of(table, self._config.text.column, source, first_row)
        return self._rows(self._reader.tokens(texts), torch.zeros(len(texts), dtype=torch.int64))

    def kept_files(self) -> Mapping[str, bytes]:
        """The tokens, and beside them hashes of what they were made of and of themselves."""
        if self._data is None:
            return {}
        packed = self._data.tokens.pack()
        return {TOKENS: packed, f"{TOKENS}.key": _key_file(self._data.key, packed).encode()}

    def shipped_files(self, weights: Mapping[str, Tensor]) -> Mapping[str, bytes]:
        """The adapter as peft writes it, and the whole model as transformers does."""
        model = self.model().cpu()
        model.load_state_dict(weights)
        return shipped_files(model, self._tokenizer)  # type: ignore[arg-type]

    def baselines(self) -> dict[str, dict[str, Any]]:
        """Test metrics of logistic regression on TF-IDF and of the model before training, if they are asked for."""
        data, config = self._data, self._config
        if not config.text.baselines or data is None or not len(self.splits["test"]):
            return {}
        before = self._before_training(data)

        def scored() -> dict[str, dict[str, Any]]:
            texts = read_texts(config.data, config.text, split_seed(config), self._class_names)
            targets = self.splits["test"].targets.cpu()
            found = tfidf_probabilities(texts) | before(texts)
            return {name: self.metrics(probabilities, targets) for name, probabilities in found.items()}

        return self._collectives.on_rank_zero(scored)

    def _before_training(self, data: Data) -> Callable[[Texts], dict[str, Tensor]]:
        """Called by all ranks; on rank 0 it gives probabilities of the test rows, (rows, classes), by a name."""
        embedded = embed(self._base, data.tokens, self._padding, self._collectives)

        def probabilities(texts: Texts) -> dict[str, Tensor]:
            assert embedded is not None  # on rank 0
            return {FROZEN: frozen_probabilities(embedded, texts)}

        return probabilities

    def _split(self, data: Data, name: str) -> TokenRows:
        rows = (data.splits == SPLITS.index(name)).nonzero().squeeze(1)
        return self._rows(data.tokens.select(rows), data.targets[rows], rows)

    def _rows(self, tokens: Tokens, targets: Tensor, numbers: Tensor | None = None) -> TokenRows:
        numbers = torch.arange(len(targets)) if numbers is None else numbers
        return TokenRows(tokens, targets, numbers, self._collectives.device, self._padding)


def _pretrained(
    config: JobConfig, collectives: Collectives, fitted: Description | None
) -> tuple[Pretrained, Any, dict[str, str]]:
    """The pretrained model, its tokenizer, and the SHA-256 of both. UserError where `fitted` had others."""
    block: TransformerConfig = families.block_of(config.model)

    def found() -> tuple[Pretrained, Any]:
        base = locate_pretrained(block.pretrained, f"{block.section}.pretrained")
        key = f"{block.section}.tokenizer"
        tokenizer = load_tokenizer(locate_pretrained(block.tokenizer, key) if block.tokenizer else base, key)
        _require_fit(config, base, tokenizer)
        return base, tokenizer

    with collectives.heartbeat.phase("reading the pretrained model"):
        base, tokenizer = collectives.run_on_all(found)
        identity = _same_on_all_hosts(
            base.name,
            lambda: {"base_sha256": base.sha256(), "tokenizer_sha256": tokenizer_sha256(tokenizer)},
            collectives,
        )
    if fitted:
        _require_same(base.name, identity, fitted)
    return base, tokenizer, identity


def _same_on_all_hosts(name: str, make: Callable[[], dict[str, str]], collectives: Collectives) -> dict[str, str]:
    """What the first rank of each host makes. UserError where hosts differ."""
    hosts = collectives.all_gather_object(host_name)
    first_of_host = hosts.index(hosts[collectives.rank]) == collectives.rank
    made = collectives.all_gather_object(lambda: make() if first_of_host else {})
    for host, other in zip(hosts, made, strict=True):
        if other and other != made[0]:
            raise UserError(f"{name}: host {host} has another model or tokenizer than host {hosts[0]}")
    return made[0]


def _require_same(name: str, identity: Mapping[str, str], described: Description) -> None:
    """UserError where a task that is described so had another pretrained model or tokenizer."""
    for key, what in (("base_sha256", "model"), ("tokenizer_sha256", "tokenizer")):
        if described[key] != identity[key]:
            raise UserError(
                f"{name}: is another {what} than the one that was trained on: SHA-256 {identity[key][:12]}..., "
                f"not {described[key][:12]}...: put that one in its place"
            )


def _require_fit(config: JobConfig, base: Pretrained, tokenizer: Any) -> None:
    described = read_config(base)
    vocabulary = getattr(described, "vocab_size", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        section = families.block_of(config.model).section
        raise UserError(
            f"{section}.tokenizer: has {len(tokenizer):,} tokens, and {base.name} knows {vocabulary:,}: use the "
            "tokenizer that the model was trained with"
        )
    places = getattr(described, "max_position_embeddings", None)
    if places is not None and config.text.max_tokens > places:
        raise UserError(f"text.max_tokens={config.text.max_tokens}: {base.name} takes {places} tokens at most")


def _padding(config: JobConfig, tokenizer: Any) -> Padding:
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Padding(int(pad_id or 0), config.text.pad_to_multiple, config.text.max_tokens)


def _read(
    config: JobConfig,
    reader_of: Callable[[Sequence[str]], TextReader],
    identity: Mapping[str, str],
    class_names: Sequence[str] | None,
) -> Data:
    """Rank 0: the texts as tokens, which are taken from the run folder where it has them."""
    found: Texts = read_texts(config.data, config.text, split_seed(config), class_names)
    reader = reader_of(found.class_names)
    what = (identity["tokenizer_sha256"], reader.described, texts_sha256(found.texts))
    key = hashlib.sha256(" ".join(what).encode()).hexdigest()
    anew = config.run.resume == "never"
    tokens = None if anew else _kept_tokens(path_of_run(config), key, len(found.texts))
    if tokens is None:
        tokens = reader.tokens(found.texts)
    return Data(tokens, found.targets, found.splits, found.class_names, found.sha256, key)


def _kept_tokens(folder: Path, key: str, count: int) -> Tokens | None:
    try:
        packed = (folder / TOKENS).read_bytes()
        if (folder / f"{TOKENS}.key").read_text() != _key_file(key, packed):
            return None
        tokens = Tokens.unpack(packed)
    except (OSError, ValueError, KeyError):
        return None
    return tokens if len(tokens.ends) == count + 1 else None


def _key_file(key: str, packed: bytes) -> str:
    return f"{key} {hashlib.sha256(packed).hexdigest()}"
