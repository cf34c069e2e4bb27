"""What a training step costs on this GPU and where, and what needs NCCL or a recorded DistributedDataParallel.

    python -m tools.gpu.gpu_probe --device cuda --out probe.json [--only ceilings,steps] [--short]

Started in the root of a checkout; the JSON is written anew after each part, so that what was measured stays.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tools.gpu import gpu_checks, gpu_groups, gpu_speed
from tools.gpu.gpu_place import Place, Result

PARTS: dict[str, Callable[[Place], Result]] = {
    part.__name__: part
    for part in (
        gpu_checks.shapes, gpu_checks.modes, gpu_checks.longer_tail, gpu_checks.continued, gpu_checks.not_finite,
        gpu_checks.pinned_turns, gpu_checks.waits, gpu_groups.nccl, gpu_groups.ddp_in_a_graph,
        gpu_speed.ceilings, gpu_speed.steps, gpu_speed.variants, gpu_speed.profile, gpu_speed.host,
        gpu_checks.fallback,  # the last: a capture that breaks off may leave its traces in torch
    )
}  # fmt: skip


def main() -> None:
    """Play the parts; exit code 1 where one did not hold or broke off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", default="", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--short", action="store_true", help="few repetitions and small batches: does it run at all?")
    arguments = parser.parse_args()
    chosen = [name for name in arguments.only.split(",") if name] or list(PARTS)
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]}, but {', '.join(PARTS)}")
    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as the exact mode sets it, before CUDA is touched
    if arguments.device == "cuda":
        torch.cuda.set_device(0)
    place = Place(torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu"), short=arguments.short)
    found: Result = {"machine": _machine(place)}
    for name in chosen:
        found[name] = _play(PARTS[name], place)
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1, default=str))
    held = all(found[name].get("held", True) for name in chosen)
    sys.stdout.flush()
    os._exit(not held)  # a process group that does not end would keep the process


def _play(part: Callable[[Place], Result], place: Place) -> Result:
    start = time.perf_counter()
    print(f"{part.__name__}:", flush=True)
    place.forget()
    try:
        result = part(place)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).splitlines() or [""]
        result = {"held": False, "said": f"{type(error).__name__}: {lines[0][:300]}"}
    if "said" in result:
        print(f"  {'held ' if result['held'] else 'BROKE'} {result['said']}", flush=True)
    print(f"  {time.perf_counter() - start:.1f} s", flush=True)
    return result


def _machine(place: Place) -> Result:
    found: Result = {
        "torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0],
        "processors": os.cpu_count(), "device": "cpu",
    }  # fmt: skip
    if place.on_gpu:
        found["device"] = torch.cuda.get_device_name(0)
        cuda: Any = torch.cuda
        backends: Any = torch.backends
        found["cudnn"] = backends.cudnn.version()
        found["nccl"] = ".".join(map(str, cuda.nccl.version()))
    return found


if __name__ == "__main__":
    main()
