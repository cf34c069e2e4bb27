"""A file of any size in chunks of rows, cut alike for every reader: the columns of a model, and columns to keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from dist_train.data.files.readers import cells_are_text, num_rows_of, read_header, read_rows
from dist_train.data.tables.table import TRAINED_ON, require_names

_ROWS_OF_A_CHUNK = 1 << 14
_CELLS_OF_A_CHUNK = 1 << 21


@dataclass(frozen=True)
class Chunk:
    """Rows of a file from row `first_row` on: the columns that a model reads, and those that are kept as they are."""

    first_row: int
    features: pl.DataFrame
    kept: pl.DataFrame


@dataclass(frozen=True)
class ChunkedFile:
    """A file in chunks of `rows_of_chunk` rows, a multiple of `multiple_of`, or at most `most`; the last one has fewer.

    The model reads `columns`; `keep` are columns that go into the output. Words of `missing_values` are missing cells
    of the former alone: a kept cell stays as it is, an empty one of a text file is null.
    """

    file: Path
    columns: Sequence[str]
    keep: Sequence[str]
    missing_values: Sequence[str]
    multiple_of: int
    most: int | None = None

    @property
    def rows_of_chunk(self) -> int:
        """At most so many cells that a chunk of a wide table is no larger than that of a narrow one."""
        width = max(1, len(self.columns) + len(self.keep))
        most = self.most or _ROWS_OF_A_CHUNK
        multiple = min(self.multiple_of, self.most or self.multiple_of)
        return max(1, min(most, _CELLS_OF_A_CHUNK // width) // multiple) * multiple

    def check(self) -> int | None:
        """The number of rows, None where only reading them tells it.

        Raises:
            UserError: the file cannot be read, or a column is not there.
        """
        header = read_header(self.file)
        require_names(header, self.columns, str(self.file), TRAINED_ON)
        require_names(header, self.keep, str(self.file), "--keep names it")
        return num_rows_of(self.file)

    @property
    def _reads_words(self) -> bool:
        """Whether the words for missing cells are read as they are: a reader of text takes them in all its columns."""
        return bool(self.keep) and cells_are_text(self.file)

    def chunks(self, first_row: int = 0) -> Iterator[Chunk]:
        """The chunks from row `first_row` on, which begins one; at least one, without rows where the file has none.

        Raises:
            UserError: the file cannot be read.
        """
        row = 0
        for frame in self._cut():
            if row >= first_row:
                yield self._chunk(frame, row)
            row += frame.height

    def _chunk(self, frame: pl.DataFrame, row: int) -> Chunk:
        features = frame.select(self.columns)
        if self._reads_words:
            words = list(self.missing_values)
            features = features.with_columns(c.set(c.is_in(words), None) for c in features.get_columns())
        return Chunk(row, features, frame.select(self.keep))

    def _cut(self) -> Iterator[pl.DataFrame]:
        rows, height, whole = self.rows_of_chunk, 0, False
        parts: list[pl.DataFrame] = []
        words = [word for word in self.missing_values if not word] if self._reads_words else self.missing_values
        for frame in read_rows(self.file, words, columns=[*self.columns, *self.keep]):
            parts.append(frame)
            height += frame.height
            while height >= rows:
                joined = pl.concat(parts)
                yield joined.head(rows)
                height -= rows
                parts, whole = [joined.tail(height)], True
        if height or not whole:
            yield pl.concat(parts)
