"""Continuous batching: which branches are in flight, within the capacity of the KV cache. No tensors here.

A branch (the completions of a prompt that see its frames in one order) is admitted whole, so that its prompt is
prefilled once. Its sequences leave one by one and free their slots at once; the last also frees the prompt's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from videor1.rollout.local.kv_cache import Capacity, Spans
from videor1.rollout.protocol import Branch, Request


@dataclass(eq=False)
class RunningSequence:
    """A completion in flight: an entry of the decode batch, with a slot of the KV cache."""

    job: Job
    index: int  # in its branch
    slot: int
    buffer_row: int  # index of its random numbers in the rollout's buffer
    launched: int = 0  # tokens that steps have been asked for
    done: bool = False  # whether it has ended, or is not needed any more
    tokens: list[int] = field(default_factory=list)  # those that the host has read, and their log-probs
    logp: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Job:
    """One branch of one request, as the scheduler handles it."""

    number: int  # index of the request
    request: Request
    branch: Branch
    shuffled: bool
    start: int = -1  # start of its prompt in the cache's pool, once it is admitted
    sequences: list[RunningSequence] = field(default_factory=list)  # those in flight

    @property
    def length(self) -> int:
        return len(self.request.prompt.input_ids)

    @property
    def needed(self) -> bool | None:
        return self.request.judge.needed if self.shuffled and self.request.judge is not None else True


class Scheduler:
    """Admits waiting branches in the order of the requests; ordered ones and those known to be needed come first.

    Args:
        eager: whether shuffled branches that may turn out unneeded are admitted as soon as there is room. Otherwise
            they are admitted only when nothing else is left to do. The first is right where a decode step costs the
            same for a few more sequences (a GPU), the second where each sequence adds to its cost.
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
        self._buffer_rows = 0

    def drop(self) -> tuple[list[Job], list[Job]]:
        """Remove the branches that are not needed any more, and return them: (waiting, in flight)."""
        skipped = [job for job in self.waiting if job.needed is False]
        stopped = [job for job in self.running if job.needed is False]
        for job in skipped:
            self.waiting.remove(job)
        for job in stopped:
            for sequence in list(job.sequences):
                self.leave(sequence)
        return skipped, stopped

    def settle(self) -> bool:
        """Wait for the late scores that decide about waiting branches, once nothing else is left to do.

        It happens at a place that does not depend on when scores arrive, and so which branches run does not either. An
        eager scheduler never waits: it has admitted these branches already, or will once there is room.

        Returns:
            Whether there were any, after which other branches may be needed or not.
        """
        if self._eager or self.running or self.waiting_for(True):
            return False
        late = [job.request.late for job in self.waiting_for(None) if job.request.late is not None]
        late = [scores for scores in late if scores.unsettled]
        for scores in late:
            scores.settle(wait=True)
        return bool(late)

    def admit(self) -> list[Job]:
        """Admit waiting branches in the order of their priority until one does not fit, and return them."""
        admitted: list[Job] = []
        for needed in (True, None):
            if needed is None and not self._eager and (self.running or self.waiting_for(True)):
                break
            for job in self.waiting_for(needed):
                if not self._allocate(job):
                    return admitted
                admitted.append(job)
                if needed is None and not self._eager:
                    break  # The completions of this branch may show that others are not needed.
        return admitted

    def waiting_for(self, needed: bool | None) -> list[Job]:
        """Return the waiting branches whose ``needed`` is the given value."""
        return [job for job in self.waiting if job.needed is needed]

    def leave(self, sequence: RunningSequence) -> None:
        """Free the slot of a sequence that has ended and, with the last of its branch, the prompt's tokens."""
        sequence.done, job = True, sequence.job
        job.sequences.remove(sequence)
        self._slots.append(sequence.slot)
        if not job.sequences:
            self._spans.give(job.start, job.length)
            self.running.remove(job)

    def _allocate(self, job: Job) -> bool:
        """Give a branch its slots and its prompt's span, if both are free; return whether they were."""
        if len(self._slots) < job.branch.count:
            return False
        start = self._spans.take(job.length)
        if start is None:
            return False
        job.start = start
        for index in range(job.branch.count):
            job.sequences.append(RunningSequence(job, index, self._slots.pop(), self._buffer_rows))
            self._buffer_rows += 1
        self.waiting.remove(job)
        self.running.append(job)
        return True
