"""ROUGE of two texts: over words, as the reference scores them, or over any script's characters.

ROUGE-1, ROUGE-2 and the F1 are the rouge-score package's. Its ROUGE-L fills a table in Python, which takes a minute for
6,000 words; the length of the longest common subsequence is rapidfuzz's here, which is the same number at once.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rapidfuzz.distance import LCSseq

from videor1.errors import ConfigError

MAX_TOKENS = 16384  # Of a longer text the first so many are compared, in about a second.

_ASCII_WORD = re.compile("[a-z0-9]+")  # as the package splits a text in lower case


def word_rouge(output: str, truth: str) -> float:
    """Return the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L over words of ASCII letters and digits, with stemming."""
    return _mean_f1(_words(output), _words(truth))


def any_script_rouge(output: str, truth: str) -> float:
    """Return the same mean over words of Latin letters and digits, and over single characters of other scripts."""
    return _mean_f1(_words_and_characters(output), _words_and_characters(truth))


def self_rouge(text: str, *, any_script: bool) -> float:
    """Return what :func:`word_rouge` or :func:`any_script_rouge` gives for a text and itself, without computing it."""
    tokens = _words_and_characters(text) if any_script else _words(text)
    if next(tokens, None) is None:
        return 0.0
    return 2 / 3 if next(tokens, None) is None else 1.0  # one token has no pair for ROUGE-2


def _mean_f1(output: Iterable[str], truth: Iterable[str]) -> float:
    rouge = _package()
    o, g = (rouge.stemmed(_first(tokens)) for tokens in (output, truth))
    scores = rouge.ngrams.score(" ".join(g), " ".join(o))
    common = LCSseq.similarity(g, o)
    longest = rouge.fmeasure(common / len(o), common / len(g)) if o and g else 0.0
    mean = (scores["rouge1"].fmeasure + scores["rouge2"].fmeasure + longest) / 3
    return max(0.0, min(1.0, mean))


def _first(tokens: Iterable[str]) -> list[str]:
    found = list(itertools.islice(tokens, MAX_TOKENS + 1))
    if len(found) > MAX_TOKENS:
        warnings.warn(f"ROUGE compares the first {MAX_TOKENS} words or characters of a longer text", stacklevel=2)
    return found[:MAX_TOKENS]


def _words(text: str) -> Iterator[str]:
    return (found[0] for found in _ASCII_WORD.finditer(text.lower()))


def _words_and_characters(text: str) -> Iterator[str]:
    """Yield words of Latin letters and digits, and every other letter or pictograph with the marks that follow it."""
    word = ""
    for character in _characters(unicodedata.normalize("NFKC", text).casefold()):
        kind = unicodedata.category(character[0])
        if kind == "Nd" or _is_latin(character[0]):
            word += str(unicodedata.decimal(character[0])) if kind == "Nd" else character
            continue
        if word:
            yield word
        word = ""
        if kind[0] in "LN" or kind == "So":
            yield character
    if word:
        yield word


def _characters(text: str) -> Iterator[str]:
    """Yield each character with the combining marks that follow it."""
    start = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or unicodedata.category(text[end])[0] != "M":
            yield text[start:end]
            start = end


@functools.lru_cache(4096)
def _is_latin(character: str) -> bool:
    return character.isalpha() and unicodedata.name(character, "").startswith("LATIN ")


class _Package:
    """What is taken from the rouge-score package."""

    def __init__(self) -> None:
        # It imports nltk and scipy, which takes seconds: a process that only decodes and checks data does without.
        try:
            from rouge_score.rouge_scorer import RougeScorer
            from rouge_score.scoring import fmeasure
            from rouge_score.tokenizers import DefaultTokenizer
        except Exception as error:  # NLTK's import fails for a user without a home folder
            raise ConfigError(
                f"free-form answers are scored by the package rouge-score, but its import failed: {error}; set HOME to "
                "a folder that can be written"
            ) from error

        self.fmeasure: Callable[[float, float], float] = fmeasure
        self.ngrams: Any = RougeScorer(["rouge1", "rouge2"], tokenizer=self)
        self._words = DefaultTokenizer(use_stemmer=True)

    def stemmed(self, tokens: list[str]) -> list[str]:
        """Return the tokens with the package's stems in place of its words; it would drop other scripts."""
        return [stem for token in tokens for stem in (self._words.tokenize(token) if token.isascii() else [token])]

    def tokenize(self, text: str) -> list[str]:
        """Split what stands between blanks, as the package asks its tokenizer to."""
        return text.split()


_package = functools.cache(_Package)
