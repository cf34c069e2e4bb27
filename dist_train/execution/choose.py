"""Which execution computes the steps of a job."""

from __future__ import annotations

from dist_train.config.schema import TrainConfig
from dist_train.determinism.batch_context import ModelContext
from dist_train.distributed.collectives import Collectives
from dist_train.execution.base import Execution
from dist_train.execution.ddp import DDPExecution
from dist_train.execution.exact import ExactExecution
from dist_train.execution.recorded import RecordedExecution
from dist_train.execution.recorder import CudaRecorder
from dist_train.execution.single import SingleExecution

# Compiling whole steps takes some seconds, once on a machine: a short run would not get them back.
COMPILED_FROM_STEPS = 2000


def choose_execution(
    train: TrainConfig, collectives: Collectives, *, seed: int, rows_on_device: bool, total_steps: int = 0
) -> Execution:
    """The execution of a configuration in a world; `seed` keys its random numbers.

    `train.virtual_ranks` asks for the exact mode. Without it one rank is single, and several are ddp. A step of any of
    them is recorded where all of it runs on the GPU (`rows_on_device`: its rows too) and the host is asked for nothing.
    On the CPU one rank's steps are compiled where a run is of COMPILED_FROM_STEPS or more.
    """
    context = ModelContext(seed)
    if train.virtual_ranks is not None:
        chosen: SingleExecution = ExactExecution(collectives, context, train.virtual_ranks)
    elif collectives.size > 1:
        chosen = DDPExecution(collectives, context)
    else:
        compiles = collectives.device.type == "cpu" and total_steps >= COMPILED_FROM_STEPS
        chosen = SingleExecution(collectives, context, compiles=compiles)
    if collectives.runs_on_device and rows_on_device and train.accumulation_steps == 1:
        return RecordedExecution(chosen, CudaRecorder())
    return chosen
