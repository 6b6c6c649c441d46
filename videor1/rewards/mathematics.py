"""Mathematics: numbers, fractions, LaTeX and formulas, compared by the package math-verify.

Sympy, beneath it, has inputs that take hours or all memory, and math-verify's own timeouts are signals, which work in a
process's main thread alone and not inside one long multiplication. So a process of its own compares, under limits of
CPU time and memory that the system enforces, and is started again where one ended it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

from videor1.errors import ConfigError
from videor1.rewards.structured import Score

MAX_LENGTH = 1024  # characters of an answer that are compared
CPU_SECONDS = 2  # of one comparison
WALL_SECONDS = 60.0  # of one comparison, where a busy machine gives the process little time; and of its start
_REMEMBERED = 65536  # comparisons whose results are kept


def score(output: str, truth: str, *, lenient: bool = False) -> Score:
    """Return 1 if the two are equal as mathematics (or, up to blanks, as text), else 0.

    "1/2", "0.5" and "$\\frac{1}{2}$" are equal; so are formulas and sets whose forms differ. The result depends on
    nothing but the two texts, unless the comparison hits a limit: then it is 0.

    Args:
        output, truth: the texts, with LaTeX in $...$ or plain.
        lenient: the same.
    """
    if not output:
        return Score(0.0, "no_answer")
    if output.strip(" $").lower().lstrip("+-") == "nan":
        return Score(0.0, "not_finite")
    if output.split() == truth.split():
        return Score(1.0)
    if max(len(output), len(truth)) > MAX_LENGTH:
        return Score(0.0, "too_slow")
    return _compared(output, truth)


@functools.lru_cache(_REMEMBERED)
def _compared(output: str, truth: str) -> Score:
    reply = _worker.ask(output, truth)
    if reply is None:
        return Score(0.0, "too_slow")
    right, read = reply
    return Score(float(right), "" if read else "not_math")


class _Worker:
    """The process that compares, one pair at a time; any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._owner = 0  # a fork of this process has no thread that reads, and starts a process of its own

    def ask(self, output: str, truth: str) -> tuple[bool, bool] | None:
        """Return (whether they are equal, whether the output is mathematics); None where a limit ended the process."""
        with self._lock:
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            assert self._process is not None
            pipe = self._process.stdin
            assert pipe is not None
            try:
                pipe.write(json.dumps([truth, output]) + "\n")
                pipe.flush()
                line = self._replies.get(timeout=WALL_SECONDS)
                if line:
                    right, read = json.loads(line)
                    return right, read
            except (OSError, queue.Empty):
                pass
            self.stop()
            return None

    def _start(self) -> None:
        self.stop()
        replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        process = subprocess.Popen(
            [sys.executable, "-P", "-u", str(Path(__file__).with_name("mathematics_worker.py")), str(CPU_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy's order of terms depends on hashes
            start_new_session=True,  # Ctrl-C is for the trainer, which ends the process in its turn
        )
        self._process, self._replies, self._owner = process, replies, os.getpid()
        threading.Thread(target=_forward, args=(process, replies), daemon=True, name="videor1-math").start()
        try:
            ready = replies.get(timeout=WALL_SECONDS)
        except queue.Empty:
            ready = ""
        if not ready:
            self.stop()
            raise ConfigError(
                f"the process that compares mathematics did not start ({sys.executable}); is math-verify installed? "
                "pip install 'math-verify[antlr4_13_2]'"
            )

    def stop(self) -> None:
        """End the process, if this one started it."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError, ValueError):
                    if pipe is not None:
                        pipe.close()


def _forward(process: subprocess.Popen[str], replies: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError, OSError):  # The pipe was closed.
        for line in process.stdout:
            replies.put(line)
    replies.put("")  # The process has ended.


_worker = _Worker()
atexit.register(_worker.stop)


def _after_fork() -> None:
    """Give a forked process a lock that no other thread of its parent holds."""
    global _worker
    _worker = _Worker()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
