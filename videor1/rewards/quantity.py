"""Reading a number with its unit, as people and LaTeX write it: "12 cm", "$\\frac{1}{2}$", "-$1,200", "1.5 × 10³"."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass

MAX_CHARACTERS = 200  # A longer text is no number; this also bounds the time.


@dataclass(frozen=True)
class Quantity:
    """A finite number and its unit."""

    value: float
    unit: str  # in one spelling per unit: "cm", "$", "%", "degree"; "" where none is written

    def agrees(self, other: Quantity) -> bool:
        """Return whether the units are equal or one is missing; a percentage agrees with a percentage only."""
        units = {self.unit, other.unit}
        if "%" in units or "" not in units:
            return len(units) == 1 or any(units == {word, unit} for word in _VAGUE for unit in _VAGUE[word])
        return True


def read_quantity(text: str) -> Quantity | None:
    """Read a text that is a number and nothing else but its unit; None if it is anything more or less.

    A number is written in digits of any script, with or without thousands separators (a comma, or a blank, before each
    group of three digits), as a fraction ("3/4", "1 1/2", "½"), with an exponent ("1.5e3", "1.5 × 10^3"), with π or a
    square root ("2π/3", "√3/2"), or in the LaTeX of these. Its unit is a currency before it, or up to four words or
    symbols after it.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    sign, currency, text = _prefix(_plain(text))
    number = _NUMBER.match(text)
    if number is None:
        return None
    value, unit = _value(number), _unit(text[number.end() :])
    if value is None or unit is None or (currency and unit.name not in ("", currency)):
        return None
    value *= sign * unit.factor
    return Quantity(value, currency or unit.name) if math.isfinite(value) else None


_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT = re.compile(f"[{''.join(map(chr, _SUPERSCRIPTS))}]+")
_SIGNS = str.maketrans("−–∕⁄×⋅·∙٫٬٪º˚", "--//****.,%°°")
_ENDS = " .,;:。"
_WRAPPED = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
_LATEX = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|displaystyle|limits)(?![a-z])|\\!", ""),
        (r"\\(?:[,;:> ]|q?quad(?![a-z]))|~", " "),
        (r"\{,\}", ","),
        (r"\\(?:text|textrm|textbf|mathrm|mathbf|mathit|operatorname|mbox|rm|boxed|fbox)\s*\{([^{}]*)\}", r"\1"),
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\circ|\\degree(?![a-z])", "°"),
        (r"\\(?:times|cdot)(?![a-z])", "*"),
        (r"\\pounds(?![a-z])", "£"),
        (r"\\euro(?![a-z])", "€"),
        (r"\\mu(?![a-z])", "μ"),
        (r"\\Omega(?![a-z])", "Ω"),
        (r"\\pi(?![a-z])", "π"),
        (r"\\sqrt\s*(?:\{([^{}]*)\}|(\d))", r"√(\1\2)"),
        (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r" \1\2/\3\4"),
        (r"\^\s*\{([^{}]*)\}", r"^\1"),
        (r"\\([%$&#_])", r"\1"),
    )
)


def _plain(text: str) -> str:
    """Return the text in a plain notation: no LaTeX, ASCII digits and signs, single blanks, no mark at the end."""
    text = text.strip().translate(_SIGNS)
    text = _SUPERSCRIPT.sub(lambda found: "^" + found[0].translate(_SUPERSCRIPTS), text)
    text = _VULGAR.sub(lambda found: f" {unicodedata.normalize('NFKC', found[0])}", text)
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    for start, end in _WRAPPED:
        inner = text.rstrip(_ENDS)
        if inner.startswith(start) and inner.endswith(end) and len(inner) > len(start) + len(end):
            text = inner[len(start) : -len(end)].strip()
    if "\\" in text or "{" in text:
        for pattern, replacement in (*_LATEX, *_LATEX):  # twice: braces may stand in braces
            text = pattern.sub(replacement, text)
    return " ".join(text.rstrip(_ENDS).split())


_CURRENCIES = {"$": "$", "US$": "$", "USD": "$", "€": "€", "EUR": "€", "£": "£", "GBP": "£", "¥": "¥", "JPY": "¥"}
_CURRENCIES |= {"₹": "₹", "INR": "₹", "Rs": "₹", "₩": "₩", "KRW": "₩", "₽": "₽", "RUB": "₽", "CNY": "yuan"}
_CURRENCIES |= {name: name.casefold() for name in ("CHF", "AUD", "CAD", "HKD", "A$", "C$", "HK$", "₫", "₺", "₪", "฿")}
_CURRENCY = re.compile("(" + "|".join(map(re.escape, sorted(_CURRENCIES, key=len, reverse=True))) + r")\.?\s*")
_SIGN = re.compile(r"([+-])\s*")


def _prefix(text: str) -> tuple[float, str, str]:
    """Split off a sign and a currency, in either order; return (1 or -1, the currency or "", the rest)."""
    sign, currency = "", ""
    for _ in range(2):
        if not sign and (found := _SIGN.match(text)):
            sign, text = found[1], text[found.end() :]
        if not currency and (found := _CURRENCY.match(text)):
            currency, text = _CURRENCIES[found[1]], text[found.end() :]
    return (-1.0 if sign == "-" else 1.0), currency, text


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?! ?[/\d])|\d+)(?:\.\d*)?|\.\d+"
_TERM = rf"(?:(?:\d*\.?\d+ ?\*? ?)?(?:π|√ ?\(?\d+(?:\.\d+)?\)?)|(?:{_DIGITS})(?:e[+-]?\d{{1,4}})?)"
_NUMBER = re.compile(
    rf"(?:(?P<whole>\d+) )?(?P<top>{_TERM}) ?/ ?(?P<minus>-?)(?P<bottom>{_TERM})(?![\d,.]*\d| ?/)"
    r"|10 ?\^ ?\(?(?P<ten>[+-]?\d{1,4})\)?"
    rf"|(?P<plain>{_TERM})(?: ?[*x] ?10 ?\^ ?\(?(?P<power>[+-]?\d{{1,4}})\)?)?(?![\d.,]*\d| ?/ ?\d)",
    re.ASCII | re.IGNORECASE,
)


def _value(number: re.Match[str]) -> float | None:
    """Return the value of a match of _NUMBER; None for a division by zero or an improper mixed number."""
    try:
        if number["ten"] is not None:
            return 10.0 ** int(number["ten"])
        if number["plain"] is not None:
            return _term(number["plain"]) * 10.0 ** int(number["power"] or 0)
        fraction = _term(number["top"]) / _term(number["bottom"])
    except (ZeroDivisionError, OverflowError):
        return None
    if number["whole"] is None:
        return -fraction if number["minus"] else fraction
    return int(number["whole"]) + fraction if 0 < fraction < 1 and not number["minus"] else None


def _term(text: str) -> float:
    """Return the value of a match of _TERM: digits, or π or a root with a factor before it."""
    for mark in "π√":
        factor, found, inside = text.partition(mark)
        if found:
            value = math.pi if mark == "π" else math.sqrt(float(inside.strip(" ()")))
            return value * float(factor.strip(" *") or 1)
    return float(text.replace(",", "").replace(" ", ""))


@dataclass(frozen=True)
class _Unit:
    """What stands after a number: its unit in one spelling, and the factor of a word like "million" before it."""

    name: str
    factor: float = 1.0


_FACTORS = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12, "dozen": 12.0}
_WORD = re.compile(r"(?:[a-z°%'\"$]|[^\x00-\x7f])(?:[a-z°%'\"$.*/^()-]|[^\x00-\x7f]|(?<=\S)\d)*", re.IGNORECASE)
# Words with which the text says another number than the one it begins with, or no number at all.
_NOT_A_UNIT = re.compile(
    r"x|e|i|or|and|to|not?|but|plus|minus|times|over|is|are|was|half|halves|thirds?|quarters?|fourths?|fifths?",
    re.IGNORECASE,
)
_SPELLINGS = {
    "cm": "centimeter centimetre cms",
    "mm": "millimeter millimetre mms",
    "km": "kilometer kilometre kms",
    "m": "meter metre",
    "in": "inch inches \" ''  ′′",
    "ft": "foot feet ' ′",
    "yd": "yard",
    "mi": "mile",
    "kg": "kilogram kilogramme kilo kgs",
    "g": "gram gramme",
    "mg": "milligram milligramme",
    "lb": "lbs",
    "oz": "ounce",
    "l": "liter litre",
    "ml": "milliliter millilitre",
    "ms": "millisecond",
    "s": "sec secs second",
    "min": "mins minute",
    "h": "hr hrs hour",
    "mi/h": "mph",
    "km/h": "kph kmh",
    "%": "percent pct",
    "degree": "° deg degs",
    "°c": "celsius",
    "°f": "fahrenheit",
    "$": "dollar usd us$",
    "€": "euro eur",
    "£": "gbp",
    "¥": "yen jpy",
    "₹": "rupee inr rs",
    "₩": "won krw",
    "₽": "ruble rouble rub",
    "yuan": "cny rmb",
}
_SAME = {spelling: unit for unit, spellings in _SPELLINGS.items() for spelling in spellings.split()}
_SAME |= {f"{name}s": _SAME.get(name, name) for name in (*_SPELLINGS, *_SAME) if len(name) > 2}
_VAGUE = {"pound": ("lb", "£"), "degree": ("°c", "°f")}  # a word that more than one unit is called


def _unit(text: str) -> _Unit | None:
    """Read what stands after a number; None if that is no unit."""
    words, factor = text.casefold().replace("per cent", "percent").split(), 1.0
    while words and words[0] in _FACTORS:
        factor *= _FACTORS[words.pop(0)]
    if len(words) > 4 or not all(map(_WORD.fullmatch, words)):
        return None
    if any(_NOT_A_UNIT.fullmatch(word.strip(".,()'\"")) for word in words):
        return None
    name = " ".join(_SAME.get(word, word) for word in words).replace(" per ", "/")
    name = re.sub(r"(?:degree |°)(?:c|°c)\b|°c", "°c", re.sub(r"(?:degree |°)(?:f|°f)\b|°f", "°f", name))
    name = re.sub(r"\b(?:square|sq) ([^ /*]+)", r"\1 2", name)
    name = re.sub(r"\b(?:cubic|cu) ([^ /*]+)", r"\1 3", name)
    return _Unit("".join(_one_spelling(part) for part in re.findall(r"[^ /*^\d]+|\S", name)), factor)


def _one_spelling(part: str) -> str:
    part = part.rstrip(".") or part
    if part in _SAME:
        return _SAME[part]
    return "" if part == "^" else part.removesuffix("s") if len(part) > 3 else part
