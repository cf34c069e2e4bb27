"""The results of a run on the GPU in a few lines; `--merge FOLDER FILE` joins the benchmark's files of each batch size.

python -m tools.gpu.gpu_table OUT [--tests tests.xml]
python -m tools.gpu.gpu_table --merge FOLDER OUT/bench.json
"""

from __future__ import annotations

import argparse
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_REASON = 260  # characters of a line that says why


def merge(folder: Path, file: Path) -> None:
    """One file of the benchmark out of those that each have one batch size."""
    merged: dict[str, Any] = {}
    for part in sorted(folder.glob("bench_*.json"), key=lambda path: int(re.sub(r"\D", "", path.stem) or 0)):
        for name, section in (_read(part) or {}).items():
            if name.startswith("throughput_") and isinstance(section, list):
                merged.setdefault(name, []).extend(section)
            else:
                merged.setdefault(name, section)
    file.write_text(json.dumps(merged, indent=1))


def lines(out: Path, tests: Path | None = None) -> Iterator[str]:
    """What ran, what did not hold and why, and the numbers."""
    probe, bench, stories = (_read(out / f"{name}.json") or {} for name in ("probe", "bench", "stories"))
    if "machine" in probe:
        yield ", ".join(f"{name} {value}" for name, value in probe["machine"].items())
    if tests and tests.is_file():
        yield from _tests(tests)
    checks = {name: entry for name, entry in probe.items() if isinstance(entry, dict) and "held" in entry}
    for name, result in sorted((stories | checks).items(), key=lambda item: item[1]["held"]):
        yield f"  {'held ' if result['held'] else 'BROKE'} {name}: {result['said'][:_REASON]}"
    warned = sorted({line for story in stories.values() for line in story.get("warnings", [])})
    yield from (f"  warned: {line[:200]}" for line in warned[:6])
    yield from _probe({name: entry for name, entry in probe.items() if name not in checks})
    for name, section in bench.items():
        if name.startswith("throughput_") and isinstance(section, list):
            yield from _throughput(name.removeprefix("throughput_"), section)
    log = out / "bench.log"
    left_out = (
        {line.strip() for line in log.read_text().splitlines() if "takes no part" in line} if log.is_file() else ()
    )
    yield from (f"  {line[:_REASON]}" for line in sorted(left_out))


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _tests(file: Path) -> Iterator[str]:
    suite = ElementTree.parse(file).getroot().find("testsuite")
    if suite is None:
        return
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    yield "tests/gpu: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + f" in {suite.get('time')} s"
    for case in suite.iter("testcase"):
        for outcome in (*case.findall("failure"), *case.findall("error")):
            reason = (outcome.get("message") or "").splitlines() or [""]
            yield f"  FAILED {case.get('name')}: {reason[0][:_REASON]}"


def _probe(probe: dict[str, Any]) -> Iterator[str]:
    if probe.get("ceilings"):
        yield "ceilings: " + ", ".join(f"{name} {value:,.1f}" for name, value in probe["ceilings"].items())
    if probe.get("steps"):
        columns = {
            "wall": "wall_us", "GPU": "gpu_us", "host": "host_us", "+numbers": "host_with_numbers_us",
            "replay": "replay_host_us", "eager": "eager_wall_us",
        }  # fmt: skip
        heads = " ".join(f"{name:>9}" for name in columns)
        yield f"{'batch':>7} {heads} {'rows/s':>13} {'loop':>13}  recorded, MiB: peak, reserved, device (times in us)"
        for batch, step in probe["steps"].items():
            cells = " ".join(f"{step[key]:9,.0f}" if key in step else f"{'-':>9}" for key in columns.values())
            loop = step.get("loop_rows_per_second", 0)
            memory = ", ".join(f"{step.get(key, 0):,.0f}" for key in ("peak_MiB", "reserved_MiB", "device_MiB_in_use"))
            yield f"{batch:>7} {cells} {step['rows_per_second']:13,.0f} {loop:13,.0f}  {step['recorded']}, {memory}"
    if probe.get("variants"):
        entries = probe["variants"].items()
        shown = [f"{name} {entry['wall_us']:,.0f}{' (graph)' if entry['recorded'] else ''}" for name, entry in entries]
        yield "step of 1,024 rows, us: " + ", ".join(shown)
    for batch, entry in (probe.get("profile") or {}).items():
        yield f"batch {batch}: {entry['nodes']:.0f} kernels and copies, {entry['kernel_us']:,.0f} us in them; most in"
        yield from (
            f"    {kernel['us']:8.1f} us {kernel['times']:4.0f} x {kernel['name']}" for kernel in entry["top"][:6]
        )
    functions = (probe.get("host") or {}).get("functions", [])
    if functions:
        yield "host, a step of 32 rows in the loop, us: " + ", ".join(
            f"{f['us']:.0f} {f['name']}" for f in functions[:6]
        )


def _throughput(name: str, section: list[dict[str, Any]]) -> Iterator[str]:
    yield f"rows/s, {name} (median ± highest over lowest)"
    for row in section:
        rates = ", ".join(
            f"{who} {rate['median']:,.0f} ±{rate['spread']:.2f}" for who, rate in row["rows_per_second"].items()
        )
        ratios = ", ".join(f"{ratio:.1f}x {who}" for who, ratio in row["ratio"].items())
        yield f"{row['batch_size']:>7}  {rates} | {ratios}"


def main() -> None:
    """Print the table, or merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="folder with stories.json, probe.json and bench.json")
    parser.add_argument("--tests", type=Path, help="what pytest wrote with --junitxml")
    parser.add_argument("--merge", type=Path, nargs=2, metavar=("FOLDER", "FILE"))
    arguments = parser.parse_args()
    if arguments.merge:
        merge(*arguments.merge)
    elif arguments.out:
        print("=" * 100, *lines(arguments.out, arguments.tests), "=" * 100, sep="\n")
    else:
        parser.error("OUT or --merge")


if __name__ == "__main__":
    main()
