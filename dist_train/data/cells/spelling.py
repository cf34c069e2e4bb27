"""One text for each value of a category: 1.50 of a decimal and 1.5 of a double are one number, true and 1 one truth.

What a text means depends on the column: `1.10` and `1.1` are one number where all categories are numbers, and two
versions where they are not. So texts are compared as values only within a column whose categories all are of one
kind: booleans, numbers, or dates and times in ISO 8601. Others are compared as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal

Form = Callable[[str], str | None]
"""A text -> the canonical text of the value that it means, or None where it is none of the kind."""

_TRUE, _FALSE = ("true", "t"), ("false", "f")
_DIGITS = {"1": "true", "0": "false"}
_NUMBER = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_ANY_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_MOMENT = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ]([0-9]{2}:[0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,9}))?)? ?(Z|UTC|[+-][0-9]{2}:?[0-9]{2})?)?"
)
# Beyond, a number is written with an exponent.
_MAX_PLAIN_DIGITS = 40


def canonical_boolean(text: str) -> str | None:
    """`true` or `false`, for 1 and 0 as well."""
    word = text.strip().lower()
    if word in _TRUE or word in _FALSE:
        return "true" if word in _TRUE else "false"
    number = canonical_number(text)
    return None if number is None else _DIGITS.get(number)


def canonical_number(text: str) -> str | None:
    """Digits without an exponent and without zeros that say nothing: `1.5` for 1.50, 15e-1 and +01.5."""
    if not _ANY_NUMBER.fullmatch(text.strip()):
        return None
    value = Decimal(text.strip())
    if not value:
        return "0"
    _, digits, exponent = value.normalize().as_tuple()
    assert isinstance(exponent, int)
    plain = max(len(digits) + exponent, -exponent) <= _MAX_PLAIN_DIGITS
    return format(value.normalize(), "f") if plain else str(value.normalize()).lower()


def canonical_plain_number(text: str) -> str | None:
    """The same for a text without a plus sign and without zeros in front, which codes have and numbers do not."""
    return canonical_number(text) if _NUMBER.fullmatch(text.strip()) else None


def canonical_moment(text: str) -> str | None:
    """A date; with its time where that is not midnight, of the zone UTC where the text names a zone."""
    found = _MOMENT.fullmatch(text.strip())
    if not found:
        return None
    day, minute, second, fraction, zone = found.groups()
    offset = "+00:00" if zone in (None, "Z", "UTC") else zone
    try:
        moment = datetime.fromisoformat(f"{day}T{minute or '00:00'}:{second or '00'}{offset}").astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    time, part = f"{moment:%H:%M:%S}", (fraction or "").rstrip("0")
    time = f" {time}{'.' if part else ''}{part}"
    utc = "" if zone is None else " UTC"
    return f"{moment:%Y-%m-%d}{'' if time == ' 00:00:00' else time}{utc}"


def form_of(words: Collection[str]) -> Form | None:
    """How the categories of a column are to be compared; None: as they are."""
    if not words:
        return None
    forms: Mapping[Form, Callable[[str], bool]] = {
        canonical_number: lambda word: canonical_plain_number(word) is not None,
        canonical_boolean: lambda word: canonical_boolean(word) is not None,
        canonical_moment: lambda word: canonical_moment(word) is not None,
    }
    return next((form for form, fits in forms.items() if all(map(fits, words))), None)


def merged(counts: Counter[str | None]) -> Counter[str | None]:
    """Counts of the texts of a column -> counts of its categories, each in its canonical text; None: missing."""
    form = form_of([word for word in counts if word is not None])
    if form is None:
        return counts
    result: Counter[str | None] = Counter()
    for word, count in counts.items():
        result[None if word is None else form(word)] += count
    return result


def alike(words: Sequence[str | None], categories: Sequence[str], *, typed: bool) -> dict[str, int]:
    """Texts that are no category, and mean one all the same -> its index.

    `typed`: the texts were numbers or booleans in their file, so that a category that is a number is meant even where
    other categories are none. A text that could mean two categories means neither.
    """
    form = form_of(categories) or (canonical_number if typed else str.strip)
    meanings: dict[str, list[int]] = {}
    for index, category in enumerate(categories):
        meanings.setdefault(_meaning(category, form), []).append(index)
    found = {}
    for word in words:
        places = meanings.get(_meaning(word, form), []) if word is not None else []
        if word is not None and len(places) == 1:
            found[word] = places[0]
    return found


def _meaning(word: str, form: Form) -> str:
    """The canonical text; for numbers, true is 1 and false 0; a text of another kind means itself."""
    meaning = form(word)
    if meaning is None and form is canonical_number:
        truth = canonical_boolean(word)
        meaning = None if truth is None else str(int(truth == "true"))
    return word if meaning is None else meaning
