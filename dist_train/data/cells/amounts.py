"""Texts of amounts -> numbers: separators of thousands, decimal commas, currencies, percent signs, accounting signs."""

from __future__ import annotations

import re

import polars as pl

# ISO 4217 codes of the currencies that are traded most, and the signs and short forms that stand beside amounts.
_CODES = (
    "AED|ARS|AUD|BDT|BGN|BRL|CAD|CHF|CLP|CNY|COP|CZK|DKK|EGP|EUR|GBP|HKD|HUF|IDR|ILS|INR|ISK|JPY|KES|KRW|KWD|MAD|MXN|"
    "MYR|NGN|NOK|NZD|PEN|PHP|PKR|PLN|QAR|RON|RSD|RUB|SAR|SEK|SGD|THB|TRY|TWD|UAH|USD|VND|ZAR"
)
_SIGNS = [r"R\$", r"[A-Z]{1,2}\$", *"$€£¥₹₽₩₺₫₪₴₦฿₱", "kr", "zł", "Kč", "Ft", "лв", "Rs"]
_UNIT = "(?:" + "|".join([*(s if len(s) > 1 else re.escape(s) for s in _SIGNS), _CODES]) + ")"

# Spaces that programs put into numbers, and the dashes that they write for a minus.
_SPACES = "[\u00a0\u2007\u2009\u202f]"
_MINUSES = "[\u2212\u2012\u2013]"
_APOSTROPHES = "[\u2019\u02bc]"


def _number(group: str, decimal: str) -> str:
    """Pattern of an unsigned number. No group begins a number with zero; Indian groups have two digits."""
    groups = "|".join([rf"(?:{group}[0-9]{{2,3}})*{group}[0-9]{{3}}", r"(?: [0-9]{3})+", r"(?:'[0-9]{3})+"])
    return rf"(?:(?:[1-9][0-9]{{0,2}}(?:{groups})|[0-9]+)(?:{decimal}[0-9]*)?|{decimal}[0-9]+)"


def _pattern(group: str, decimal: str) -> str:
    number = _number(group, decimal)
    amount = rf"(?:{_UNIT} ?{number}|{number}(?: ?(?:{_UNIT}|%))?)"
    signed = [
        rf"[+-]? ?{amount}",
        rf"{amount} ?-",
        rf"\( ?{amount} ?\)",
        rf"{_UNIT} ?[+-] ?{number}",
        rf"{_UNIT} ?\( ?{number} ?\)",
        rf"[+-]?{number}[eE][+-]?[0-9]+",
    ]
    return "^(?:" + "|".join(signed) + ")$"


_PATTERNS = {".": _pattern(",", r"\."), ",": _pattern(r"\.", ",")}


def plain_spelling(texts: pl.Series) -> pl.Series:
    """Without the spaces around; with the space, the minus and the apostrophe of ASCII for those that look alike."""
    texts = texts.str.strip_chars()
    if texts.str.contains("[^\x00-\x7f]").any():
        for strange, plain in ((_SPACES, " "), (_MINUSES, "-"), (_APOSTROPHES, "'")):
            texts = texts.str.replace_all(strange, plain)
    return texts


def fits_amount(texts: pl.Series, decimal: str) -> pl.Series:
    """Which texts are amounts with the decimal mark `decimal`; texts as `plain_spelling` gives them."""
    return texts.str.contains(_PATTERNS[decimal])


def parse_amounts(texts: pl.Series, decimal: str) -> pl.Series:
    """Float64, null where a text is no amount with the decimal mark `decimal`; `9.51%` is 9.51.

    `texts` as `plain_spelling` gives them.
    """
    texts = texts.set(~fits_amount(texts, decimal), None)
    powers = texts.str.extract("([eE][+-]?[0-9]+)$").fill_null("") if texts.str.contains("[0-9][eE]").any() else None
    if powers is not None:
        texts = texts.str.replace("[eE][+-]?[0-9]+$", "")
    digits = texts.str.replace_all(f"[^0-9{decimal}]", "").str.replace(",", ".", literal=True)
    values = (digits if powers is None else digits + powers).cast(pl.Float64, strict=False)
    negative = texts.str.contains("^[^0-9]*[-(]|-$")
    return values.zip_with(~negative.fill_null(False), -values).rename(texts.name)


def units_of(texts: pl.Series) -> pl.Series:
    """The currency or the percent sign that stands in an amount; empty where there is none."""
    return texts.str.extract(f"({_UNIT}|%)").fill_null("")
