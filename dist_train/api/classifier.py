"""The scikit-learn estimator: one job in this process."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from dist_train.api.isolation import isolated
from dist_train.api.jobs import Config, File, load_config
from dist_train.api.saved import read_classifier, write_classifier
from dist_train.api.target import Target, free_name
from dist_train.config.schema import JobConfig
from dist_train.data.tables.frames import frame_of, is_dataframe
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import device_here, world_from_environment
from dist_train.errors import TrainingFault, UserError
from dist_train.run import job
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.run.checkpoint.state import decode_parts, encode_parts
from dist_train.run.checkpoint.trained_model import read_trained_model
from dist_train.run.scoring.explanation import Explanation
from dist_train.run.scoring.predictor import Predictor

TABLE = "table.parquet"
"""The rows that a run was fitted to, in its run folder."""


class Classifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier of the rows of a table, with scikit-learn's methods.

    `fit` runs the job of `dist-train train` in this process, alone: preprocessing, training, validation, and the
    weights of the best validation loss. Nothing is printed and nothing is sent to wandb unless it is asked for.

    Every argument that is None is what the configuration says. Where neither says it, a small table gets smaller
    batches and a shorter warm-up than the job's defaults: a batch is a 32nd of the rows, at least 16 and at most 256,
    and the warm-up is a tenth of the steps, at most 100. There are no test rows: `fit` gets all rows to learn from.

    Args:
        config: a JobConfig, a YAML file, several of them, or None. Its `data.path` and `data.target` are not used.
        model: family of the model (`model.name`).
        epochs: passes over the training rows (`train.epochs`).
        batch_size: rows of an optimizer step (`train.global_batch_size`).
        learning_rate: peak learning rate (`optim.lr`).
        validation_fraction: share of each class that is not trained on but chooses the best epoch.
        categorical: names, or positions, of columns of numbers that are codes (`data.categorical`); text columns are
            categorical by themselves.
        random_state: seed of the split, the initial weights, the order of rows and dropout (`run.seed`).
        device: `auto`, `cpu` or `cuda` (`runtime.device`).
        run_dir: run folder to write; it must not exist, or be empty. None: a temporary one, removed after `fit`.
        verbose: show the job's log lines on stderr.
        overrides: further keys, as `key=value`; they come last.

    Attributes:
        classes_: sorted labels, (classes,), in the dtype of `y`.
        n_features_in_, feature_names_in_: columns of `X`; the names where it is a DataFrame with names of text.
        summary_: the run's summary: metrics on the validation rows, rows per second, SHA-256 of the weights.

    >>> import numpy as np
    >>> from dist_train import Classifier
    >>> X = np.random.default_rng(0).normal(size=(200, 3))
    >>> classifier = Classifier(epochs=3, device="cpu").fit(X, X[:, 0] > 0)
    >>> classifier.classes_
    array([False,  True])
    >>> classifier.predict_proba(X).shape
    (200, 2)
    """

    def __init__(
        self,
        config: Config = None,
        *,
        model: str | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        validation_fraction: float | None = None,
        categorical: Sequence[str | int] | None = None,
        random_state: int | None = None,
        device: str | None = None,
        run_dir: File | None = None,
        verbose: bool = False,
        overrides: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.model = model
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.validation_fraction = validation_fraction
        self.categorical = categorical
        self.random_state = random_state
        self.device = device
        self.run_dir = run_dir
        self.verbose = verbose
        self.overrides = overrides

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Classifier:  # noqa: N803
        """Train on the rows of `X`, (rows, columns), and their labels `y`, (rows,).

        `X` is a DataFrame (polars, pandas), an array or nested lists of numbers or text, a list of records, or a dict
        of columns; missing cells are None, null or NaN. `y` holds text, whole numbers or booleans, two classes or more.
        `sample_weight`, (rows,), finite and at least 0, says how much each row counts in the training loss and in the
        validation metrics (`data.weight`). None, or the same for all rows: every row counts 1.

        Raises:
            ValueError: the rows, the labels or an argument have a mistake (UserError is one).
            TrainingFault: training cannot go on, as with a loss that is not finite.
        """
        frame = self._frame(X, reset=True)
        target = Target.of(y, frame)
        weights = _weights(sample_weight, frame, target)
        with _run_folder(self.run_dir) as folder:
            config = self._config(frame, target, folder, weights)
            with isolated(verbose=bool(self.verbose)):
                collectives = Collectives(world_from_environment({}, device=config.runtime.device))
                self.summary_ = _run(config, folder, frame if weights is None else frame.with_columns(weights), target)
                self._parts = read_trained_model(RunFolder(folder).model)
                self._predictor = Predictor.of_parts(self._parts, collectives, config)
        self.classes_ = target.labels
        self._order = target.order(self._predictor.class_names)
        return self

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:  # noqa: N803
        """Probabilities of the classes, (rows, classes) float64, in the order of `classes_`.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: `X` does not have the columns that it had in `fit`, or a cell cannot be read.
        """
        check_is_fitted(self)
        probabilities = self._predictor.predict_proba(self._frame(X, reset=False))
        return np.ascontiguousarray(probabilities[:, self._order])

    def predict(self, X: Any) -> npt.NDArray[Any]:  # noqa: N803
        """The label of the most probable class of each row, (rows,), in the dtype of `y`. Raises as `predict_proba`."""
        best = self.predict_proba(X).argmax(1)
        return cast(npt.NDArray[Any], self.classes_[best])

    def explain(self, X: Any, label: Any = None) -> Explanation:  # noqa: N803
        """The effects of the columns on the log-odds of a class, for each row: `dist_train.load(...).explain`.

        `label` is one of `classes_`; None: the class of `report.positive_class`, or else the rarest training label.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: as `predict_proba`, or there is no such label.
        """
        check_is_fitted(self)
        name = None
        if label is not None:
            found = np.flatnonzero(self.classes_ == label)
            if not len(found):
                raise UserError(f"label: there is no class {label!r}; there is {', '.join(map(str, self.classes_))}")
            name = self._predictor.class_names[self._order[int(found[0])]]
        return self._predictor.explain(self._frame(X, reset=False), name)

    def save(self, folder: File) -> None:
        """Write the fitted classifier into a folder: tensors and JSON, no code.

        `Classifier.load` and `dist_train.load` read it, and so do `dist-train predict` and `evaluate`. A classifier
        that was saved there before is replaced.

        Raises:
            NotFittedError: `fit` has not been called.
            UserError: the folder holds something else, or cannot be written.
        """
        check_is_fitted(self)
        write_classifier(Path(folder), self._parts, self.get_params(deep=False), vars(self))

    @classmethod
    def load(cls, folder: File) -> Classifier:
        """A classifier as it was saved.

        Raises:
            UserError: there is none in the folder, or it does not verify.
        """
        parts, params, fitted = read_classifier(Path(folder))
        classifier = cls(**params)
        for name, value in {**fitted, "_parts": parts}.items():
            setattr(classifier, name, value)
        classifier._connect()
        return classifier

    def __getstate__(self) -> dict[str, Any]:
        """The parts of the trained model as the bytes of their files, and not the objects that are made of them."""
        state = {name: value for name, value in super().__getstate__().items() if name != "_predictor"}
        return state | ({"_parts": dict(encode_parts(state["_parts"]))} if "_parts" in state else {})

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(state)
        if "_parts" in state:
            self._parts = decode_parts(state["_parts"], "the classifier")
            self._connect()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        tags.input_tags.string = True
        return tags

    def _connect(self) -> None:
        # It may have been fitted on another machine.
        collectives = Collectives(world_from_environment({}, device=device_here(self.device or "auto")))
        self._predictor = Predictor.of_parts(self._parts, collectives)

    def _frame(self, X: Any, *, reset: bool) -> pl.DataFrame:  # noqa: N803
        """`X` as a table with a name for each column; its columns are noted (`reset`), or compared with those noted."""
        if _is_records(X) or (isinstance(X, Mapping) and not issparse(X)):
            X = frame_of(X)  # noqa: N806
        if is_dataframe(X):
            validate_data(self, X, reset=reset, skip_check_array=True)
            frame = frame_of(X)
            named = hasattr(self, "feature_names_in_")
            return frame if named else frame.rename(dict(zip(frame.columns, self._names(), strict=True)))
        array = validate_data(self, X, reset=reset, dtype=None, ensure_all_finite=False)
        return frame_of(array, self._names())

    def _names(self) -> list[str]:
        """Names of the columns; those of an array are x0, x1, ..."""
        known = getattr(self, "feature_names_in_", None)
        return [f"x{i}" for i in range(self.n_features_in_)] if known is None else list(known)

    def _config(self, frame: pl.DataFrame, target: Target, folder: Path, weights: pl.Series | None) -> JobConfig:
        """The configuration of the job, for a table in `folder`."""
        keys = {
            "model.name": self.model,
            "train.epochs": self.epochs,
            "train.global_batch_size": self.batch_size,
            "optim.lr": self.learning_rate,
            "data.validation_fraction": self.validation_fraction,
            "run.seed": self.random_state,
            "runtime.device": self.device,
        }
        settings = ["data.test_fraction=0", *(f"{key}={value}" for key, value in keys.items() if value is not None)]
        config = load_config(self.config, [*settings, *self.overrides])
        data = replace(
            config.data,
            path=str(folder / TABLE),
            target=target.name,
            drop=[name for name in config.data.drop if name in frame.columns],
            categorical=config.data.categorical if self.categorical is None else _categorical(self.categorical, frame),
            split_column=config.data.split_column if config.data.split_column in frame.columns else None,
            weight=config.data.weight if weights is None else weights.name,
        )
        run = replace(config.run, dir=str(folder.parent), name=folder.name, resume="auto")
        wandb = replace(config.wandb, mode="disabled" if config.wandb.mode == "auto" else config.wandb.mode)
        config = replace(config, data=data, run=run, wandb=wandb)
        said = {setting.partition("=")[0] for setting in (*settings, *self.overrides)}
        return _for_small_tables(config, said, frame.height) if self.config is None else config


def _is_records(table: Any) -> bool:
    return isinstance(table, Sequence) and len(table) > 0 and isinstance(table[0], Mapping)


@contextmanager
def _run_folder(given: File | None) -> Iterator[Path]:
    """The folder of the run; a temporary one goes with the block."""
    if given is None:
        with TemporaryDirectory(prefix="dist_train-") as parent:
            yield Path(parent) / "run"
        return
    folder = Path(given).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"run_dir: {given} holds something already: name a new folder, or remove it")
    yield folder


def _run(config: JobConfig, folder: Path, frame: pl.DataFrame, target: Target) -> dict[str, Any]:
    """Train, and return the summary. Messages call the table `X`, not by the file that it is written to."""
    file = folder / TABLE
    world = world_from_environment({}, device=config.runtime.device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        frame.with_columns(pl.Series(target.name, target.cells)).write_parquet(file)
    except OSError as error:
        raise UserError(f"run_dir: {folder} cannot be written: {error.strerror or error}") from None
    try:
        summary = job.train(config, world, {}, handle_signals=False)
    except UserError as error:
        raise UserError(str(error).replace(str(file), "X")) from error
    if summary is None:
        raise TrainingFault("training was stopped before its end: run.time_limit_minutes is over")
    return summary


def _for_small_tables(config: JobConfig, said: Collection[str], num_rows: int) -> JobConfig:
    """Smaller batches and a shorter warm-up than the defaults, unless the keys that were `said` have them."""
    train, schedule = config.train, config.schedule
    rows = max(2, round(num_rows * (1 - config.data.validation_fraction)))
    if "train.global_batch_size" not in said:
        train = replace(train, global_batch_size=min(256, max(16, 2 ** round(math.log2(rows / 32)))))
    if "schedule.warmup_steps" not in said:
        steps = min(train.epochs * -(-rows // train.global_batch_size), train.max_steps or 2**63)
        schedule = replace(schedule, warmup_steps=min(schedule.warmup_steps, steps // 10))
    return replace(config, train=train, schedule=schedule)


def _weights(given: Any, frame: pl.DataFrame, target: Target) -> pl.Series | None:
    """Weights of the rows as a column; None where there are none, or all are the same."""
    if given is None:
        return None
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError("sample_weight: must be numbers") from None
    if values.shape not in ((), (frame.height,)):
        raise UserError(
            f"sample_weight: must have one number for each of the {frame.height} rows, has shape {values.shape}"
        )
    if not values.any():
        raise UserError("sample_weight: the weight of every row is zero")
    broken = ~(np.isfinite(values) & (values >= 0))
    if broken.any():
        row = int(broken.argmax())
        raise UserError(f"sample_weight: row {row + 1}: {values.flat[row]} is not a finite number of at least 0")
    if (values == values.flat[0]).all():
        return None
    return pl.Series(free_name("sample_weight", [*frame.columns, target.name]), values)


def _categorical(columns: Sequence[str | int], frame: pl.DataFrame) -> list[str]:
    """Names of columns that are given by name or by position."""
    if isinstance(columns, str):
        raise UserError(f"categorical: must be a list of columns, is the text {columns!r}")
    names = []
    for column in columns:
        if not isinstance(column, str) and not 0 <= column < frame.width:
            raise UserError(f"categorical: there is no column {column}: X has {frame.width}")
        names.append(column if isinstance(column, str) else frame.columns[column])
    return names
