"""Which execution computes the steps of a job."""

from __future__ import annotations

from dist_train.config.schema import TrainConfig
from dist_train.determinism.arithmetic import Arithmetic
from dist_train.determinism.batch_context import ModelContext
from dist_train.distributed.collectives import Collectives
from dist_train.execution.base import Execution
from dist_train.execution.ddp import DDPExecution
from dist_train.execution.exact import ExactExecution
from dist_train.execution.recorded import GpuExecution
from dist_train.execution.recorder import CudaRecorder
from dist_train.execution.single import SingleExecution

# Compiling whole steps takes some seconds, once on a machine: a short run would not get them back.
COMPILED_FROM_STEPS = 2000


def choose_execution(
    train: TrainConfig,
    collectives: Collectives,
    *,
    seed: int,
    rows_on_device: bool,
    total_steps: int = 0,
    fsdp: bool = False,
    arithmetic: Arithmetic | None = None,
) -> Execution:
    """The execution of a configuration in a world; `seed` keys its random numbers, the exact mode has `arithmetic`.

    `train.virtual_ranks` asks for the exact mode. Without it one rank is single, and several are ddp. On a GPU each of
    them has kernels of its own for the models that these know, on any backend and wherever the rows are, so that their
    bits depend on neither; other models are recorded where all of a step runs on the GPU (`rows_on_device`: its rows
    too) and the host is asked for nothing.
    `fsdp` shards the model over several ranks; one rank has all of it. Its steps are never recorded.
    On the CPU one rank's steps are compiled where a run is of COMPILED_FROM_STEPS or more.
    """
    context = ModelContext(seed)
    if train.virtual_ranks is not None:
        context.arithmetic = arithmetic or context.arithmetic
        chosen: SingleExecution = ExactExecution(collectives, context, train.virtual_ranks)
    elif collectives.size > 1 and fsdp:
        from dist_train.execution.fsdp import FSDPExecution  # imports what only sharded models need

        return FSDPExecution(collectives, context)
    elif collectives.size > 1:
        chosen = DDPExecution(collectives, context)
    else:
        compiles = collectives.device.type == "cpu" and total_steps >= COMPILED_FROM_STEPS
        chosen = SingleExecution(collectives, context, compiles=compiles)
    if collectives.device.type == "cuda" and train.accumulation_steps == 1:
        # What goes over the host, as gloo does, is no part of a graph.
        recorder = CudaRecorder() if collectives.runs_on_device else None
        return GpuExecution(chosen, recorder, rows_on_device=rows_on_device)
    return chosen
