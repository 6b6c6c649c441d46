"""The process that compares mathematics: a line of JSON [truth, output] in, a line [equal, is mathematics] out.

It is run as a file, so that it imports math-verify and nothing of this package.
"""

from __future__ import annotations

import json
import logging
import random
import re
import sys
from typing import Any

MEMORY = 2**31  # bytes that the process may have
_MARKED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")  # text that says where its LaTeX is


def main(cpu_seconds: float) -> None:
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)

    def read(text: str) -> Any:
        return parse(text, parsing_timeout=None, raise_on_error=False)

    def equal(truth: Any, output: Any) -> bool:
        return bool(verify(truth, output, timeout_seconds=None, raise_on_error=False))

    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    limit_memory()
    equal(read("$\\frac{1}{2}$"), read("0.5"))  # The first comparison loads the grammar, which takes a second.
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        truth, output = json.loads(line)
        random.seed(0)
        limit_time(cpu_seconds)
        try:
            truths, outputs = ([read(form) for form in forms(text)] for text in (truth, output))
            right = any(equal(t, o) for t in truths for o in outputs if t and o)
            found = any(not isinstance(part, str) for reading in outputs for part in reading)  # text is no mathematics
        except Exception:  # math-verify raises on some inputs in spite of raise_on_error
            right, found = False, False
        limit_time(0)
        print(json.dumps([right, found]), file=replies, flush=True)


def forms(text: str) -> list[str]:
    """Return what to read of a text: as LaTeX if it does not say where its LaTeX is, and as it stands."""
    return [text] if _MARKED.search(text) else [f"${text}$", text]


def limit_time(seconds: float) -> None:
    """End the process when it has computed for so many seconds; 0: take the limit off.

    The signal has no handler, so that it also ends a single operation on huge numbers.
    """
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


if __name__ == "__main__":
    main(float(sys.argv[1]))
