"""The two diagrams of docs/architecture.md, made from the code.

`make docs` runs it: `python -m tools.architecture_diagrams docs/architecture.md` rewrites them between their markers.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
PACKAGE = "dist_train"
LEFT_OUT = {"__main__", "errors"}  # imported by everything, or nothing but a table of verbs

# Who holds whom in a run: (module of the owner, owner, attribute or method, what it holds, module of that). Where a
# method is named, it or a helper of it makes the object and keeps it in a variable.
HOLDS = (
    ("run.job", "Job", "folder", "RunFolder", "run.checkpoint.run_folder"),
    ("run.job", "Job", "checkpoints", "Checkpoints", "run.checkpoint.checkpoints"),
    ("run.job", "Job", "collectives", "Collectives", "distributed.collectives"),
    ("run.job", "Job", "run()", "Session", "run.session"),
    ("run.job", "Job", "run()", "Trackers", "run.tracking.trackers"),
    ("run.job", "Job", "run()", "Loop", "training.loop"),
    ("run.checkpoint.run_folder", "RunFolder", "held", "RunLock", "run.checkpoint.lock"),
    ("run.tracking.trackers", "Trackers", "jsonl", "JsonlTracker", "run.tracking.jsonl_tracker"),
    ("run.tracking.trackers", "Trackers", "wandb", "WandbTracker", "run.tracking.wandb_tracker"),
    ("run.session", "Session", "task", "Task", "tasks.base"),
    ("run.session", "Session", "execution", "Execution", "execution.base"),
    ("run.session", "Session", "optimizer", "AdamW", "execution.optimizer"),
    ("run.session", "Session", "feed", "Feed", "data.sources"),
    ("run.session", "Session", "step", "Step", "training.step"),
    ("run.session", "Session", "progress", "Progress", "training.progress"),
    ("training.loop", "Loop", "step", "Step", "training.step"),
    ("training.loop", "Loop", "feed", "Feed", "data.sources"),
    ("training.loop", "Loop", "progress", "Progress", "training.progress"),
    ("tasks.tabular", "TabularTask", "spec", "FeatureSpec", "data.encoding.spec"),
    ("data.sources", "Feed", "sampler", "PositionSampler", "data.sampler"),
    ("execution.base", "GuardedStep", "inner", "EagerStep", "training.step"),
    ("training.step", "EagerStep", "reducer", "GradientReducer", "training.protocols"),
    ("training.step", "EagerStep", "optimizer", "AdamW", "execution.optimizer"),
    ("distributed.collectives", "Collectives", "heartbeat", "Heartbeat", "watchdog.heartbeat"),
)
IMPLEMENTS = (
    ("GuardedStep", "Step"),
    ("TabularTask", "Task"),
    ("SingleExecution", "Execution"),
    ("DDPExecution", "Execution"),
    ("FSDPExecution", "Execution"),
    ("ExactExecution", "Execution"),
    ("GpuExecution", "Execution"),
)


def packages() -> str:
    """The packages of each layer, and which imports which; an import that follows from others is left out."""
    rows = [row for row in layers() if row]
    graph = imports()
    exceptions = _exceptions()
    ordinary = {name: {t for t in targets if (name, t) not in exceptions} for name, targets in graph.items()}
    lines = ["flowchart TD"]
    for number, row in enumerate(rows):
        lines.append(f'    subgraph layer{len(rows) - number}[" "]')
        lines += [f"        {name}" for name in row]
        lines.append("    end")
    for name in sorted(graph):
        lines += [f"    {name} --> {target}" for target in sorted(_direct(name, ordinary))]
        lines += [f"    {name} -.-> {target}" for target in sorted(graph[name] - ordinary[name])]
    return "\n".join(lines)


def objects() -> str:
    """The objects of a run and which holds which, from HOLDS."""
    lines = ["flowchart TD"]
    lines += [f'    {owner} -->|"{name}"| {held}' for _, owner, name, held, _ in HOLDS]
    lines += [f"    {name} -.->|is a| {protocol}" for name, protocol in IMPLEMENTS]
    return "\n".join(lines)


def problems_of_objects() -> list[str]:
    """Entries of HOLDS that the code contradicts."""
    problems = []
    for owner_module, owner, name, held, held_module in HOLDS:
        entry = f"{owner}.{name} -> {held}"
        owner_class = _definition(owner_module, owner)
        if owner_class is None or _definition(held_module, held) is None:
            problems.append(f"{entry}: a class is not where HOLDS says")
        elif name.endswith("()"):
            called = {ast.unparse(n.func) for n in ast.walk(owner_class) if isinstance(n, ast.Call)}
            if not called & {held, f"build_{held.lower()}"}:
                problems.append(f"{entry}: nothing in the class makes one")
        elif not any(
            isinstance(n, ast.Attribute) and n.attr == name and isinstance(n.ctx, ast.Store)
            for n in ast.walk(owner_class)
        ):
            problems.append(f"{entry}: there is no such attribute")
    return problems


def with_diagrams(page: str) -> str:
    """The page with both diagrams between their markers; ValueError when a marker is missing."""
    for name, diagram in (("packages", packages()), ("objects", objects())):
        begin, end = f"<!-- {name}: made by `make docs`, do not edit -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page needs the lines {begin!r} and {end!r}")
        page = f"{before}{begin}\n```mermaid\n{diagram}\n```\n{end}{after}"
    return page


def imports() -> dict[str, set[str]]:
    """Each package (or lone module) directly below dist_train, and those that it imports."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in graph.modules:
        name = _top(module)
        for imported in graph.find_modules_directly_imported_by(module):
            if name and (target := _top(imported)) and target != name:
                found.setdefault(name, set()).add(target)
        if name:
            found.setdefault(name, set())
    return found


def layers() -> list[list[str]]:
    """The packages of each layer of the import contract, the highest layer first."""
    seen: set[str] = set()
    rows = []
    for row in _contract()["layers"]:
        names = dict.fromkeys(_top(module.strip()) for module in row.split("|"))
        rows.append([name for name in names if name and name not in seen])
        seen |= {name for name in names if name}
    return rows


def _exceptions() -> set[tuple[str, str]]:
    """Pairs of packages between which the contract lets single imports pass."""
    pairs = (re.split(r"\s*->\s*", line) for line in _contract().get("ignore_imports", []))
    named = {(_top(source), _top(target)) for source, target in pairs}
    names = [name for row in layers() for name in row]
    upwards = {(low, high) for i, high in enumerate(names) for low in names[i + 1 :]}
    return {(s, t) for s, t in upwards if (s, t) in named or (s, "**") in named}


def _contract() -> Mapping[str, list[str]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    found: Mapping[str, list[str]] = next(c for c in settings["contracts"] if c["type"] == "layers")
    return found


def _top(module: str) -> str:
    """`dist_train.run.job` -> `run`; empty for what the diagram leaves out."""
    package, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    return name if package == PACKAGE and name not in LEFT_OUT else ""


def _direct(name: str, graph: Mapping[str, set[str]]) -> set[str]:
    """The imports of a package that do not follow from its other imports."""
    return {t for t in graph[name] if not any(t in _reached(other, graph) for other in graph[name] - {t})}


def _reached(name: str, graph: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    ahead = [name]
    while ahead:
        new = graph[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def _definition(module: str, name: str) -> ast.ClassDef | None:
    file = ROOT / PACKAGE / f"{module.replace('.', '/')}.py"
    if not file.exists():
        return None
    body = ast.parse(file.read_text()).body
    return next((node for node in body if isinstance(node, ast.ClassDef) and node.name == name), None)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_diagrams(target.read_text()))
