"""A prepared table: what it holds is what the table in memory holds, on any number of ranks; and no damage passes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from dist_train.config.load import load_config
from dist_train.data.dataset import Dataset, load_dataset
from dist_train.data.sampler import MicroBatchIndices
from dist_train.data.sources import MappedRows
from dist_train.data.splits.split import SPLITS
from dist_train.data.stores.store import MANIFEST, Store, _inputs_of_format_1, pack_manifest
from dist_train.determinism.batch_context import BatchContext
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.models.embeddings import TabularInputs
from tests.cli.in_process import contents
from tests.data.stores import ARGUMENTS, prepare_on_rank, table, write_parts
from tests.ranks import on_ranks

ALONE = Collectives(World())
CPU = torch.device("cpu")


def load(path: Path, arguments: list[str]) -> Dataset:
    config = load_config([*ARGUMENTS, *arguments, f"data.path={path}"])
    return load_dataset(config.data, ALONE, seed=config.run.seed, dtype=torch.float32)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of several blocks. Read only."""
    folder = tmp_path_factory.mktemp("sound")
    prepare_on_rank(ALONE, write_parts(table(), folder / "files"), folder / "store", ["data.split_column=part"])
    return folder / "store"


@pytest.mark.parametrize(
    "arguments",
    [
        ["data.split_column=part"],
        ["data.drop=[client,part]", "run.seed=11"],
        ["data.drop=[client,part]", "data.max_categories=2", "data.validation_fraction=0", "data.test_fraction=0.3"],
    ],
    ids=["split column", "fractions", "few categories"],
)
def test_a_store_of_many_files_holds_what_one_file_gives_in_memory(arguments: list[str], tmp_path: Path) -> None:
    frame = table()
    frame.write_csv(tmp_path / "whole.csv")
    prepare_on_rank(ALONE, write_parts(frame, tmp_path / "files"), tmp_path / "store", arguments)
    memory, store = load(tmp_path / "whole.csv", arguments), load(tmp_path / "store", arguments)
    assert memory.spec == store.spec
    assert "branch" in [column.name for column in store.spec.categorical]
    for split in SPLITS:
        ours, theirs = store.splits[split], memory.splits[split]
        assert len(ours) == len(theirs)
        index = torch.randperm(len(ours), generator=torch.Generator().manual_seed(1))[:50]
        share = MicroBatchIndices(index, (20, len(index) - 20), epoch=3, first_row=9, global_rows=100)
        batch, expected = ours.gather(share), theirs.gather(share)
        assert batch.context == expected.context == BatchContext(3, 9, share.slices)
        assert torch.equal(batch.rows, expected.rows)
        assert torch.equal(batch.targets, expected.targets)
        assert torch.equal(ours.targets, theirs.targets)
        pairs = [
            *zip(batch.inputs, expected.inputs, strict=True),
            *zip(ours.slice(1, 9), theirs.slice(1, 9), strict=True),
        ]
        for got, wanted in pairs:
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("arguments", [["data.split_column=part"], ["data.drop=[client,part]"]], ids=["column", "hash"])
def test_its_bytes_are_the_same_for_any_number_of_ranks(world_size: int, arguments: list[str], tmp_path: Path) -> None:
    files = write_parts(table(), tmp_path / "files")
    prepare_on_rank(ALONE, files, tmp_path / "one", arguments)
    on_ranks(world_size, prepare_on_rank, files, tmp_path / "several", arguments)
    assert contents(tmp_path / "several") == contents(tmp_path / "one")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["files", "one", "several"]


def test_one_block_or_many_hold_the_same_rows(sound: Path, tmp_path: Path) -> None:
    files = write_parts(table(), tmp_path / "files")
    prepare_on_rank(ALONE, files, tmp_path / "store", ["data.split_column=part"], block_rows=4096)
    assert len(Store(tmp_path / "store").files["train.numeric"].blocks) == 1
    assert len(Store(sound).files["train.numeric"].blocks) > 5
    one, many = contents(tmp_path / "store"), contents(sound)
    assert {n: b for n, b in one.items() if n != MANIFEST} == {n: b for n, b in many.items() if n != MANIFEST}


def test_features_become_what_the_precision_asks_for(sound: Path) -> None:
    store = Store(sound)
    rows = MappedRows(store.tensors("train"), store.to_inputs, CPU, torch.float64)
    share = MicroBatchIndices(torch.tensor([5, 0]), (2,), 0, 0, 2)
    assert rows.gather(share).inputs[0].dtype == torch.float64
    assert rows.slice(0, 3)[0].dtype == torch.float64
    assert not rows.on_device


def copied(sound: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in sound.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def verify(folder: Path) -> None:
    Store(folder).verify(SPLITS, ALONE)


def test_a_flipped_bit_anywhere_is_named_by_file_and_block(sound: Path, tmp_path: Path) -> None:
    verify(sound)
    store = Store(sound)
    folder = copied(sound, tmp_path / "store")
    for name, file in store.files.items():
        whole = bytearray((sound / name).read_bytes())
        for block in {0, len(file.blocks) - 1}:
            place = block * store.block_rows * file.row_bytes + 3
            whole[place] ^= 1
            (folder / name).write_bytes(whole)
            whole[place] ^= 1
            with pytest.raises(UserError, match=f"{re.escape(name)}: block {block} .* is damaged"):
                verify(folder)
        (folder / name).write_bytes(whole)
    verify(folder)


def _verify_on_rank(collectives: Collectives, folder: Path) -> str:
    try:
        Store(folder).verify(SPLITS, collectives)
    except UserError as error:
        return str(error)
    return "sound"


def test_ranks_share_the_check_and_all_hear_of_damage(sound: Path, tmp_path: Path) -> None:
    folder = copied(sound, tmp_path / "store")
    assert on_ranks(2, _verify_on_rank, folder) == ["sound", "sound"]
    data = bytearray((folder / "valid.targets").read_bytes())
    data[-1] ^= 1
    (folder / "valid.targets").write_bytes(data)
    first, second = on_ranks(2, _verify_on_rank, folder)
    assert first == second
    assert "valid.targets: block" in first


def test_a_file_that_is_short_or_gone_is_named_at_once(sound: Path, tmp_path: Path) -> None:
    for name in Store(sound).files:
        folder = copied(sound, tmp_path / name)
        (folder / name).write_bytes((sound / name).read_bytes()[:-1])
        with pytest.raises(UserError, match=f"{re.escape(name)}: has .* bytes instead of"):
            Store(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"{re.escape(name)}: cannot be read"):
            Store(folder)


def test_no_change_of_the_manifest_passes(sound: Path, tmp_path: Path) -> None:
    folder = copied(sound, tmp_path / "store")
    whole = (sound / MANIFEST).read_bytes()
    for place in range(0, len(whole), 97):
        data = bytearray(whole)
        data[place] ^= 2
        (folder / MANIFEST).write_bytes(data)
        with pytest.raises(UserError, match=MANIFEST):
            Store(folder)
    for split_evenly in (0, len(whole) // 2):
        (folder / MANIFEST).write_bytes(whole[:split_evenly])
        with pytest.raises(UserError, match=f"{re.escape(MANIFEST)}: cannot be read"):
            Store(folder)


def test_a_model_of_another_encoder_is_refused(sound: Path, tmp_path: Path) -> None:
    table().with_columns(pl.col("age") * 3).write_csv(tmp_path / "other.csv")
    other = load(tmp_path / "other.csv", ["data.split_column=part"]).spec
    config = load_config([*ARGUMENTS, "data.split_column=part", f"data.path={sound}"])
    with pytest.raises(UserError, match="was encoded by another encoder"):
        load_dataset(config.data, ALONE, seed=0, dtype=torch.float32, spec=other)
    same = Store(sound).spec
    loaded = load_dataset(config.data, ALONE, seed=0, dtype=torch.float32, spec=same)
    assert loaded.sha256 == Store(sound).sha256


@pytest.mark.parametrize(
    ("argument", "culprit"),
    [
        ("data.target=branch", "data.target is 'branch', the store has 'tier'"),
        ("data.drop=[client,age]", "data.drop"),
        ("data.split_column=null", "data.split_column"),
        ("data.max_categories=3", "data.max_categories"),
    ],
)
def test_a_configuration_that_asks_for_other_data_is_refused(sound: Path, argument: str, culprit: str) -> None:
    with pytest.raises(UserError, match=re.escape(culprit)):
        load(sound, ["data.split_column=part", argument])


def test_what_does_not_matter_to_the_data_may_differ(sound: Path) -> None:
    found = load(
        sound,
        [
            "data.split_column=part",
            "data.test_fraction=0.4",
            "run.seed=8",
            "data.categorical=[code]",
            "model.embedding_dim=4",
        ],
    )
    assert found.spec == load(sound, ["data.split_column=part"]).spec


def test_a_store_of_a_later_format_is_refused_in_one_line(sound: Path, tmp_path: Path) -> None:
    folder = copied(sound, tmp_path / "store")
    content = json.loads((folder / MANIFEST).read_text())
    del content["sha256"], content["data_sha256"]
    (folder / MANIFEST).write_bytes(pack_manifest(content | {"format": 4}))
    with pytest.raises(UserError, match=r"manifest\.json: is of format 4, this program reads up to 3: ") as refused:
        Store(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("embedded", [False, True], ids=["one-hot", "codes"])
def test_a_store_of_format_1_gives_the_inputs_of_format_2(sound: Path, embedded: bool) -> None:
    """Its dense features, made as they were then, come back as numbers, flags and the codes that give them."""
    store = Store(sound)
    unseen = replace(
        store.spec.categorical[0], seen_in_training=(False, *store.spec.categorical[0].seen_in_training[1:])
    )
    spec = replace(store.spec, categorical=(unseen, *store.spec.categorical[1:]))
    inputs = store.to_inputs(store.tensors("train"))
    dense = TabularInputs(spec, one_hot=not embedded)(*inputs)
    tensors = {"features": dense} | ({"slots": inputs.codes.to(torch.int32)} if embedded else {})
    found = _inputs_of_format_1(tensors, spec)
    assert torch.equal(found.numeric, inputs.numeric)
    assert torch.equal(found.flags, inputs.flags)
    assert torch.equal(TabularInputs(spec)(*found), TabularInputs(spec)(*inputs))
