"""The process groups of workers: what a worker has started ends with it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import Any

HAS_GROUPS = hasattr(os, "killpg")  # Windows has none


class WorkerGroups:
    """Knows the process group of each worker of a pool, and kills what a dead worker has left in its group.

    A library inside a worker may start another program. When the worker is killed, that program is not.

    Args:
        context: the ``multiprocessing`` context of the workers.

    Attributes:
        writer: what a worker passes to ``lead_group``.
    """

    def __init__(self, context: Any) -> None:
        self._reader, self.writer = context.Pipe(duplex=False)
        self._leaders: set[int] = set()  # workers whose group may have members

    def end_dead(self) -> None:
        """Kill the groups of the workers that are dead."""
        self._end(lambda leader: not _exists(leader))

    def end_all(self) -> None:
        """Kill all groups, once and for all. The workers must have been stopped."""
        self._end(lambda leader: True)
        self._reader.close()
        self.writer.close()

    def _end(self, is_over: Any) -> None:
        with suppress(EOFError, OSError):
            while self._reader.poll():
                self._leaders.add(int(self._reader.recv_bytes()))
        for leader in [leader for leader in self._leaders if is_over(leader)]:
            self._leaders.discard(leader)
            with suppress(OSError):  # nobody is left
                os.killpg(leader, signal.SIGKILL)


def lead_group(writer: Any) -> None:
    """Make this worker the leader of a process group of its own, and tell its pool. It stays in its session."""
    if HAS_GROUPS:
        with suppress(OSError):
            os.setpgid(0, 0)
            writer.send_bytes(str(os.getpid()).encode())


def end_own_group() -> None:
    """Kill this worker and what it has started."""
    if HAS_GROUPS and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process has the number now
        pass
    return True
