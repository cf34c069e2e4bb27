"""Every mistake in a user's hands costs one message: exit code 2, the culprit's name, no traceback, nothing written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dist_train.data.tables.table import read_table
from dist_train.errors import UserError
from tests import commands
from tests.cli.conftest import Trained
from tests.cli.in_process import CommandResult, command, command_on_ranks, contents
from tests.cli.tables import clients, run_arguments


def assert_one_message(outcome: CommandResult, *culprits: object) -> None:
    """Exit code 2, and one error on stderr and nothing else, which names all `culprits`."""
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("error: "), outcome.err
    lines = outcome.err.splitlines()
    assert all(line.startswith("  - ") for line in lines[1:]), outcome.err
    for culprit in culprits:
        assert str(culprit) in outcome.err, outcome.err


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "clients.csv"
    clients().write_csv(path)
    return path


def refused(tmp_path: Path, data: Path | str, *more: object, culprits: tuple[object, ...], **environ: str) -> None:
    """`train` refuses with one line and leaves the folder as it was."""
    before = contents(tmp_path)
    outcome = command("train", *run_arguments(tmp_path / "runs" / "r", data), *more, **environ)
    assert_one_message(outcome, *culprits)
    assert contents(tmp_path) == before


SETTINGS = {
    "optim.lrr=1": ("optim.lrr", "Did you mean"),
    "lr=1": ("'lr'", "'optim.lr'"),
    "optimizer.lr=1": ("optimizer",),
    "optim=3": ("optim=3", "optim.KEY=value"),
    "optim.lr=fast": ("optim.lr", "fast"),
    "optim.lr=[1,2]": ("optim.lr",),
    "optim.lr=nan": ("optim.lr",),
    "optim.lr=inf": ("optim.lr",),
    "optim.lr=-0.1": ("optim.lr", "-0.1"),
    "optim.lr=0": ("optim.lr",),
    "optim.lr=null": ("optim.lr",),
    "model.hidden_dim=9223372036854775808": ("model.hidden_dim", "at most 1048576"),
    "model.hidden_dim=300000000": ("model.hidden_dim", "at most 1048576"),
    "model.hidden_dim=1048576": ("do not fit into the memory", "model.hidden_dim"),
    "train.max_steps=9223372036854775808": ("train.max_steps", "64 bits"),
    "train.max_steps=-9223372036854775809": ("train.max_steps",),
    "optim.weight_decay=-1": ("optim.weight_decay",),
    "optim.betas=[0.9]": ("optim.betas",),
    "optim.betas=[0.9,1.0]": ("optim.betas",),
    "optim.eps=0": ("optim.eps",),
    "optim.max_grad_norm=0": ("optim.max_grad_norm",),
    "optim.max_grad_norm=nan": ("optim.max_grad_norm",),
    "schedule.warmup_steps=-1": ("schedule.warmup_steps",),
    "schedule.min_lr_ratio=1.5": ("schedule.min_lr_ratio",),
    "schedule.min_lr_ratio=nan": ("schedule.min_lr_ratio",),
    "train.epochs=0": ("train.epochs",),
    "train.epochs=1.5": ("train.epochs", "1.5"),
    "train.epochs=null": ("train.epochs",),
    "train.max_steps=0": ("train.max_steps",),
    "train.global_batch_size=1": ("train.global_batch_size",),
    "train.global_batch_size=-64": ("train.global_batch_size",),
    "train.accumulation_steps=0": ("train.accumulation_steps",),
    "train.accumulation_steps=33": ("train.accumulation_steps",),
    "train.precision=float16": ("train.precision", "float16"),
    "train.label_smoothing=1": ("train.label_smoothing",),
    "train.ema_decay=1": ("train.ema_decay",),
    "train.ema_decay=nan": ("train.ema_decay",),
    "train.early_stopping_patience=0": ("train.early_stopping_patience",),
    "train.class_weights=inverse": ("train.class_weights", "inverse"),
    "train.class_weights={low: 1, mid: 0, high: 1}": ("train.class_weights", "mid"),
    "train.class_weights={low: 1, mid: nan, high: 1}": ("train.class_weights", "mid"),
    "train.class_weights={low: 1, mid: 2}": ("train.class_weights", "high"),
    "train.class_weights={low: 1, mid: 2, hihg: 3}": ("train.class_weights", "hihg", "high"),
    "model.dropout=1.5": ("model.dropout", "1.5"),
    "model.dropout=-0.1": ("model.dropout",),
    "model.dropout=[0.3,nan]": ("model.dropout",),
    "model.dropout=[0.1,0.1,0.1]": ("model.dropout",),
    "model.dropout=much": ("model.dropout", "much"),
    "model.dropout=null": ("model.dropout",),
    "model.name=financial_clasifier": ("model.name", "financial_clasifier", "financial_classifier"),
    "model.hidden_dim=0": ("model.hidden_dim",),
    "model.embedding_dim=0": ("model.embedding_dim",),
    "evaluation.every_steps=0": ("evaluation.every_steps",),
    "evaluation.batch_size=0": ("evaluation.batch_size",),
    "checkpoint.every_steps=0": ("checkpoint.every_steps",),
    "checkpoint.keep=0": ("checkpoint.keep",),
    "log.every_steps=0": ("log.every_steps",),
    "runtime.device=tpu": ("runtime.device", "tpu"),
    "runtime.backend=nccl": ("runtime.backend", "nccl"),
    "runtime.timeout_seconds=0": ("runtime.timeout_seconds",),
    "run.resume=maybe": ("run.resume", "maybe"),
    "run.name=": ("run.name",),
    "run.name=a/b": ("run.name", "a/b"),
    "run.name=..": ("run.name",),
    "run.seed=-1": ("run.seed",),
    "run.seed=99999999999999999999": ("run.seed",),
    "run.force=perhaps": ("run.force", "perhaps"),
    "wandb.mode=silent": ("wandb.mode", "silent"),
    "wandb.project=": ("wandb.project",),
    "data.validation_fraction=nan": ("data.validation_fraction",),
    "data.validation_fraction=-0.1": ("data.validation_fraction",),
    "data.test_fraction=0.9": ("data.validation_fraction", "data.test_fraction"),
    "data.max_categories=0": ("data.max_categories",),
    "data.target=risk": ("clients.csv", "risk", "tier"),
    "data.target=null": ("clients.csv", "null"),
    "data.drop=[tier]": ("data.drop", "tier"),
    "data.drop=[incomes]": ("clients.csv", "incomes", "income"),
    "data.drop=income": ("data.drop", "data.drop=[first,second]"),
    "optim.betas={a: 1}": ("optim.betas", "list"),
    "optim.lr.x=1": ("optim.lr",),
    "train.epochs=true": ("train.epochs",),
    "run.name=${oc.env:DIST_TRAIN_NO_SUCH_VARIABLE}": ("run.name", "DIST_TRAIN_NO_SUCH_VARIABLE"),
    "optim.lr=${optim.lr}": ("optim.lr",),
    "data.drop=[income,age,purpose,utilisation]": ("clients.csv", "feature"),
    "data.categorical=[Age]": ("clients.csv", "Age"),
    "data.split_column=fold": ("clients.csv", "fold"),
    "data.split_column=purpose": ("clients.csv", "purpose", "data row 1"),
    "data.split_column=tier": ("data.split_column",),
    "data.path=": ("data.path",),
    "data.path=builtin:credit": ("data.path", "credit_card_risk"),
    "data.path=no/such/file.csv": ("no/such/file.csv",),
    "optim.lr=[": ("optim.lr=[",),
    "optim.lr": ("optim.lr", "key=value"),
    "=3": ("=3",),
    "missing.yaml": ("missing.yaml", "no such file"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_wrong_setting_is_named(setting: str, tmp_path: Path, csv: Path) -> None:
    refused(tmp_path, csv, setting, culprits=SETTINGS[setting])


def test_all_mistakes_of_a_configuration_are_reported_at_once(tmp_path: Path, csv: Path) -> None:
    refused(
        tmp_path, csv, "optim.lr=-1", "model.dropout=1.5", "train.epoch=3", "wandb.mode=silent", "model.name=gpt",
        culprits=("optim.lr", "model.dropout", "train.epoch", "wandb.mode", "model.name"),
    )  # fmt: skip


YAML_FILES = {
    "train: [1, 2": ("line",),
    "train:\n\tepochs: 3\n": ("line 2",),
    "- train\n- optim\n": ("mapping", "list"),
    "just words": ("just words",),
    "3.5": ("mapping",),
    "optim:\n  lrr: 0.1\n": ("optim.lrr",),
    "optim:\n  lr: fast\n": ("optim.lr", "fast"),
    "optim: 3\n": ("optim",),
    "optim:\n": ("optim", "empty"),
    "3: 4\n": ("3",),
    "optim:\n  eps: ${nowhere}\n": ("optim.eps", "nowhere"),
    "optim:\n  eps: ???\n": ("optim.eps",),
    "optim:\n  lr: 1\n  lr: 2\n": ("lr",),
    "a: !!python/object/apply:os.system ['touch harm']\n": ("python/object",),
}


@pytest.mark.parametrize("text", YAML_FILES)
def test_a_wrong_yaml_file_is_named(text: str, tmp_path: Path, csv: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    refused(tmp_path, csv, path, culprits=("mine.yaml", *YAML_FILES[text]))


def test_a_yaml_file_that_cannot_be_read_is_named(tmp_path: Path, csv: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("run: {name: Müller}".encode("latin-1"))
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    for name in ("latin.yaml", "folder.yaml", "binary.yaml"):
        refused(tmp_path, csv, tmp_path / name, culprits=(name,))


def test_an_empty_yaml_file_changes_nothing(tmp_path: Path, csv: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    outcome = command("train", *run_arguments(tmp_path / "r", csv), tmp_path / "empty.yaml", "--dry-run")
    assert outcome.code == 0, outcome.err


def csv_of(*lines: str) -> bytes:
    return "\n".join(lines).encode()


TABLE = clients()
CSV_LINES = TABLE.write_csv().splitlines()
FIVE_LINES = ("age,purpose,tier", "31,car,low", "42,house,high", "53,car,low", "64,house,high", "75,car,low")

TABLES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty.csv": (b"", ("empty",)),
    "blank_lines.csv": (b"\n\n\n", ("no rows",)),
    "header_only.csv": (csv_of(CSV_LINES[0], ""), ("no rows",)),
    "only_a_header_without_newline.csv": (csv_of(CSV_LINES[0]), ("no rows",)),
    "too_few_cells.csv": (csv_of(*FIVE_LINES[:3], "53,car", *FIVE_LINES[4:]), ("#4", "Expected 3 columns, got 2")),
    "too_many_cells.csv": (csv_of(*FIVE_LINES[:3], "53,car,low,x", *FIVE_LINES[4:]), ("#4", "got 4")),
    "open_quote.csv": (csv_of(*FIVE_LINES[:3], '"53,car,low', *FIVE_LINES[4:]), ()),
    "no_windows_1252.csv": (b"age,tier\n1,a\x81\n", ("UTF-8", "1252")),
    "zeros.csv": (bytes(1000), ()),
    "parquet.csv": (b"PAR1" + bytes(range(256)) * 4, ()),
    "garbage.csv": (bytes(range(255, 0, -1)) * 7, ()),
    "two_columns_of_one_name.csv": (csv_of("age,age,tier", "1,2,low", "3,4,high"), ("'age'",)),
    "nameless_column.csv": (csv_of("age,,tier", "1,2,low", "3,4,high"), ("column 2",)),
    "no_target.csv": (csv_of("age,purpose", "1,car"), ("'tier'", "age, purpose")),
    "null_target.csv": (csv_of(*FIVE_LINES[:3], "53,car,NA", *FIVE_LINES[4:]), ("'tier'", "data row 3")),
    "target_all_null.csv": (csv_of("age,tier", "1,", "2,", "3,"), ("'tier'", "data row 1")),
    "one_class.csv": (csv_of("age,tier", *["1,low"] * 9), ("'tier'", "'low'")),
    "fractional_target.csv": (csv_of("age,tier", *[f"1,{i / 4}" for i in range(4, 9)]), ("'tier'", "1.25", "row 2")),
    "infinite.csv": (csv_of("age,tier", "1,low", "2,high", "inf,low", "4,high"), ("'age'", "data row 3", "inf")),
    "minus_infinity.csv": (csv_of("age,tier", "1,low", "-Infinity,high"), ("'age'", "data row 2", "Infinity")),
    "beyond_float32.csv": (csv_of("age,tier", "1,low", "2,high", "1e39,low"), ("'age'", "data row 3", "1e39")),
    "stray_text.csv": (csv_of("age,tier", "1,low", "2,high", "three,low", "4,high"), ("'age'", "data row 3", "three")),
    "one_row.csv": (csv_of("age,tier", "1,low"), ("'tier'",)),
    "only_the_target.csv": (csv_of("tier", "low", "high", "low", "high"), ("feature",)),
    "wrong_suffix.txt": (csv_of(*FIVE_LINES), (".csv, .tsv, .jsonl", ".parquet")),
    "no_suffix": (csv_of(*FIVE_LINES), (".csv, .tsv, .jsonl", ".parquet")),
    "empty.parquet": (b"", ("empty",)),
    "garbage.parquet": (bytes(range(256)) * 8, ()),
    "text.parquet": (csv_of(*FIVE_LINES), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_wrong_table_is_named(name: str, tmp_path: Path) -> None:
    content, culprits = TABLES[name]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, tmp_path / name, culprits=(name, *culprits))


PARQUETS: dict[str, tuple[pl.DataFrame, tuple[str, ...]]] = {
    "no rows": (TABLE.clear(), ("no rows",)),
    "no columns": (pl.DataFrame(), ("no rows",)),
    "no target": (TABLE.drop("tier"), ("'tier'",)),
    "null target": (TABLE.with_columns(tier=pl.when(pl.int_range(pl.len()) != 4).then("tier")), ("'tier'", "row 5")),
    "NaN target": (pl.DataFrame({"age": [1, 2, 3], "tier": [0.0, float("nan"), 1.0]}), ("'tier'", "row 2")),
    "fractional target": (pl.DataFrame({"age": [1, 2, 3], "tier": [1.0, 0.25, 1.0]}), ("'tier'", "0.25", "data row 2")),
    "infinite target": (pl.DataFrame({"age": [1, 2], "tier": [1.0, float("inf")]}), ("'tier'", "inf", "data row 2")),
    "one class": (TABLE.with_columns(tier=pl.lit("low")), ("'tier'", "'low'")),
    "infinite": (TABLE.with_columns(age=pl.when(pl.int_range(pl.len()) == 4).then(float("inf")).otherwise(1.0)),
                 ("'age'", "data row 5", "inf")),
    "beyond float32": (TABLE.with_columns(age=pl.when(pl.int_range(pl.len()) == 4).then(-1e300).otherwise(1.0)),
                       ("'age'", "data row 5")),
    "lists": (TABLE.with_columns(age=pl.concat_list("age", "age")), ("'age'", "data.drop")),
    "bytes": (TABLE.with_columns(age=pl.lit(b"\xff")), ("'age'", "data.drop")),
    "target of dates": (TABLE.with_columns(tier=pl.date(2020, 1, 1)), ("'tier'",)),
    "target of lists": (TABLE.with_columns(tier=pl.concat_list("age", "age")), ("'tier'", "List")),
    "a class for every row": (pl.DataFrame({"age": range(3000), "tier": range(3000)}), ("'tier'", "3000")),
}  # fmt: skip


@pytest.mark.parametrize("name", PARQUETS)
def test_a_wrong_parquet_file_is_named(name: str, tmp_path: Path) -> None:
    frame, culprits = PARQUETS[name]
    frame.write_parquet(tmp_path / "clients.parquet")
    refused(tmp_path, tmp_path / "clients.parquet", culprits=("clients.parquet", *culprits))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_parquet_file_is_named(share: float, tmp_path: Path) -> None:
    path = tmp_path / "torn.parquet"
    TABLE.write_parquet(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(tmp_path, path, culprits=("torn.parquet",))


@pytest.mark.parametrize("compression", ["zstd", "snappy", "uncompressed"])
def test_a_damaged_parquet_file_raises_and_never_crashes(
    compression: pl._typing.ParquetCompression, tmp_path: Path
) -> None:
    path = tmp_path / "damaged.parquet"
    TABLE.write_parquet(path, compression=compression)
    content = path.read_bytes()
    random = np.random.default_rng(1)
    refusals = []
    for _ in range(200):
        damaged = bytearray(content)
        damaged[random.integers(len(content))] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            read_table(path, [])
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 20
    assert all("damaged.parquet" in text and text.isprintable() for text in refusals)


def test_a_csv_file_that_ends_within_a_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "torn.csv"
    text = "\n".join(CSV_LINES)
    path.write_text(text[: text.rindex(",", 0, len(text) * 2 // 3)])
    refused(tmp_path, path, culprits=("torn.csv", "Expected 5 columns"))


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.parquet").mkdir()
    for name in ("folder.csv", "folder.parquet"):
        refused(tmp_path, tmp_path / name, culprits=(name, "directory"))


def test_a_class_without_training_rows_is_named(tmp_path: Path) -> None:
    split = pl.Series("part", ["train"] * len(TABLE)).set(TABLE["tier"] == "mid", "test")
    TABLE.with_columns(split).write_csv(tmp_path / "a.csv")
    refused(tmp_path, tmp_path / "a.csv", "data.split_column=part", culprits=("a.csv", "'mid'", "training"))


def test_a_split_without_training_rows_is_named(tmp_path: Path) -> None:
    TABLE.with_columns(part=pl.lit("test")).write_csv(tmp_path / "a.csv")
    refused(tmp_path, tmp_path / "a.csv", "data.split_column=part", culprits=("a.csv", "0 training rows"))


@pytest.mark.parametrize(("cell", "shown"), [("holdout", "'holdout'"), ("", "None")])
def test_an_unknown_split_is_named_by_row(cell: str, shown: str, tmp_path: Path) -> None:
    words = ["train"] * 10 + [cell] + ["test"] * (len(TABLE) - 11)
    TABLE.with_columns(pl.Series("part", words)).write_csv(tmp_path / "a.csv")
    refused(tmp_path, tmp_path / "a.csv", "data.split_column=part", culprits=("a.csv", "'part'", "data row 11", shown))


@pytest.mark.parametrize(
    ("part", "shown"), [(pl.lit(0.5), "Float64"), (pl.date(2020, 1, 1), "Date"), (pl.concat_list("purpose"), "List")]
)
def test_a_split_column_of_another_type_is_named(part: pl.Expr, shown: str, tmp_path: Path) -> None:
    TABLE.with_columns(part=part).write_parquet(tmp_path / "a.parquet")
    culprits = ("a.parquet", "'part'", shown)
    refused(tmp_path, tmp_path / "a.parquet", "data.split_column=part", culprits=culprits)


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path: Path, csv: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/nowhere"):
        before = contents(tmp_path)
        outcome = command("train", *run_arguments(Path(run_dir) / "r", csv))
        assert_one_message(outcome, run_dir)
        assert contents(tmp_path) == before
    refused(tmp_path, csv, f"run.dir={tmp_path}", "run.name=file", culprits=("file",))


ENVIRONMENTS = {
    "RANK without the others": ({"RANK": "0"}, ("RANK", "WORLD_SIZE", "MASTER_ADDR", "missing")),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}, ("MASTER_ADDR",)),
    "rank beyond the world": (
        {"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        ("WORLD_SIZE",),
    ),
    "rank in words": (
        {"RANK": "first", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        ("RANK='first'",),
    ),
    "half a Slurm step": ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, ("SLURM_LOCALID", "missing")),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_half_set_environment_is_named(name: str, tmp_path: Path, csv: Path) -> None:
    environ, culprits = ENVIRONMENTS[name]
    refused(tmp_path, csv, culprits=culprits, **environ)


def test_unknown_options_are_refused_as_every_command_refuses_them(tmp_path: Path, csv: Path) -> None:
    for script, *arguments in (
        ("train", csv, "--dryrun"),
        ("evaluate",),
        ("predict", "runs/r"),
        ("evaluate", "r", "--x"),
    ):
        outcome = command(script, *arguments)
        assert outcome.code == 2
        assert f"launch/{script}.py: error: " in outcome.err
        assert "Traceback" not in outcome.err
    assert contents(tmp_path).keys() == {"clients.csv"}


# What evaluate and predict refuse. RUN, DATA and OUT stand for a trained run, its table and the folder of the test.
LATER_MISTAKES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "evaluate: no folder": ("evaluate", ("OUT/nowhere",), ("nowhere", "is not a run folder")),
    "evaluate: another folder": ("evaluate", ("OUT",), ("is not a run folder",)),
    "evaluate: a file": ("evaluate", ("DATA",), ("clients.csv", "is not a run folder")),
    "evaluate: split": ("evaluate", ("RUN", "--split", "holdout"), ("--split", "holdout")),
    "evaluate: checkpoint": ("evaluate", ("RUN", "--checkpoint", "newest"), ("--checkpoint", "newest")),
    "evaluate: step": ("evaluate", ("RUN", "--checkpoint", "12345"), ("12345",)),
    "evaluate: negative step": ("evaluate", ("RUN", "--checkpoint", "-1"), ("--checkpoint",)),
    "evaluate: no file": ("evaluate", ("RUN", "--data", "OUT/nowhere.csv"), ("nowhere.csv", "no such file")),
    "evaluate: a folder for data": ("evaluate", ("RUN", "--data", "OUT"), ("directory",)),
    "evaluate: class": ("evaluate", ("RUN", "--data", "OUT/class.csv"), ("class.csv", "'tier'", "data row 2", "'top'")),
    "evaluate: no target": ("evaluate", ("RUN", "--data", "OUT/no_target.csv"), ("no_target.csv", "'tier'")),
    "evaluate: no feature": ("evaluate", ("RUN", "--data", "OUT/no_age.csv"), ("no_age.csv", "'age'")),
    "evaluate: no rows": ("evaluate", ("RUN", "--data", "OUT/no_rows.csv"), ("no_rows.csv", "no rows")),
    "predict: no folder": ("predict", ("OUT/nowhere", "DATA", "OUT/o.csv"), ("nowhere", "is not a run folder")),
    "predict: no file": ("predict", ("RUN", "OUT/nowhere.csv", "OUT/o.csv"), ("nowhere.csv", "no such file")),
    "predict: a folder for data": ("predict", ("RUN", "OUT", "OUT/o.csv"), ("directory",)),
    "predict: no feature": ("predict", ("RUN", "OUT/no_age.csv", "OUT/o.csv"), ("no_age.csv", "'age'")),
    "predict: text": ("predict", ("RUN", "OUT/text.csv", "OUT/o.csv"), ("text.csv", "'age'", "data row 2", "'old'")),
    "predict: list": ("predict", ("RUN", "OUT/list.parquet", "OUT/o.csv"), ("list.parquet", "'purpose'")),
    "predict: dates": ("predict", ("RUN", "OUT/dates.parquet", "OUT/o.csv"), ("dates.parquet", "'age'", "Date")),
    "predict: infinite": ("predict", ("RUN", "OUT/inf.csv", "OUT/o.csv"), ("inf.csv", "'age'", "data row 2", "inf")),
    "predict: ragged": ("predict", ("RUN", "OUT/ragged.csv", "OUT/o.csv"), ("ragged.csv", "#3", "got 6")),
    "predict: suffix": ("predict", ("RUN", "DATA", "OUT/o.xlsx"), ("o.xlsx", ".csv or .parquet")),
    "predict: input suffix": ("predict", ("RUN", "OUT/run.yaml", "OUT/o.csv"), ("run.yaml", ".csv, .tsv, .jsonl")),
    "predict: below a file": ("predict", ("RUN", "DATA", "OUT/class.csv/o.csv"), ("o.csv", "Not a directory")),
    "predict: no such folder": ("predict", ("RUN", "DATA", "OUT/no/o.parquet"), ("o.parquet", "No such file")),
    "predict: onto a folder": ("predict", ("RUN", "DATA", "OUT/folder.csv"), ("folder.csv", "Is a directory")),
    "predict: checkpoint": ("predict", ("RUN", "DATA", "OUT/o.csv", "--checkpoint", "7"), ("step 7",)),
}


@pytest.mark.parametrize("name", LATER_MISTAKES)
def test_a_mistake_with_a_trained_run_is_named(name: str, trained: Trained, tmp_path: Path) -> None:
    script, arguments, culprits = LATER_MISTAKES[name]
    age = pl.when(pl.int_range(pl.len()) != 1).then("age")
    TABLE.with_columns(tier=pl.when(pl.int_range(pl.len()) == 1).then(pl.lit("top")).otherwise("tier")).write_csv(
        tmp_path / "class.csv"
    )
    TABLE.drop("tier").write_csv(tmp_path / "no_target.csv")
    TABLE.drop("age").write_csv(tmp_path / "no_age.csv")
    TABLE.clear().write_csv(tmp_path / "no_rows.csv")
    TABLE.with_columns(age=age.cast(pl.String).fill_null("old")).write_csv(tmp_path / "text.csv")
    TABLE.with_columns(age=age.cast(pl.String).fill_null("inf")).write_csv(tmp_path / "inf.csv")
    TABLE.with_columns(age=pl.date(2020, 1, 1)).write_parquet(tmp_path / "dates.parquet")
    TABLE.with_columns(purpose=pl.concat_list("purpose")).write_parquet(tmp_path / "list.parquet")
    (tmp_path / "ragged.csv").write_text("\n".join([*CSV_LINES[:2], CSV_LINES[2] + ",more", *CSV_LINES[3:]]))
    (tmp_path / "run.yaml").write_text("")
    (tmp_path / "folder.csv").mkdir()
    places = {"RUN": trained.folder, "DATA": trained.csv, "OUT": tmp_path}
    before = contents(tmp_path), contents(trained.folder)

    filled = [str(places[a.split("/")[0]]) + a.removeprefix(a.split("/")[0]) if a.split("/")[0] in places else a
              for a in arguments]  # fmt: skip
    assert_one_message(command(script, *filled), *culprits)
    assert (contents(tmp_path), contents(trained.folder)) == before


def test_a_mistake_leaves_an_older_run_as_it_was(trained: Trained) -> None:
    before = contents(trained.folder) | {"lock": None}  # it says who was here last
    for mistake, culprit in {
        "optim.lr=nan": "optim.lr",
        "data.target=risk": "clients.csv",
        "train.class_weights={low: 1}": "train.class_weights",
        "run.seed=8": "run.seed",
        "data.path=no.csv": "no.csv",
    }.items():
        assert_one_message(command("train", *run_arguments(trained.folder, trained.csv), mistake), culprit)
        assert contents(trained.folder) | {"lock": None} == before


@pytest.mark.parametrize(
    ("arguments", "culprits"),
    [
        (("optim.lrr=1", "model.dropout=1.5"), ("optim.lrr", "model.dropout")),
        (("configs/nowhere.yaml",), ("configs/nowhere.yaml",)),
    ],
)
def test_a_real_process_ends_with_exit_code_2(
    arguments: tuple[str, ...], culprits: tuple[str, ...], tmp_path: Path
) -> None:
    done = commands.run("train", f"run.dir={tmp_path}", *arguments)
    assert_one_message(CommandResult(done.returncode, done.stdout, done.stderr), *culprits)
    assert not contents(tmp_path)


@pytest.mark.parametrize("mistake", ["configuration", "run folder"])
def test_two_ranks_say_the_same(mistake: str, tmp_path: Path, csv: Path) -> None:
    (tmp_path / "file").write_text("")
    more, culprit = {
        "configuration": ("train.epochs=0", "train.epochs"),
        "run folder": (f"run.dir={tmp_path / 'file'}", "file/r"),
    }[mistake]
    before = contents(tmp_path)
    outcomes = command_on_ranks(2, "train", *run_arguments(tmp_path / "runs" / "r", csv), more)
    for outcome in outcomes:  # torchrun ends the second rank before it says it too
        assert_one_message(outcome, culprit)
    assert outcomes[0].err == outcomes[1].err
    assert contents(tmp_path) == before


def test_under_torchrun_it_is_said_once_and_first(tmp_path: Path, csv: Path) -> None:
    before = contents(tmp_path)
    done = commands.run("train", *run_arguments(tmp_path / "runs" / "r", csv), "data.path=no.parquet", ranks=2)
    # torchrun has its own exit code, and its own report after ours.
    assert done.returncode != 0
    assert done.stderr.startswith("error: "), done.stderr
    assert "no.parquet" in done.stderr.splitlines()[0]
    said, _, report = done.stderr.partition("torch.distributed.elastic")
    assert said.count("no.parquet") == 1, done.stderr
    assert report.rpartition("Root Cause")[2].count("no.parquet") == 1, done.stderr  # the last thing that is seen
    assert "dist_train/" not in done.stderr, done.stderr
    assert contents(tmp_path) == before
