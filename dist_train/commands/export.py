"""Export a trained run for other programs: raw columns in, calibrated probabilities out.

    dist-train export runs/credit_risk credit_risk.onnx
    dist-train export runs/credit_risk credit_risk.pt2
    dist-train export runs/credit_risk repository/credit_risk --triton

.onnx: an input for each column, named as it, (rows, 1): strings for categories ("" is missing), float64 for numbers
(NaN is missing); dates are seconds since 1970-01-01 UTC. The output `probabilities` is (rows, classes) float64. The
metadata hold the columns, the classes and the hashes. Nothing of this project is needed to run it: docs/scoring.md has
a script.

.pt2: torch.export's archive of the same network; it takes numbers (rows, columns) float64 and category codes
(rows, columns) int64, because torch has no strings.

--triton: a folder with config.pbtxt and 1/model.onnx, the model of a repository of the Triton Inference Server.

The file is compared with the predictor on 1,000 rows of usual, extreme, missing and unknown cells before it gets its
name. stdout gets one line of JSON: {"output": ..., "largest_difference": ..., "rows": 1000}.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_train.commands.parser import command_parser, path
from dist_train.errors import UserError

_KINDS = (".onnx", ".pt2")


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument("run_dir", type=path, help="run folder, e.g. runs/credit_risk, or a trained model")
    parser.add_argument("output", type=path, help="file to write, .onnx or .pt2; a folder with --triton")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step (default: best)")
    parser.add_argument("--uncalibrated", action="store_true", help="the model's own probabilities")
    parser.add_argument("--triton", action="store_true", help="OUTPUT is the folder of a Triton model to make")
    arguments = parser.parse_args(argv)
    output: Path = arguments.output
    if not arguments.triton and output.suffix.lower() not in _KINDS:
        raise UserError(f"{output}: the name must end in .onnx or .pt2")

    from dist_train.distributed.collectives import Collectives
    from dist_train.distributed.world import World
    from dist_train.run.scoring.predictor import Predictor
    from dist_train.serving.export import NUM_CHECKED, export_model
    from dist_train.system.console import log, print_json

    calibrated = False if arguments.uncalibrated else None
    predictor = Predictor(arguments.run_dir, Collectives(World()), arguments.checkpoint, calibrated=calibrated)
    difference = export_model(predictor, output, triton=arguments.triton)
    log.info("%s: its probabilities differ by at most %.1e from the predictor's", output, difference)
    print_json({"output": str(output), "largest_difference": difference, "rows": NUM_CHECKED})
