"""Open questions, which are answered in sentences. A judge that reads them would take the place of ``score``."""

from __future__ import annotations

from collections.abc import Callable

from videor1.errors import ConfigError
from videor1.rewards.rouge import any_script_rouge, word_rouge
from videor1.rewards.structured import Score


def score(output: str, truth: str, *, lenient: bool = False) -> Score:
    """Return the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, as of ``free-form``; ``lenient`` reads every script."""
    return Score(max(strict_rouge(output, truth), lenient_rouge(output, truth) if lenient else 0.0))


def strict_rouge(output: str, truth: str) -> float:
    """Return ROUGE over words of ASCII letters and digits."""
    return _guarded(word_rouge, output, truth)


def lenient_rouge(output: str, truth: str) -> float:
    """Return ROUGE over characters of other scripts; 0 for two texts that have none."""
    return 0.0 if output.isascii() and truth.isascii() else _guarded(any_script_rouge, output, truth)


def _guarded(compare: Callable[[str, str], float], output: str, truth: str) -> float:
    try:
        return compare(output, truth)
    except ConfigError:
        raise
    except Exception:  # NLTK's stemmer fails on some strings that are not words. Video-R1's code gives 0 here too.
        return 0.0
