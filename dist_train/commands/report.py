"""Write the report on a finished run: report.html, report.json and figures/*.png in its folder.

    dist-train report runs/credit_risk
    dist-train report runs/credit_risk report.positive_class=high report.segments=[region,age]
    dist-train report runs/credit_risk --verify             # recompute every number of report.json
    torchrun --standalone --nproc_per_node=2 -m dist_train report runs/credit_risk          # same numbers, sooner

It holds metrics of the positive class with confidence intervals, calibration, the threshold of least cost, score bands,
segments, stability of features, other models on the same rows, and a model card (docs/risk.md). Keys of the section
`report` override those of the run. The data are read from the path in the run's configuration, relative to the current
folder. report.html is one file that needs no network.

--verify writes nothing; it names every number that differs, and exits with 1 if one does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from dist_train.commands.parser import command_parser, path
from dist_train.errors import TrainingFault, UserError


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument("run_dir", type=path, help="run folder, e.g. runs/credit_risk")
    parser.add_argument("overrides", nargs="*", metavar="report.key=value", help="keys of the section report")
    parser.add_argument("--verify", action="store_true", help="recompute the numbers of report.json and compare")
    arguments = parser.parse_intermixed_args(argv)
    for text in arguments.overrides:
        if not text.startswith("report."):
            raise UserError(f"{text}: only keys of the section report can be given here, as report.segments=[region]")
    if arguments.verify and arguments.overrides:
        raise UserError(f"{arguments.overrides[0]}: --verify takes the keys that the report was made with")

    from dist_train.config.load import config_from_tree, load_config
    from dist_train.risk.figures import require_matplotlib
    from dist_train.run.checkpoint.run_folder import opened_run
    from dist_train.run.reporting import differences, read_report, report_content, report_run
    from dist_train.run.scoring.predictor import open_predictor
    from dist_train.system.console import log, print_json

    folder, config = opened_run(arguments.run_dir)
    if arguments.verify:
        recorded = read_report(folder)
        settings = config_from_tree({"report": recorded["settings"]}, "report.json").report
    else:
        require_matplotlib()
        settings = load_config(arguments.overrides, base=config).report
    with open_predictor(arguments.run_dir, "best", os.environ) as predictor:
        if not arguments.verify:
            content = report_run(folder, config, predictor, settings)
            if content is not None:
                print_json({"report": str(folder.path / "report.html"), "positive_class": content["positive_class"]})
            return
        made = report_content(folder, config, predictor, settings)
    if made is None:
        return
    found = list(differences(recorded, made))
    for line in found:
        log.warning("%s", line)
    print_json({"differences": len(found)})
    if found:
        raise TrainingFault(f"{len(found)} numbers of {folder.path / 'report.json'} differ: the first is {found[0]}")
    log.info("every number of %s is what the run gives", folder.path / "report.json")
