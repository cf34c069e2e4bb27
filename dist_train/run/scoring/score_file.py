"""Score a file of any size into another file, on all ranks, in bounded memory; what was killed is continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import polars as pl
from torch import Tensor

from dist_train import __version__
from dist_train.data.encoding.unfamiliar import Unfamiliar
from dist_train.data.tables.chunks import ChunkedFile
from dist_train.errors import TrainingFault, UserError
from dist_train.run.scoring.explanation import names_of_reasons, reasons_table
from dist_train.run.scoring.partial_scores import PartialScores, require_writable
from dist_train.run.scoring.predictor import Predictor
from dist_train.run.scoring.rounds import Scored
from dist_train.system.console import log
from dist_train.system.progress_bar import progress_bar


def score_file(
    predictor: Predictor,
    source: Path,
    output: Path,
    keep: Sequence[str] = (),
    reasons: int = 0,
    positive_class: str | None = None,
    *,
    refuse_unfamiliar: bool = False,
) -> tuple[int, Unfamiliar] | None:
    """Write the columns `keep`, `probability_<class>` for each class and `predicted_class` for each row of a file.

    With `reasons`, those of `run.explanation.reasons_table` too, so many of class `positive_class`.

    The number of rows, and what the model has not seen the like of in them, on rank 0; None on other ranks. Called by
    all ranks. The output has the same bytes for every number of ranks, and where it was continued.

    Raises:
        UserError: the file cannot be read, a column is missing, a cell cannot be read, the output cannot be written,
            or the rows are unlike those of training where that is to be refused.
    """
    collectives = predictor.collectives
    rows = predictor.chunked(source, keep)
    explainer = predictor.explainer(positive_class) if reasons else None

    def begin() -> tuple[int, int | None]:
        require_writable(output, {"the input": source, "the data of the run": Path(predictor.config.data.path)})
        _require_other_names(predictor, keep, reasons)
        total = rows.check()
        partial = PartialScores(output, _identity(predictor, rows) | explained, rows.rows_of_chunk)
        if partial.rows:
            log.info("%s: the first %d rows were scored before: it is continued", output, partial.rows)
        opened.append(partial)
        return partial.rows, total

    opened: list[PartialScores] = []
    explained = {"reasons": reasons, "reasons_for": explainer.positive_class if explainer else None}
    done, total = collectives.on_rank_zero(begin)
    try:
        with progress_bar("scored", total, "rows", shown=collectives.is_main) as show:
            show(done)
            for scored in predictor.scored(rows, done, explainer, reasons):
                collectives.on_rank_zero(lambda scored=scored: _append(opened[0], predictor, scored))  # type: ignore[misc]
                show(scored.rows if scored else 0)
        if refuse_unfamiliar:
            collectives.on_rank_zero(lambda: _require_familiar(opened[0].unfamiliar, source))
        collectives.on_rank_zero(lambda: opened[0].finish())
    except (UserError, TrainingFault):
        for partial in opened:
            partial.discard()
        raise
    if not opened:
        return None
    predictor.tell(opened[0].unfamiliar, drift=True)
    return opened[0].rows, opened[0].unfamiliar


def scores_of(predicted: Tensor, class_names: Sequence[str]) -> pl.DataFrame:
    """`probability_<class>` for each class and `predicted_class`, of probabilities (rows, classes)."""
    columns = {f"probability_{name}": predicted[:, i].numpy() for i, name in enumerate(class_names)}
    winners = [class_names[i] for i in predicted.argmax(1).tolist()]
    return pl.DataFrame(columns).with_columns(pl.Series("predicted_class", winners, dtype=pl.String))


def _require_familiar(unfamiliar: Unfamiliar, source: Path) -> None:
    lines = unfamiliar.lines()
    if lines:
        raise UserError(f"{source}: is unlike the training rows (--refuse-unfamiliar): {'; '.join(lines)}")


def _identity(predictor: Predictor, rows: ChunkedFile) -> dict[str, object]:
    """What the bytes of the output depend on."""
    found = rows.file.stat()
    return {
        "input": str(rows.file.resolve()),
        "size": found.st_size,
        "modified_ns": found.st_mtime_ns,
        **{name: value for name, value in asdict(rows).items() if name != "file"},
        "model": predictor.fingerprint,
        "device": predictor.collectives.device.type,
        "dist_train": __version__,
    }


def _append(partial: PartialScores, predictor: Predictor, scored: Scored | None) -> None:
    assert scored is not None  # on rank 0
    found = [scored.kept, scores_of(scored.probabilities, predictor.class_names)]
    if scored.reasons is not None:
        found.append(reasons_table(scored.reasons, predictor.input_columns))
    partial.append(pl.concat(found, how="horizontal"), scored.unfamiliar)


def _require_other_names(predictor: Predictor, keep: Sequence[str], reasons: int) -> None:
    own = {"predicted_class", *(f"probability_{name}" for name in predictor.class_names)}
    own |= set(names_of_reasons(reasons)) if reasons else set()
    for index, name in enumerate(keep):
        if name in own:
            raise UserError(f"--keep {name}: the output has a column of that name of its own")
        if name in keep[:index]:
            raise UserError(f"--keep {name}: is given twice")
