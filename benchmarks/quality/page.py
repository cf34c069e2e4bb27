"""docs/quality.md: the tables of the results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.tables import BUILT_IN, TABLES

HEAD = """# Quality

Made by `make bench-quality` out of [benchmarks/results/quality.json](../benchmarks/results/quality.json). Log loss on
the test rows, lower is better: the mean over seeds, ± their standard deviation, where there are several. Seconds are
those of a processor from the start of the command to its end, one thread. Tuned LightGBM is the
best of 20 random settings by the validation rows; its seed draws them. *Tutorial loop*: a plain loop of PyTorch
(DataLoader, backward pass, AdamW) with the FinancialClassifier's network. Nothing was chosen by test rows:
[any-table.md](any-table.md) says how the values of `configs/any_table.yaml` were chosen. The tables:
`benchmarks/quality/tables.py`.
"""
_TITLES = {
    "any_table": "any_table.yaml",
    "any_table_best": "any_table_best.yaml",
    "financial_classifier": "FinancialClassifier",
    "lightgbm": "LightGBM, default",
    "lightgbm_tuned": "LightGBM, tuned",
    "xgboost": "XGBoost, default",
    "catboost": "CatBoost, default",
    "logistic_regression": "logistic regression",
    "tutorial_loop": "tutorial loop",
    "realmlp": "RealMLP (pytabkit)",
    "tabm_pytabkit": "TabM (pytabkit)",
}


_MARKS = ("<!-- leaderboard: made by `make bench-quality` -->\n", "<!-- end of the leaderboard -->\n")


def write_page(known: Mapping[str, Any], file: Path) -> None:
    """Write the page of these results."""
    file.write_text("\n".join(_lines(known)) + "\n")


def write_leaderboard(known: Mapping[str, Any], readme: Path) -> None:
    """Put the leaderboard of the built-in table between the two marks of another page."""
    before, rest = readme.read_text().split(_MARKS[0])
    _, after = rest.split(_MARKS[1])
    shown = "\n".join(_leaderboard(_summaries(known).get(BUILT_IN, {})))
    readme.write_text(f"{before}{_MARKS[0]}\n{shown}\n\n{_MARKS[1]}{after}")


def summarised(of_seeds: Mapping[str, Any]) -> dict[str, float] | None:
    """Means over the seeds that were measured; None where there are none."""
    found = [result for result in of_seeds.values() if "test" in result]
    if not found:
        return None
    mean = {key: statistics.mean(result[key] for result in found) for key in ("valid", "test", "cpu_seconds")}
    return mean | {"seeds": len(found), "spread": statistics.stdev(r["test"] for r in found) if len(found) > 1 else 0.0}


def _lines(known: Mapping[str, Any]) -> Iterator[str]:
    results = _summaries(known)
    yield HEAD
    machine = ", ".join(f"{name} {value}" for name, value in known.get("machine", {}).items())
    yield f"Machine: {machine}. The commit of each result is in the file.\n"
    yield "## The built-in table\n"
    yield from _leaderboard(results.get(BUILT_IN, {}))
    yield "\n## All tables\n"
    yield from _all_tables(results)
    yield "\nAn empty cell was not run."
    yield from _skipped(known["results"])


def _summaries(known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Table -> contestant -> means over the seeds, the tables in their order."""
    found = known["results"]
    return {
        table: {name: summarised(of_seeds) for name, of_seeds in found[table].items()}
        for table in TABLES
        if table in found
    }


def _leaderboard(of_table: Mapping[str, Any]) -> Iterator[str]:
    target = (of_table.get("lightgbm_tuned") or {}).get("test")
    yield "| | test log loss | seeds | seconds to the end | at or below tuned LightGBM |"
    yield "| --- | --- | --- | --- | --- |"
    measured = {name: mean for name, mean in of_table.items() if mean}
    for name, mean in sorted(measured.items(), key=lambda item: item[1]["test"]):
        reached = "" if target is None else "yes" if mean["test"] <= target else "no"
        loss = _loss(mean)
        yield f"| {_TITLES[name]} | {loss} | {mean['seeds']} | {mean['cpu_seconds']:.0f} | {reached} |"


def _all_tables(results: Mapping[str, Any]) -> Iterator[str]:
    shown = [name for name in _TITLES if any(of_table.get(name) for of_table in results.values())]
    yield "| | " + " | ".join(_TITLES[name] for name in shown) + " | any_table against LightGBM default |"
    yield "| --- |" + " --- |" * (len(shown) + 1)
    for table, of_table in results.items():
        own, default = of_table.get("any_table"), of_table.get("lightgbm")
        against = f"{100 * (own['test'] / default['test'] - 1):+.1f} %" if own and default else ""
        cells = [_loss(of_table[name]) if of_table.get(name) else "" for name in shown]
        yield f"| {table} | " + " | ".join(cells) + f" | {against} |"


def _skipped(results: Mapping[str, Any]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for table, contestants in results.items():
        for name, of_seeds in contestants.items():
            for reason in dict.fromkeys(r["skipped"] for r in of_seeds.values() if "skipped" in r):
                reasons.setdefault(f"{_TITLES[name]}: {reason}", []).append(table)
    for reason, tables in reasons.items():
        yield f"- {reason} ({', '.join(tables)})"


def _loss(mean: Mapping[str, Any]) -> str:
    spread = f" ± {mean['spread']:.4f}" if mean["seeds"] > 1 else ""
    return f"{mean['test']:.4f}{spread}"
