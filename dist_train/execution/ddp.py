"""The fast mode on several ranks: torch's DistributedDataParallel."""

from __future__ import annotations

import inspect

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.execution.base import Inputs
from dist_train.execution.flat_parameters import ParameterLayout
from dist_train.execution.reducers import DDPReducer
from dist_train.execution.single import SingleExecution
from dist_train.training.protocols import GradientReducer


class DDPExecution(SingleExecution):
    """Each rank has a replica, whose gradients are averaged in the backward pass."""

    name = "ddp"

    def reduce(
        self, model: nn.Module, parameters: ParameterLayout, sample: Inputs
    ) -> tuple[nn.Module, GradientReducer]:
        """The replica, with the gradients laid out as they will stay."""
        # Buffers need no broadcast: synchronised BatchNorm leaves the same statistics on every rank.
        # The argument's name changed between torch 2.11 and 2.13.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True, **{buffers: False})  # type: ignore[arg-type]
        self._settle_buckets(replica, tuple(x[:1] for x in sample))
        return replica, DDPReducer(replica, self.context, parameters, self.collectives)

    def _settle_buckets(self, replica: nn.Module, sample: Inputs) -> None:
        """Have the gradients laid out as they will stay, before the first step.

        DistributedDataParallel lays its buckets out anew after its first backward pass, and gradients are in them after
        the second. Where a gradient lies in a bucket decides in which order more than two ranks are summed: without
        this a resumed run's first step would be summed in another order than that of a run that was never interrupted.
        """
        replica.eval()  # neither statistics nor dropout
        for _ in range(2):
            replica(*sample).sum().backward()
        replica.train()
