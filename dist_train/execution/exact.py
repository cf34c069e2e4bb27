"""The exact mode: arithmetic on V fixed slices of the batch, the same bits on every world size that divides V."""

from __future__ import annotations

from torch import nn

from dist_train.accel import accelerate
from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.batch_norm import zero_grad_of_biases_before_batchnorm
from dist_train.determinism.dropout import convert_dropout
from dist_train.determinism.own_operations import check_own_operations
from dist_train.determinism.sliced_modules import check_row_wise, convert_virtual_ranks
from dist_train.distributed.collectives import Collectives
from dist_train.execution.base import Inputs
from dist_train.execution.single import SingleExecution


class ExactExecution(SingleExecution):
    """A rank computes a contiguous run of the slices; what crosses slices is added up in one fixed order."""

    def __init__(self, collectives: Collectives, context: ModelContext, virtual_ranks: int) -> None:
        super().__init__(collectives, context, virtual_ranks // collectives.size)
        self.name = f"exact, {virtual_ranks} virtual ranks"

    def prepare(self, model: nn.Module, sample: Inputs, name: str) -> nn.Module:
        """Every module computes slice by slice.

        Raises:
            UnknownModuleError: a module, or what a container computes between its modules, cannot be.
        """
        model = convert_virtual_ranks(convert_dropout(model, self.context), self.context, self.collectives)
        check_row_wise(model, sample, name)
        check_own_operations(model, sample, name)
        model = accelerate(model, self.context, self.collectives.device)
        return zero_grad_of_biases_before_batchnorm(model)
