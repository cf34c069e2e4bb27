"""report.html: one file that needs no network, for a screen in light and dark, and for paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from dist_train.risk.figures import Figures

_CSS = """
:root{color-scheme:light dark;--ink:#1b1f23;--paper:#fff;--line:#8c959f55;--soft:#57606a;--tint:#0f7ac014}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--paper:#14181d;--soft:#9da7b1;--tint:#58a6ff1f}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main,header{max-width:1080px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{margin:0 0 4px;font-size:1.7rem}h2{margin:2.2rem 0 .6rem;font-size:1.25rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{max-width:75ch}.soft{color:var(--soft)}
nav ul{display:flex;flex-wrap:wrap;gap:4px 16px;padding:0;list-style:none}
a{color:inherit}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:18px 0;padding:0}
.facts div{background:var(--tint);border-radius:8px;padding:10px 12px}
.facts dt{color:var(--soft);font-size:.85rem}.facts dd{margin:0;font-size:1.35rem;font-weight:600}
.facts small{display:block;font-size:.8rem;font-weight:400;color:var(--soft)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:20px;margin-top:14px}
figure{margin:0;break-inside:avoid}figure svg{width:100%;height:auto}figcaption{color:var(--soft);font-size:.9rem}
.wide{overflow-x:auto;margin-top:10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.92rem}
caption{text-align:left;color:var(--soft);font-size:.9rem;padding:4px 0}
th,td{text-align:right;padding:4px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:9em}
thead th{white-space:normal;vertical-align:bottom}
code{overflow-wrap:anywhere}
@media print{nav{display:none}body{font-size:11px}h2{break-after:avoid}tr{break-inside:avoid}}
"""


def page_of(content: Mapping[str, Any], figures: Figures) -> str:
    """The page of a report."""
    card = content["card"]
    sections = [
        ("performance", "Performance", _performance(content, figures)),
        ("probabilities", "Are the probabilities true?", _probabilities(content, figures)),
        ("decision", "From score to decision", _decision(content, figures)),
        ("influence", "What the columns do", _influence(content, figures)),
        ("beside", "Beside other models", _beside(content, figures)),
        ("segments", "Segments and weak spots", _segments(content)),
        ("stability", "Stability", _stability(content, figures)),
        ("card", "Model card", _card(content, figures)),
    ]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{title}</h2>{text}</section>' for key, title, text in sections
    )
    nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>'
    return document(f"Report: {card['run']}", _subtitle(content), nav, _facts(content) + body)


def document(title: str, subtitle: str, nav: str, body: str) -> str:
    """A page that needs no network; `nav` and `body` are HTML."""
    title = escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_CSS}</style></head><body><header><h1>{title}</h1>"
        f'<p class="soft">{escape(subtitle)}</p>{nav}</header>'
        f"<main>{body}</main></body></html>\n"
    )


def _subtitle(content: Mapping[str, Any]) -> str:
    rows = content["rows"][content["reported_on"]]
    return (
        f"Positive class: {content['positive_class']}. Numbers are those of the {rows['rows']:,} "
        f"{content['reported_on']} rows, of the probabilities that the model ships, unless a table says otherwise. "
        "Intervals are at 95 %."
    )


def _facts(content: Mapping[str, Any]) -> str:
    of_class, intervals = content["positive"][content["reported_on"]], content["intervals"]
    shipped = content["probabilities"][content["reported_on"]]["shipped"]
    facts = [
        ("AUROC", of_class["auroc"], intervals["auroc"]),
        ("Gini", of_class["gini"], intervals["gini"]),
        ("KS", of_class["ks"], intervals["ks"]),
        ("Log loss, all classes", shipped["log_loss"], intervals["loss"]),
        ("Brier score", of_class["brier"], intervals["brier"]),
        ("Calibration error (ECE)", shipped["ece"], None),
    ]
    lines = [f"<div><dt>{name}</dt><dd>{number_of(value)}{_between(low)}</dd></div>" for name, value, low in facts]
    return f'<dl class="facts">{"".join(lines)}</dl>'


def _between(interval: Sequence[float] | None) -> str:
    return f"<small>{number_of(interval[0])} to {number_of(interval[1])}</small>" if interval else ""


def number_of(value: Any, *, markup: bool = True) -> str:
    """A number, or another value, as a cell of a table: HTML, or plain text."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escape(str(value)) if markup else str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and value == int(value)):
        return f"{int(value):,}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def table_of(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """A table; the first cell of a row is its head."""
    titles = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "".join(
        "<tr>"
        + f'<th scope="row">{number_of(first)}</th>'
        + "".join(f"<td>{number_of(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    text = f"<caption>{escape(caption)}</caption>" if caption else ""
    return _wide(f"{text}<thead><tr>{titles}</tr></thead><tbody>{lines}</tbody>", caption or ", ".join(head))


def _wide(content: str, label: str) -> str:
    """A table that a keyboard can scroll where it is wider than the window."""
    region = f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}">'
    return f"{region}<table>{content}</table></div>"


def figures_in(figures: Figures, *names: str) -> str:
    """Those of the figures that there are, with what they show in words."""
    drawn = []
    for name in names:
        if name in figures:
            words, svg, _ = figures[name]
            labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(words)}" ', 1)
            drawn.append(f"<figure>{labelled}<figcaption>{escape(words)}</figcaption></figure>")
    return f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""


def _performance(content: Mapping[str, Any], figures: Figures) -> str:
    names = ("rows", "rate", "auroc", "gini", "ks", "average_precision", "log_loss", "brier")
    head = ("rows", "rate", "AUROC", "Gini", "KS", "average precision", "log loss (one class)", "Brier")
    by_split = [(split, *(line[name] for name in names)) for split, line in content["positive"].items()]
    by_class = [(name, *(line[key] for key in names)) for name, line in content["per_class"].items()]
    return (
        table_of(("split", *head), by_split, f"Class {content['positive_class']} against the others, by split")
        + table_of(("class", *head), by_class, f"Each class against the others, {content['reported_on']} rows")
        + figures_in(figures, "roc", "scores")
    )


def _probabilities(content: Mapping[str, Any], figures: Figures) -> str:
    names = ("log_loss", "brier", "reliability", "resolution", "uncertainty", "within", "ece")
    rows = [
        (f"{split}, {words}", *(parts[label][name] for name in names))
        for split, parts in content["probabilities"].items()
        for label, words in (("own", "the model's own"), ("shipped", "as shipped"))
    ]
    head = ("rows", "log loss", "Brier", "reliability", "resolution", "uncertainty", "within bins", "ECE")
    words = (
        "Brier = reliability - resolution + uncertainty + within bins, of the positive class; log loss of all classes"
    )
    return (
        f"<p>{escape(_calibration(content['card']['calibration']))}</p>"
        + table_of(head, rows, words)
        + figures_in(figures, "reliability", "bands")
    )


def _calibration(calibration: Mapping[str, Any] | None) -> str:
    if calibration is None:
        return "The probabilities are the model's own: there is no calibration."
    fitted = calibration["fitted"]
    text = f"Calibration: {calibration['method']}, fitted to {fitted['rows']:,} validation rows."
    if "temperature" in calibration:
        text += f" Temperature {calibration['temperature']:.4f} (estimate {fitted['estimate']['temperature']:.4f})."
    if fitted["p_value"] is not None:
        text += f" p-value of the test that none is needed: {fitted['p_value']:.3g}."
    if not fitted["used"]:
        text += (
            f" None is made: {fitted['rows']:,} rows, {fitted['wrong']:,} of them predicted wrong, do not say enough."
        )
    return text


def _decision(content: Mapping[str, Any], figures: Figures) -> str:
    costs = content["threshold"]["costs"]
    names = ("threshold", "cost", "selected", "precision", "recall", "false_positive_rate")
    kinds = {
        "of_least_cost": f"least cost on {content['chosen_on']} rows",
        "by_theory": "for true probabilities",
        "nobody_positive": "nobody positive",
        "all_positive": "all positive",
    }
    rows = [(words, *(content["threshold"][kind][name] for name in names)) for kind, words in kinds.items()]
    lift = [(f"{line['depth']:.0%}", line["rate"], line["lift"], line["capture"]) for line in content["lift"]]
    bands = [
        (f"{band['from']:.4f} to {band['to']:.4f}", band["rows"], band.get("mean_score"), band.get("rate"),
         *(band.get("interval") or (None, None)))
        for band in content["bands"]["bands"]
    ]  # fmt: skip
    order = "rises from band to band" if content["bands"]["monotone"] else "does not rise everywhere"
    inverted = content["bands"]["significant_inversions"]
    return (
        table_of(
            ("threshold", "value", "mean cost", "selected", "precision", "recall", "false positive rate"),
            rows,
            f"A false positive costs {costs['false_positive']:g}, a false negative {costs['false_negative']:g} "
            "(report.false_positive_cost, report.false_negative_cost)",
        )
        + table_of(("share of rows", "rate", "lift", "capture"), lift, "Rows with the highest scores")
        + table_of(("band", "rows", "mean probability", "observed rate", "from", "to"), bands, "Bands of scores")
        + f"<p>The observed rate {order}; {inverted} inversions are beyond what the intervals allow.</p>"
        + figures_in(figures, "capture")
    )


def _beside(content: Mapping[str, Any], figures: Figures) -> str:
    if not content["beside"]:
        return "<p>There are no test rows, or no table, to train other models beside this one.</p>"
    rows = [
        (name, line["log_loss"], line["auroc"], line["average_precision"], line["brier"], line.get("difference"),
         *(line.get("difference_interval") or (None, None)))
        for name, line in content["beside"]["models"].items()
    ]  # fmt: skip
    head = ("model", "log loss", "AUROC", "average precision", "Brier", "difference of log loss", "from", "to")
    left = "".join(f"<p>{escape(name)} {escape(why)}.</p>" for name, why in content["beside"]["left_out"].items())
    caption = "Same splits and columns; a difference above 0 says that this model is better"
    return table_of(head, rows, caption) + left + figures_in(figures, "beside")


def _segments(content: Mapping[str, Any]) -> str:
    parts = []
    for column, found in content["segments"].items():
        rows = [
            (line["segment"], line["count"], line["rate"], *line["rate_interval"], line["mean_score"], line["auroc"],
             line["loss"], line["selected"], line["recall"], line.get("false_positive_rate"),
             line["adverse_impact_ratio"])
            for line in found["segments"]
        ]  # fmt: skip
        head = ("segment", "rows", "rate", "from", "to", "mean probability", "AUROC", "log loss", "selected", "recall",
                "false positive rate", "adverse impact ratio")  # fmt: skip
        gaps = [
            f"{name} {found[key]:.3f}"
            for name, key in (("recall", "recall_gap"), ("false positive rate", "false_positive_gap"))
            if found.get(key) is not None
        ]
        caption = f"By {column}, at the threshold of least cost" + (f"; gaps: {', '.join(gaps)}" if gaps else "")
        parts.append(f"<h3>{escape(column)}</h3>" + table_of(head, rows, caption))
    if not parts:
        parts.append("<p>No segments are named: <code>report.segments=[COLUMN]</code> names some.</p>")
    spots = content["weak_spots"]
    if spots:
        lines = [(spot["slice"], spot["rows"], spot["loss"], spot["ratio"]) for spot in spots]
        caption = (
            f"Slices found by a tree on {content['chosen_on']} rows, with the loss of {content['reported_on']} rows"
        )
        parts.append("<h3>Weak spots</h3>" + table_of(("slice", "rows", "log loss", "by the mean"), lines, caption))
    return "".join(parts)


def _influence(content: Mapping[str, Any], figures: Figures) -> str:
    found = content.get("importance")
    if not found:
        return "<p>The columns of this task, or rows to try them on, are not known.</p>"
    lines = [(line["feature"], line["loss"], line["loss_std"], line["auroc"]) for line in found["columns"][:30]]
    caption = f"Cells of a column permuted among {found['count']:,} {found['rows']} rows, {found['repeats']} times"
    drawn = [f"dependence_{number}" for number in range(1, 1 + len(content["dependence"]))]
    return (
        table_of(("column", "log loss rises by", "standard deviation", "AUROC falls by"), lines, caption)
        + "<p>Of columns that tell the same none may look important. A curve of dependence sets one column to a value "
        "in all rows, also where such rows do not exist.</p>" + figures_in(figures, "importance", *drawn)
    )


def _stability(content: Mapping[str, Any], figures: Figures) -> str:
    scores = content["stability"]["score"].items()
    text = table_of(("scores", "PSI"), [(f"{name} against train", value) for name, value in scores])
    features = content["stability"]["features"]
    if features:
        splits = [name for name in content["rows"] if name != "train"]
        rows = [
            (line["feature"], *(line["psi"].get(split) for split in splits), line["missing"].get("train"))
            for line in features
        ]
        head = ("feature", *(f"PSI {split}" for split in splits), "missing in train")
        text += table_of(head, rows, "Below 0.1 nothing has moved; above 0.25 a model needs attention (Siddiqi 2006)")
    return text + figures_in(figures, "stability")


def _card(content: Mapping[str, Any], figures: Figures) -> str:
    card = content["card"]
    lines = [(name.replace("_", " "), value) for name, value in card.items() if not isinstance(value, (dict, list))]
    lines += [(f"machine, {name}", value) for name, value in card["machine"].items()]
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{number_of(value)}</td></tr>' for name, value in lines)
    shares = [
        (f"{split}, {name}", of_class["rows"], of_class["share"])
        for split, part in content["rows"].items()
        for name, of_class in part["classes"].items()
    ]
    features = [
        (line["feature"], line["kind"], line["missing"], line.get("lowest"), line.get("median"), line.get("highest"),
         line.get("categories"))
        for line in content["features"] or []
    ]  # fmt: skip
    head = ("feature", "kind", "missing", "lowest", "median", "highest", "categories")
    limits = "".join(f"<li>{escape(limit)}</li>" for limit in card["limits"])
    verify = "".join(f"<li><code>{escape(command)}</code></li>" for command in card["verify"])
    return (
        _wide(f"<tbody>{rows}</tbody>", "Facts of the run")
        + f"<h3>Limits</h3><ul>{limits}</ul><h3>How to verify</h3><ul>{verify}</ul>"
        + table_of(("rows", "count", "share"), shares, "Rows and classes")
        + (table_of(head, features, "Columns in the training rows") if features else "")
        + figures_in(figures, "training")
    )
