"""Make the pictures of the documentation from a real run: `make pictures`.

docs/images/terminal.svg, shown by the README: the terminal while the default job trains on two ranks, and at its end.
docs/images/curves.svg, not kept in git: loss and AUROC over the steps, from that run's metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import matplotlib as mpl
import pyte
from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).parent.parent / "docs" / "images"
COLUMNS, LINES = 118, 22
SHOWN = "$ torchrun --standalone --nproc_per_node=2 launch/train.py configs/credit_risk.yaml"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        during, after = record(Path(folder))
        picture([Text(SHOWN, "bold"), *during, Text("\n...\n"), *after], IMAGES / "terminal.svg")
        curves(Path(folder) / "credit_risk" / "metrics.jsonl", IMAGES / "curves.svg")


def record(runs: Path) -> tuple[list[Text], list[Text]]:
    """The screen while the bar is halfway, and the last lines at the end."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "launch/train.py",
         "configs/credit_risk.yaml", f"run.dir={runs}"],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)},
    )  # fmt: skip
    os.close(theirs)
    during: list[Text] = []
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the terminal closes with its last process
            break
        stream.feed(data)
        if not during and any("epoch 9/" in line and "step" in line for line in screen.display):
            during = _lines(screen)
    assert process.wait() == 0, "\n".join(screen.display)
    last = [line for line in _lines(screen) if "[rank 0]" in line.plain][-4:]
    return during, [*last[:-1], Text(last[-1].plain.replace(f"{runs}/", "runs/"))]


def picture(lines: list[Text], file: Path) -> None:
    """An SVG of a terminal that shows these lines."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        for line in lines:
            console.print(line)
        svg = console.export_svg(title="dist_train")
    # The font is whatever monospaced font the reader has; nothing is fetched.
    file.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S))


def curves(metrics: Path, file: Path) -> None:
    """Loss of training and validation rows, and AUROC of the validation rows, against the optimizer step."""
    mpl.use("svg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    split = {name: [r for r in records if r["split"] == name] for name in ("train", "valid")}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    left.plot([r["step"] for r in split["train"]], [r["loss"] for r in split["train"]], label="train (dropout on)")
    left.plot([r["step"] for r in split["valid"]], [r["loss"] for r in split["valid"]], "o-", ms=3, label="valid")
    left.set(xlabel="optimizer step", ylabel="log loss (nats)", title="credit_risk, 2 ranks")
    left.legend(frameon=False)
    right.plot([r["step"] for r in split["valid"]], [r["auroc"] for r in split["valid"]], "o-", ms=3, color="C1")
    right.set(xlabel="optimizer step", ylabel="macro AUROC, valid")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def _lines(screen: pyte.Screen) -> list[Text]:
    lines = []
    for y in range(screen.lines):
        cells = [screen.buffer[y][x] for x in range(screen.columns)]
        runs = groupby(cells, key=lambda cell: str(cell.fg))
        line = Text.assemble(*(("".join(c.data for c in run), _style(fg)) for fg, run in runs), no_wrap=True)
        line.rstrip()
        if line.plain:
            lines.append(line)
    return lines


def _style(colour: str) -> str:
    names = {"default": "default", "brown": "yellow"}  # pyte calls dark yellow brown
    return f"#{colour}" if re.fullmatch("[0-9a-f]{6}", colour) else names.get(colour, colour)


if __name__ == "__main__":
    main()
