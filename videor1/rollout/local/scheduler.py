"""Which branches are in flight: continuous batching within the KV cache's room. No tensors here.

A branch (all answers to one order of one prompt's frames) enters whole, so that its prompt is prefilled once; its
sequences leave one by one and free their slots at once. The prompt's tokens are freed with the last of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from videor1.rollout.local.kv_cache import Capacity, Spans
from videor1.rollout.protocol import Branch, Request


@dataclass(eq=False)
class RunningSequence:
    """One answer in flight: an entry of the decode batch, with a slot of the KV cache."""

    job: Job
    index: int  # in its branch
    slot: int
    place: int  # of its tokens in the rollout's buffers


@dataclass(eq=False)
class Job:
    """One branch of one request."""

    number: int  # of the request
    request: Request
    branch: Branch
    shuffled: bool
    start: int = -1  # of its prompt in the pool, once it has entered
    sequences: list[RunningSequence] = field(default_factory=list)  # in flight

    @property
    def length(self) -> int:
        return len(self.request.prompt.input_ids)

    @property
    def needed(self) -> bool | None:
        return self.request.judge.needed if self.shuffled and self.request.judge is not None else True


class Scheduler:
    """Branches wait in the order of the requests, ordered ones and those known to matter first.

    Args:
        eager: let shuffled branches of which it is not known yet whether they matter enter where there is room; else
            they enter only when nothing else is left to do. The first is right where a decode step costs the same for
            a few more sequences, the second where each one costs.
    """

    def __init__(self, requests: Sequence[Request], capacity: Capacity, *, eager: bool) -> None:
        self._eager = eager
        self._spans = Spans(capacity.prefix_tokens)
        self._slots = list(reversed(range(capacity.slots)))
        self.waiting = [
            Job(number, request, branch, shuffled)
            for number, request in enumerate(requests)
            for shuffled, branch in ((False, request.ordered), (True, request.shuffled))
            if branch is not None
        ]
        self.running: list[Job] = []
        self._places = 0

    def drop(self) -> tuple[list[Job], list[Job]]:
        """Branches that no longer matter, (waiting, in flight); both are removed."""
        useless = [job for job in self.waiting if job.needed is False]
        stopped = [job for job in self.running if job.needed is False]
        for job in useless:
            self.waiting.remove(job)
        for job in stopped:
            for sequence in list(job.sequences):
                self.leave(sequence)
        return useless, stopped

    def admit(self) -> list[Job]:
        """Branches that enter now, in the order of their priority; the first that does not fit ends the search."""
        admitted: list[Job] = []
        for wanted in (True, None):
            if wanted is None and not self._eager and (self.running or self.waiting_for(True)):
                break
            for job in self.waiting_for(wanted):
                if not self._enter(job):
                    return admitted
                admitted.append(job)
                if wanted is None and not self._eager:
                    break  # what it gives may decide the next
        return admitted

    def waiting_for(self, needed: bool | None) -> list[Job]:
        return [job for job in self.waiting if job.needed is needed]

    def leave(self, sequence: RunningSequence) -> None:
        """The sequence has ended: its slot is free, and with the last of its branch its prompt's tokens."""
        job = sequence.job
        job.sequences.remove(sequence)
        self._slots.append(sequence.slot)
        if not job.sequences:
            self._spans.give(job.start, job.length)
            self.running.remove(job)

    def _enter(self, job: Job) -> bool:
        if len(self._slots) < job.branch.count:
            return False
        start = self._spans.take(job.length)
        if start is None:
            return False
        job.start = start
        for index in range(job.branch.count):
            job.sequences.append(RunningSequence(job, index, self._slots.pop(), self._places))
            self._places += 1
        self.waiting.remove(job)
        self.running.append(job)
        return True
