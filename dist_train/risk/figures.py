"""Figures of a report, drawn by matplotlib: SVG for the page, PNG for a slide."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from dist_train.errors import UserError

# A colour that stands for the page's own text colour in an SVG, light or dark.
_INK = "#010203"
_FIRST, _SECOND, _THIRD = "#0f7ac0", "#d1660f", "#7a7a7a"
_STYLE: dict[Any, Any] = {
    "figure.figsize": (5.4, 3.6),
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.bbox": "tight",
}
_INKED: tuple[Any, ...] = (
    "text.color",
    "axes.edgecolor",
    "axes.labelcolor",
    "xtick.color",
    "ytick.color",
    "axes.titlecolor",
)

Figures = dict[str, tuple[str, str, bytes]]
"""Name -> what it shows in words, the SVG element, and the PNG file."""


def require_matplotlib() -> None:
    """UserError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            'the report needs matplotlib, which is not installed: pip install "dist_train[report]"'
        ) from None


def figures_of(content: Mapping[str, Any]) -> Figures:
    """Every figure that the numbers of a report have something for."""
    found: Figures = {}
    for name, (words, draw) in _FIGURES.items():
        picture = drawn(name, lambda axes, draw=draw: draw(axes, content))  # type: ignore[misc]
        if picture is not None:
            found[name] = (words, *picture)
    for number, line in enumerate(content.get("dependence") or [], 1):
        name = f"dependence_{number}"
        picture = drawn(name, lambda axes, line=line: _draw_dependence(axes, line, content["positive_class"]))  # type: ignore[misc]
        if picture is not None:
            words = f"Partial dependence on {line['feature']}: the mean score if all rows had a value."
            found[name] = (words, *picture)
    return found


def drawn(name: str, draw: Callable[[Any], bool]) -> tuple[str, bytes] | None:
    """The SVG element and the PNG file of what is drawn on axes; None where `draw` finds nothing to draw."""
    with _axes(name) as (figure, axes):
        return (_svg(figure), _png(figure)) if draw(axes) else None


@contextmanager
def _axes(name: str) -> Iterator[tuple[Any, Any]]:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({**_STYLE, **dict.fromkeys(_INKED, _INK), "svg.hashsalt": name}):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots()


def _svg(figure: Any) -> str:
    stream = BytesIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue().decode()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    return re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)


def _png(figure: Any) -> bytes:
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return stream.getvalue()


def _draw_reliability(axes: Any, content: Mapping[str, Any]) -> bool:
    parts = content["probabilities"][content["reported_on"]]
    axes.plot([0, 1], [0, 1], color=_THIRD, linestyle=":", label="true probabilities")
    for label, name, colour in (("own", "the model's own", _SECOND), ("shipped", "as shipped", _FIRST)):
        bins = parts[label]["bins"]
        means, rates = [b["mean_score"] for b in bins], [b["rate"] for b in bins]
        axes.plot(means, rates, marker="o", markersize=4, color=colour, label=name)
    highest = max(max(b["mean_score"], b["rate"]) for b in parts["shipped"]["bins"] + parts["own"]["bins"])
    axes.set(xlabel=f"mean probability of {content['positive_class']}", ylabel="observed rate")
    axes.set(xlim=(0, min(1, highest * 1.1)), ylim=(0, min(1, highest * 1.1)))
    axes.legend()
    return True


def _draw_roc(axes: Any, content: Mapping[str, Any]) -> bool:
    roc = content["roc"]
    if roc is None:
        return False
    axes.plot([0, 1], [0, 1], color=_THIRD, linestyle=":")
    axes.plot(roc["false_positive_rate"], roc["true_positive_rate"], color=_FIRST)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1))
    return True


def _draw_histogram(axes: Any, content: Mapping[str, Any]) -> bool:
    found = content["histogram"]
    for name, colour, label in (
        ("others", _THIRD, "others"),
        ("positive", _SECOND, content["positive_class"]),
    ):
        total = sum(found[name]) or 1
        axes.stairs([n / total for n in found[name]], found["edges"], fill=True, alpha=0.5, color=colour, label=label)
    axes.set(xlabel=f"probability of {content['positive_class']}", ylabel="share of the group")
    axes.legend()
    return True


def _draw_bands(axes: Any, content: Mapping[str, Any]) -> bool:
    bands = [band for band in content["bands"]["bands"] if "rate" in band]
    places = range(len(bands))
    rates = [band["rate"] for band in bands]
    errors = [
        [band["rate"] - band["interval"][0] for band in bands],
        [band["interval"][1] - band["rate"] for band in bands],
    ]
    axes.bar(places, rates, color=_FIRST, alpha=0.7, label="observed rate")
    axes.errorbar(places, rates, yerr=errors, fmt="none", ecolor=_INK, capsize=3)
    axes.plot(
        places, [band["mean_score"] for band in bands], "o", color=_SECOND, markersize=4, label="mean probability"
    )
    axes.set_xticks(list(places), [f"{band['to']:.2g}" for band in bands])
    axes.set(xlabel="band of scores, up to", ylabel=f"rate of {content['positive_class']}")
    axes.legend()
    return True


def _draw_lift(axes: Any, content: Mapping[str, Any]) -> bool:
    lines = [line for line in content["lift"] if line["capture"] is not None]
    depths = [0, *(line["depth"] for line in lines)]
    axes.plot([0, 1], [0, 1], color=_THIRD, linestyle=":", label="at random")
    axes.plot(
        depths, [0, *(line["capture"] for line in lines)], marker="o", markersize=4, color=_FIRST, label="capture"
    )
    axes.set(xlabel="share of rows, highest scores first", ylabel=f"share of {content['positive_class']} found")
    axes.set(xlim=(0, max(depths)), ylim=(0, 1))
    axes.legend()
    return bool(lines)


def _draw_beside(axes: Any, content: Mapping[str, Any]) -> bool:
    if not content["beside"]:
        return False
    models = content["beside"]["models"]
    others = [(name, line) for name, line in models.items() if line.get("difference_interval")]
    for place, (_, line) in enumerate(others):
        low, high = line["difference_interval"]
        axes.plot([low, high], [place, place], color=_FIRST)
        axes.plot(line["difference"], place, "o", color=_FIRST)
    axes.axvline(0, color=_THIRD, linestyle=":")
    axes.set_yticks(range(len(others)), [name for name, _ in others])
    axes.set(xlabel="log loss less that of this model, with 95 % interval", ylim=(-0.5, len(others) - 0.5))
    return bool(others)


def _draw_stability(axes: Any, content: Mapping[str, Any]) -> bool:
    features = content["stability"]["features"]
    lines = [line for line in features or [] if line["psi"]][:15][::-1]
    split = content["reported_on"]
    axes.barh(range(len(lines)), [line["psi"].get(split, 0.0) for line in lines], color=_FIRST)
    axes.set_yticks(range(len(lines)), [line["feature"] for line in lines])
    axes.axvline(0.1, color=_THIRD, linestyle=":")
    axes.set(xlabel=f"PSI, {split} against train (dotted: 0.1)")
    return bool(lines)


def _draw_importance(axes: Any, content: Mapping[str, Any]) -> bool:
    lines = ((content.get("importance") or {}).get("columns") or [])[:15][::-1]
    errors = [line["loss_std"] or 0.0 for line in lines]
    axes.barh(range(len(lines)), [line["loss"] for line in lines], xerr=errors, color=_FIRST, ecolor=_INK)
    axes.set_yticks(range(len(lines)), [line["feature"] for line in lines])
    axes.set(xlabel="rise of the log loss where the column is permuted")
    return bool(lines)


def _draw_dependence(axes: Any, line: Mapping[str, Any], positive: str) -> bool:
    known = [place for place, value in enumerate(line["values"]) if value is not None]
    numbers = not any(isinstance(line["values"][place], str) for place in known)
    places = [line["values"][place] if numbers else place for place in known]
    style = {"marker": "o", "markersize": 4} if not numbers else {}
    for row in line["rows"]:
        axes.plot(places, [row[place] for place in known], color=_THIRD, alpha=0.25, linewidth=0.7)
    axes.plot(places, [line["mean"][place] for place in known], color=_FIRST, **style)
    if None in line["values"]:
        missing = line["mean"][line["values"].index(None)]
        axes.axhline(missing, color=_SECOND, linestyle=":", label="missing")
        axes.legend()
    if not numbers:
        axes.set_xticks(places, [str(line["values"][place])[:14] for place in known], rotation=30, ha="right")
    axes.set(xlabel=line["feature"], ylabel=f"probability of {positive}")
    return bool(known)


def _draw_training(axes: Any, content: Mapping[str, Any]) -> bool:
    lines = content["training_curves"]
    for split, colour in (("train", _THIRD), ("valid", _FIRST)):
        if lines.get(split):
            steps, losses = zip(*lines[split], strict=True)
            axes.plot(steps, losses, color=colour, label=split)
    axes.set(xlabel="optimizer step", ylabel="loss")
    if any(lines.values()):
        axes.legend()
    return any(lines.values())


_FIGURES: dict[str, tuple[str, Callable[[Any, Mapping[str, Any]], bool]]] = {
    "reliability": ("Observed rate against mean probability, before and after calibration.", _draw_reliability),
    "roc": ("ROC curve: true positive rate against false positive rate.", _draw_roc),
    "scores": ("Distribution of the scores of the positive class and of the others.", _draw_histogram),
    "bands": ("Observed rate in each band of scores, with its 95 % interval, and the mean probability.", _draw_bands),
    "capture": ("Share of the positive class among the rows with the highest scores.", _draw_lift),
    "importance": ("Importance of the columns, by permutation, with one standard deviation.", _draw_importance),
    "beside": ("Log loss of other models less that of this one, with 95 % intervals.", _draw_beside),
    "stability": ("Population stability index of the features that moved most.", _draw_stability),
    "training": ("Training and validation loss by optimizer step.", _draw_training),
}
