"""The data of a run as a whole: what is fitted on which rows, and that every rank holds the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from dist_train.config.schema import DataConfig
from dist_train.data.dataset import Dataset, encoded_rows, load_dataset, read_for_evaluation, read_labelled
from dist_train.data.sources import ResidentRows
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from tests.ranks import on_ranks


def table(num_rows: int = 200) -> pl.DataFrame:
    random = np.random.default_rng(5)
    return pl.DataFrame(
        {
            "income": pl.Series(np.exp(random.normal(8, 2, num_rows))).set(
                pl.Series(random.random(num_rows) < 0.1), None
            ),
            "purpose": random.choice(["car", "house", "boat"], num_rows).tolist(),
            "client": range(num_rows),
            "tier": random.choice(["low", "high"], num_rows).tolist(),
            "part": random.choice(["train", "val", "test"], num_rows, p=[0.6, 0.2, 0.2]).tolist(),
        }
    )


def config(path: Path) -> DataConfig:
    return DataConfig(path=str(path), target="tier", drop=["client"], split_column="part")


def load(path: Path, collectives: Collectives | None = None, **more: object) -> Dataset:
    data = DataConfig(**(vars(config(path)) | more))  # type: ignore[arg-type]
    return load_dataset(data, collectives or Collectives(World()), seed=3, dtype=torch.float32)


def image(dataset: Dataset) -> dict[str, list[bytes]]:
    """Everything that a run learns from, to the bit."""
    tensors = {name: [t.numpy().tobytes() for t in (*rows.inputs, rows.targets, rows.row_numbers)]
               for name, rows in dataset.splits.items()}  # fmt: skip
    return tensors | {"spec": [json.dumps(dataset.spec.to_json()).encode()]}


def image_on_rank(collectives: Collectives, path: Path) -> dict[str, list[bytes]]:
    return image(load(path, collectives))


def test_csv_and_parquet_give_the_same_data(tmp_path: Path) -> None:
    table().write_csv(tmp_path / "t.csv")
    table().write_parquet(tmp_path / "t.parquet")
    assert image(load(tmp_path / "t.csv")) == image(load(tmp_path / "t.parquet"))


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_of_every_world_holds_the_same_data(world_size: int, tmp_path: Path) -> None:
    table().write_csv(tmp_path / "t.csv")
    assert on_ranks(world_size, image_on_rank, tmp_path / "t.csv") == [image(load(tmp_path / "t.csv"))] * world_size


def test_rows_beyond_the_training_rows_have_no_say_in_the_encoder(tmp_path: Path) -> None:
    frame = table()
    others = pl.col("part") != "train"
    changed = frame.with_columns(
        income=pl.when(others).then(pl.lit(1e30)).otherwise("income"),
        purpose=pl.when(others).then(pl.lit("yacht")).otherwise("purpose"),
    )
    frame.write_csv(tmp_path / "a.csv")
    changed.write_csv(tmp_path / "b.csv")
    first, second = load(tmp_path / "a.csv"), load(tmp_path / "b.csv")
    assert first.spec == second.spec
    assert image(first)["train"] == image(second)["train"]
    assert image(first)["test"] != image(second)["test"]
    in_training = frame.with_columns(income=pl.when(~others).then(pl.col("income") * 2).otherwise("income"))
    in_training.write_csv(tmp_path / "c.csv")
    assert load(tmp_path / "c.csv").spec != first.spec


def test_the_target_dropped_columns_and_the_split_are_no_features(tmp_path: Path) -> None:
    table().write_csv(tmp_path / "t.csv")
    spec = load(tmp_path / "t.csv").spec
    assert [column.name for column in spec.numeric] == ["income"]
    assert [column.name for column in spec.categorical] == ["purpose"]


def test_each_row_is_in_the_split_that_the_column_says_with_its_own_class(tmp_path: Path) -> None:
    frame = table()
    frame.write_csv(tmp_path / "t.csv")
    dataset = load(tmp_path / "t.csv")
    for name, word in (("train", "train"), ("valid", "val"), ("test", "test")):
        rows = dataset.splits[name]
        assert rows.row_numbers.tolist() == [i for i, part in enumerate(frame["part"]) if part == word]
        names = [dataset.spec.class_names[i] for i in rows.targets.tolist()]
        assert names == frame["tier"][rows.row_numbers.numpy()].to_list()


CLASSES: dict[str, tuple[pl.Series, list[str]]] = {
    "text in the order of the alphabet": (pl.Series(["low", "high", "mid"]), ["high", "low", "mid"]),
    "integers in the order of numbers": (pl.Series([10, 9, -1]), ["-1", "9", "10"]),
    "whole floats": (pl.Series([10.0, 9.0, 0.0]), ["0", "9", "10"]),
    "booleans": (pl.Series([True, False, True]), ["false", "true"]),
    "minus signs alone": (pl.Series(["--1", "-1", "1"]), ["--1", "-1", "1"]),
    "numbers too long for integers": (pl.Series(["1" * 5000, "2", "3"]), ["1" * 5000, "2", "3"]),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_keep_their_names(name: str, tmp_path: Path) -> None:
    cells, names = CLASSES[name]
    frame = pl.DataFrame({"x": range(12), "tier": pl.concat([cells] * 4)})
    frame.write_csv(tmp_path / "t.csv")
    frame.write_parquet(tmp_path / "t.parquet")
    for file in ("t.csv", "t.parquet"):
        labelled = read_labelled(DataConfig(path=str(tmp_path / file), target="tier"))
        assert labelled.class_names == names


def test_a_bad_cell_is_named_by_its_row_in_the_file_whichever_rows_train(tmp_path: Path) -> None:
    frame = table()
    row = frame["part"].to_list().index("train", 50)
    frame.with_columns(income=pl.when(pl.int_range(pl.len()) == row).then(pl.lit(1e39)).otherwise("income")).write_csv(
        tmp_path / "t.csv"
    )
    with pytest.raises(UserError, match=f"t.csv: column 'income', data row {row + 1}: "):
        load(tmp_path / "t.csv")


def evaluated(file: Path, trained_on: Path, split: str) -> ResidentRows:
    spec = load(trained_on).spec
    read, chosen = read_for_evaluation(file, config(trained_on), spec, split)
    return encoded_rows(read, chosen, spec, [split], torch.device("cpu"), torch.float32)[split]


def test_another_file_is_evaluated_on_the_rows_of_the_split_or_on_all(tmp_path: Path) -> None:
    frame = table()
    frame.write_csv(tmp_path / "t.csv")
    frame.drop("part").write_csv(tmp_path / "all.csv")
    rows = evaluated(tmp_path / "t.csv", tmp_path / "t.csv", "valid")
    assert rows.row_numbers.tolist() == [i for i, part in enumerate(frame["part"]) if part == "val"]
    assert [["high", "low"][i] for i in rows.targets.tolist()] == frame["tier"][rows.row_numbers.numpy()].to_list()
    assert len(evaluated(tmp_path / "all.csv", tmp_path / "t.csv", "valid")) == frame.height


def test_a_file_without_all_classes_is_evaluated_in_the_order_of_the_model(tmp_path: Path) -> None:
    table().write_csv(tmp_path / "t.csv")
    table().filter(pl.col("tier") == "low").write_csv(tmp_path / "low.csv")
    targets = evaluated(tmp_path / "low.csv", tmp_path / "t.csv", "test").targets
    assert len(targets)
    assert (targets == 1).all()


def test_an_encoder_that_is_given_is_not_fitted_again(tmp_path: Path) -> None:
    table().write_csv(tmp_path / "a.csv")
    table().with_columns(income=pl.col("income") * 3).write_csv(tmp_path / "b.csv")
    first = load(tmp_path / "a.csv").spec
    data = config(tmp_path / "b.csv")
    again = load_dataset(data, Collectives(World()), seed=3, dtype=torch.float32, spec=first)
    assert again.spec is first
    assert not torch.equal(again.splits["train"].inputs[0], load(tmp_path / "a.csv").splits["train"].inputs[0])


def _mistake_on_rank(collectives: Collectives, folder: Path) -> str:
    # As on two machines, one of which has not got the file.
    path = folder / ("t.csv" if collectives.rank == 0 else "nowhere.csv")
    try:
        load(path, collectives)
    except UserError as error:
        return str(error)
    return "loaded"


def test_a_file_that_one_rank_cannot_find_stops_all_with_the_same_message(tmp_path: Path) -> None:
    table().write_csv(tmp_path / "t.csv")
    messages = on_ranks(2, _mistake_on_rank, tmp_path)
    assert messages == [f"{tmp_path / 'nowhere.csv'}: no such file"] * 2


@pytest.mark.parametrize("dropped", ["purpose", "income"])
def test_a_table_of_numbers_alone_and_one_of_categories_alone(tmp_path: Path, dropped: str) -> None:
    table().write_csv(tmp_path / "t.csv")
    both = load(tmp_path / "t.csv")
    one = load(tmp_path / "t.csv", drop=["client", dropped])
    kept = (0, 1) if dropped == "purpose" else (2,)  # income and its flag, or the codes of purpose
    for part, (of_one, of_both) in enumerate(zip(one.splits["train"].inputs, both.splits["train"].inputs, strict=True)):
        assert torch.equal(of_one, of_both if part in kept else of_both[:, :0])


def test_a_table_of_several_batches_is_split_and_encoded(tmp_path: Path) -> None:
    """Each batch is released once it is encoded, while later ones are still to be split."""
    rows = 150_000
    frame = pl.DataFrame({"x": np.arange(rows) % 97, "y": np.where(np.arange(rows) % 3 > 0, "bad", "good")})
    frame.write_parquet(tmp_path / "t.parquet")
    data = DataConfig(path=str(tmp_path / "t.parquet"), target="y")
    loaded = load_dataset(data, Collectives(World()), seed=0, dtype=torch.float32)
    assert sum(len(split.targets) for split in loaded.splits.values()) == rows
