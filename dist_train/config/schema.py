"""Every key of a configuration, its default and its meaning.

The text under each field is its documentation: docs/configuration.md is made from it.
Units stand in the names (`_rows`, `_steps`, `_seconds`) or in the text. Batch sizes are always global.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it starts."""

    name: str = "run"
    """Name of the run; its folder is `<run.dir>/<run.name>`."""
    dir: str = "runs"
    """Folder that holds the run folders."""
    seed: int = 0
    """Every random number of the run (split, initial weights, order of rows, dropout) is a function of this seed; that of the split only where `data.split_seed` is null."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: continue from the newest checkpoint that verifies. `never`: start anew, once for a Slurm job and not at each of its restarts; an older run in the folder is moved aside to `<run.name>.old-N`."""
    time_limit_minutes: float | None = None
    """Stop, save and leave the `requeue` marker after this many minutes, as if told by a signal; null: no limit."""
    force: bool = False
    """Resume although the configuration or the data differ from what the checkpoint was trained with."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is trained."""

    name: str = "tabular"
    """Name of the task: `tabular`, classification of the rows of a table; `text`, classification of texts; `instruction`, classification of texts by the answers of a causal language model (docs/text.md); or one that a package registers."""
    auto: list[str] = field(default_factory=list)
    """Keys whose value is `auto` (docs/any-table.md). A list that the program makes: write `auto` as the value of a key."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Texts and their tokens, of the tasks `text` and `instruction`; other tasks do not read this section."""

    column: str = "text"
    """Name of the column of texts. The class is in `data.target`."""
    hub_dataset: str | None = None
    """Data set on the Hugging Face hub that is taken where `data.path` does not exist; it needs a network, or its files in the cache of the hub."""
    max_tokens: int = 128
    """Tokens kept of a text, with those that the tokenizer adds and, of the task `instruction`, the rest of the prompt: a longer text keeps its first ones."""
    pad_to_multiple: int = 8
    """Texts that are computed together are padded to the longest of them, rounded up to a multiple of this."""
    sort_batches: int = 16
    """Global batches whose rows are sorted by length before they are cut into batches, so that little is padded; 1: rows are not sorted over batches."""
    tokens_per_pass: int | None = None
    """Padded tokens of a forward-backward pass over all ranks at most, to save memory: a global batch that has more is worked through in as many passes more than `train.accumulation_steps`. Null: no limit."""
    baselines: bool = False
    """Score TF-IDF with logistic regression on the same rows, and what was trained as it was before: an encoder with logistic regression, a causal language model by its answers. They are `baselines` in summary.json."""


COLUMN_FORMS = ("1,234.56", "1.234,56", "date", "day/month/year", "month/day/year", "hours:minutes:seconds")
"""Forms of cells that `data.formats` may name."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The table, its target and its splits."""

    path: str = "builtin:credit_card_risk"
    """CSV, JSON lines or Parquet file, a store made by `dist-train prepare`, or `builtin:NAME` for a data set that comes with the package."""
    target: str = "risk_tier"
    """Name of the target column: text or integers, two classes or more, no missing cells."""
    weight: str | None = None
    """Column of numbers that says how much a row counts in the loss and in every metric (exposure, sampling, reject inference); it is not a feature. At least 0, finite, no missing cells (docs/weights.md). Null: every row counts 1."""
    drop: list[str] = field(default_factory=list)
    """Columns that are not features (identifiers, dates, anything known only after the fact)."""
    categorical: list[str] = field(default_factory=list)
    """Columns of numbers that are codes, not quantities. Text columns are categorical by themselves."""
    missing_values: list[str] = field(default_factory=lambda: ["", "NA", "N/A", "NaN", "nan", "null", "NULL"])
    """Cells that mean: no value, in files and in tables of programs. A word that is a number or a date means it in every spelling and type: `-999` is also -999.0. A list replaces this one."""
    formats: dict[str, str] = field(default_factory=dict)
    """Column -> the form of its cells, where they leave it open: `1,234.56`, `1.234,56` (either may be followed by its unit: `1.234,56 EUR`, `1,234.56 %`), `date` (year first, or the month in words), `day/month/year`, `month/day/year`, `hours:minutes:seconds`. docs/columns.md says what is recognised."""
    max_categories: int = 256
    """Categories kept for one column, the most frequent first; the others share the code for unknown ones."""
    hash_buckets: int = 0
    """Codes for the categories beyond `max_categories` of a column: a hash of its text gives each one of them. 0: they share the code for unknown ones."""
    numeric_transform: Literal["robust", "quantile"] = "robust"
    """How numbers are scaled. `robust`: by median and interquartile range, smoothly clipped to (-3, 3). `quantile`: to a normal distribution by the quantiles of the training rows, from -5.2 to 5.2."""
    split_column: str | None = None
    """Column that says train; valid, val or validation; test. Null: split by the fractions below."""
    validation_fraction: float = 0.15
    """Share of each class that goes to the validation rows, when there is no split column."""
    test_fraction: float = 0.15
    """Share of each class that goes to the test rows, when there is no split column."""
    time_column: str | None = None
    """Column of dates, timestamps or whole numbers: the latest rows are test, those before them validate, the rest train; rows of one time stay together. It is no feature."""
    group_column: str | None = None
    """Column whose equal cells belong together, as those of a customer: all rows of a group are in one split. It is no feature."""
    split_seed: int | None = None
    """Seed of the split; null: `run.seed`. Runs of several seeds with the same number here are tested on the same rows."""
    folds: int | None = None
    """K: the rows that are not test are cut into K folds, and each is validated by a run that trained on the others, or, with `data.time_column`, on those before it; the K runs become one model. Null: one run."""
    fold: int | None = None
    """With `data.folds`: train this fold alone, 0 to K - 1; null: all of them, one after another."""
    shuffle_block_rows: int | None = None
    """Null: each epoch trains the rows in an order drawn from all orders. N: runs of N neighbouring rows stay near each other in it, for stores that memory cannot hold on a slow disk; its cost: docs/large-tables.md."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The classifier. A configuration that was loaded also has the block of a family that has one."""

    name: str = "financial_classifier"
    """Family of the model. The keys below are those of `financial_classifier`; those of another family stand in `model.<name>`."""
    hidden_dim: int = 256
    """Width of the first hidden layer; the second has half of it."""
    dropout: int | float | list[int | float] = field(default_factory=lambda: [0.3, 0.2])
    """Dropout probabilities after the first and the second hidden layer; one number means both."""
    embedding_dim: int | None = None
    """Null: categories are one-hot. A number: each categorical column is a learned embedding of this width."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter, 2019). Biases and normalisation parameters are not decayed."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the weight matrices."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float | None = 1.0
    """The gradient's global norm is clipped to this; null: not clipped."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate: a linear warm-up, then what `name` says (docs/training.md)."""

    name: Literal["cosine", "constant", "plateau"] = "cosine"
    """`cosine`: falls to its lowest over all steps of the run. `constant`: stays at its peak. `plateau`: is multiplied by `plateau_factor` after each `plateau_patience` evaluations in a row without a better validation; it does not depend on the number of epochs, which early stopping leaves open."""
    warmup_steps: int = 100
    """Optimizer steps over which the learning rate rises to its peak."""
    min_lr_ratio: float = 0.0
    """Lowest learning rate, as a share of the peak: `cosine` reaches it at the last step, `plateau` does not go below it."""
    plateau_patience: int = 3
    """Of `plateau`: evaluations without a better validation before the learning rate is reduced."""
    plateau_factor: float = 0.3
    """Of `plateau`: what the learning rate is multiplied by."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on how many rows at a time, and for what."""

    epochs: int = 20
    """Passes over the training rows."""
    max_steps: int | None = None
    """Stop after this many optimizer steps even if the epochs are not over."""
    global_batch_size: int = 256
    """Rows of one optimizer step over all ranks together. The last batch of an epoch may be smaller; a last batch of one row joins the batch before it."""
    accumulation_steps: int = 1
    """Forward-backward passes in which one global batch is worked through, to save memory. BatchNorm sees one pass at a time."""
    virtual_ranks: int | None = None
    """Null: the fast mode, results agree between world sizes to rounding. V: the exact mode, the global batch is computed in V fixed slices and the result is the same bits on every world size that divides V (docs/same-bits.md)."""
    gradient_checkpointing: bool = False
    """Of each layer keep its inputs alone, and compute it again in the backward pass: less memory for about a third more time, the same results. For models whose layers are in an `nn.ModuleList`, as those of Transformers are."""
    precision: Literal["float32", "float64", "bf16"] = "float32"
    """`bf16`: weights stay float32, the forward pass runs under bfloat16 autocast."""
    loss: str = "cross_entropy"
    """Name of the loss: `cross_entropy`, or one that a program or an installed package registers (docs/python.md)."""
    class_weights: Any = None
    """Null, `balanced` (inverse class frequency), or a mapping from class name to weight."""
    class_sampling: str | None = None
    """Null: an epoch trains every row once. `balanced`: an epoch has as many draws as rows, and every class the same share of them; the probabilities are then those of a population with equal classes. `balanced_reweighted`: the same draws, and a row weighs the inverse of how often it is drawn, so that the expected loss, and the probabilities, are those of the table (docs/training.md)."""
    label_smoothing: float = 0.0
    """Share of the target probability spread evenly over the classes."""
    ema_decay: float | None = None
    """Evaluate and ship an exponential moving average of the weights with this decay per step; null: the weights themselves."""
    ema_warmup: bool = True
    """The decay of the average after update t is at most (1 + t) / (10 + t), so that the initial weights are soon forgotten. False: `ema_decay` from the first step on, as before this key was there."""
    select_by: str | None = None
    """Metric of the validation rows that chooses the epoch to ship and drives early stopping, in its own direction: loss, objective, accuracy, balanced_accuracy, macro_f1, auroc, brier, ece, or one of `evaluation.metrics`. Null: the loss that is trained, that is `loss` (log loss), or `objective` where classes are weighed or sampled or `train.loss` is another one (docs/training.md)."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without a better value of what `train.select_by` says; null: never."""


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """Several runs that become one model: the mean of their probabilities (docs/splits.md)."""

    seeds: int = 1
    """Runs that differ in their seed, `run.seed`, `run.seed + 1` and so on, and in nothing else: their split is the same."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Validation during training, and every later evaluation or prediction."""

    every_steps: int | None = None
    """Optimizer steps between evaluations; null: at the end of each epoch."""
    metrics: list[str] = field(default_factory=list)
    """Further metrics, by the names under which a program or an installed package registers them (docs/python.md)."""
    batch_size: int = 2048
    """Rows of one forward pass; of texts 32 at most, on a GPU 512. Passes are cut alike for every world size: by row number, those of texts by length."""


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Probabilities that agree with observed frequencies, fitted to the validation rows (docs/risk.md)."""

    method: Literal["temperature", "vector", "isotonic", "none"] = "temperature"
    """`temperature`: one number, which leaves the predicted class as it is. `vector`: a scale and a bias for each class. `isotonic`: a monotone function for each class; it needs many validation rows. `none`. It is shipped in `model/calibration.json`; the weights in `model.pth` are not changed."""
    apply: bool = True
    """Predictions of the trained model are calibrated. False: the parameters are shipped and not applied."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The report on a trained model, `dist-train report RUN` (docs/risk.md). Its probabilities are those that the model ships."""

    enabled: bool = False
    """Write the report at the end of training."""
    positive_class: str | None = None
    """Class that scores are the probability of, as `default` or `bad`; null: the class with the fewest training rows."""
    segments: list[str] = field(default_factory=list)
    """Columns whose groups are compared (age band, region); they need not be features."""
    dependence: list[str] = field(default_factory=list)
    """Columns whose partial dependence is drawn; none: the six most important ones."""
    false_positive_cost: float = 1.0
    """Cost of taking a row for the positive class that is not of it, in the unit of `false_negative_cost`."""
    false_negative_cost: float = 1.0
    """Cost of missing a row of the positive class."""
    bootstrap_repeats: int = 200
    """Draws of the rows for the confidence intervals."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints are also written at each evaluation with a better validation, at a stop and at the end."""

    every_steps: int = 500
    """Optimizer steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints kept; the best one is kept beside them. Those that exist are the windows of `verify --challenge` (docs/witness.md)."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """The machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA when torch sees a GPU, else the CPU."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """`auto`: nccl when every rank has a GPU of its own, else gloo."""
    fsdp: bool = False
    """Each rank holds a part of the parameters, gradients and moments, for models that do not fit one GPU (docs/fsdp.md). Checkpoints are those of runs without it, and a run may change it when it resumes. One rank holds all of it as ever."""
    products: Literal["defined", "library"] = "defined"
    """On the CPU: with `defined`, the operations of the exact mode and of scores, and initial weights, have the same bits on every processor, and for a row alone as in a batch (docs/operations.md); `library` leaves them to torch. A run of an earlier version has `library`."""
    audit_every_steps: int | None = None
    """In the exact mode on the CPU: each so many optimizer steps, ranks compute the slices of each other again and compare them byte for byte, before the step is taken; in every step a rank compares checksums of its weights. A rank that differs ends the run, and is named (docs/audit.md). Null: off."""
    timeout_seconds: float = 300.0
    """A rank that keeps the others waiting for longer ends the run; `fault.txt` in the run folder then says which and why."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """metrics.jsonl, the progress bar and the log lines."""

    every_steps: int = 50
    """Optimizer steps between lines for the training rows."""
    tensorboard: bool = False
    """Write event files for TensorBoard to `tensorboard/` of the run folder, by rank 0; the extra is `tensorboard`."""
    mlflow: bool = False
    """Send metrics to MLflow, where MLFLOW_TRACKING_URI says, by rank 0; the experiment is MLFLOW_EXPERIMENT_NAME, else `wandb.project`; the extra is `mlflow`."""
    curves: bool = False
    """Draw `curves.png` in the run folder after each evaluation, by rank 0; it needs matplotlib (the extra `report`)."""


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases, by rank 0 only."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: as WANDB_MODE says, else online when an API key is found, else offline; it never asks. Online, metrics and the resolved configuration are sent: also paths and names of columns."""
    project: str = "dist_train"
    """Project that the run is filed under."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """One training job."""

    run: RunConfig = field(default_factory=RunConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    log: LogConfig = field(default_factory=LogConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
