"""Layers that are computed again in the backward pass: the same gradients, and less memory in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_train.determinism.batch_context import BatchContext, ModelContext
from dist_train.determinism.dropout import convert_dropout
from dist_train.determinism.recompute import recompute_layers
from dist_train.determinism.sliced_modules import convert_virtual_ranks
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import UserError
from dist_train.execution.flat_parameters import FlatParameters
from dist_train.execution.reducers import SliceReducer
from tests.models.tiny_bert import write_texts, write_tiny_bert
from tests.resume.jobs import finish
from tests.tasks.text_jobs import needs_text_libraries, text_job


class Layers(nn.Module):
    row_wise = True

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 8)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def gradients(*, again: bool, slices: int) -> tuple[Tensor, int]:
    """Flat gradients, and the numbers that were kept for the backward pass outside of the layers' own graphs."""
    torch.manual_seed(0)
    context, collectives = ModelContext(3), Collectives(World())
    model = Layers()
    if again:
        recompute_layers(model, context, "layers")
    prepared: nn.Module = convert_dropout(model, context)
    if slices > 1:
        prepared = convert_virtual_ranks(prepared, context, collectives)
    reducer = SliceReducer(context, slices, FlatParameters(prepared.parameters()), collectives)
    reducer.begin(torch.zeros(slices, 3, dtype=torch.float64))
    kept = [0]

    def keep(tensor: Tensor) -> Tensor:
        kept[0] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with context.bound(BatchContext(slices=(16,) * slices)):
            output = prepared(torch.randn(16 * slices, 8))
        reducer.backward(output.square().sum(1))
    return reducer.finish()[1].clone(), kept[0]


@pytest.mark.parametrize("slices", [1, 2])
def test_gradients_are_the_same_bits_with_dropout(slices: int) -> None:
    (ours, _), (theirs, _) = (gradients(again=again, slices=slices) for again in (True, False))
    assert ours.abs().sum() > 0
    assert torch.equal(ours, theirs)


def test_less_is_kept() -> None:
    assert gradients(again=True, slices=1)[1] < 0.5 * gradients(again=False, slices=1)[1]


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.gradient_checkpointing: mlp has no nn\.ModuleList"):
        recompute_layers(nn.Sequential(nn.Linear(2, 2)), ModelContext(), "mlp")


@needs_text_libraries
@pytest.mark.parametrize("more", [(), ("train.virtual_ranks=2",)], ids=["fast", "exact"])
def test_a_transformer_trains_to_the_same_bits(more: tuple[str, ...], tmp_path: Path) -> None:
    place = write_tiny_bert(tmp_path / "bert"), write_texts(tmp_path / "texts.csv", 60)
    more = (*more, "train.max_steps=3", "model.transformer.tuning=full")
    plain, again = (
        finish(text_job(*place, tmp_path / name, *more, f"train.gradient_checkpointing={name}"))
        for name in ("false", "true")
    )
    assert plain == again
