"""Rewards that take time: they start when their completion has ended, and are waited for when all have.

These are the ``async def`` functions of ``reward.functions``, and the accuracies that a judge gives. A call that fails
after its retries drops its group: no reward is made up for it. No result depends on the order in which calls return.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

from videor1.answer import extract_answer, whole_text
from videor1.config import RewardConfig
from videor1.rewards.background import AttemptFailed, BackgroundLoop, Caller, CallFailed
from videor1.rewards.judge_cache import JudgeCache
from videor1.rewards.llm_judge import LLMJudge, request_key
from videor1.rewards.scoring import finite_number, is_async, judged, load_reward
from videor1.types import Completion, Group, Sample

JUDGE = "the judge"  # its name in messages


@dataclass(frozen=True)
class SlowCounts:
    """What the rewards that take time did in one step."""

    groups: int = 0  # groups that had some
    failed: int = 0  # of these: dropped, since a call failed
    calls: int = 0  # calls of async functions and of the judge
    cache_hits: int = 0  # scores of the judge that were known already
    retries: int = 0  # attempts after a call's first

    def __add__(self, other: SlowCounts) -> SlowCounts:
        return SlowCounts(**{name: value + getattr(other, name) for name, value in vars(self).items()})


class RewardFailed(Exception):
    """A group has no rewards, since a call failed, as did its retries. The message says which, and how."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name  # of the function, or JUDGE


class SlowRewards:
    """The rewards of a run that take time; its thread runs from the first call to :meth:`close`.

    Args:
        config: the options of the rewards.
        cache_dir: where the judge's scores are kept unless ``config.judge.cache_dir`` says it.
        functions: whether async functions are called; False: only the judge is.

    Attributes:
        seconds: time that was spent waiting for rewards.
        answered: calls that gave a result, by the name of the function or ``JUDGE``.

    Raises:
        ConfigError: an option of the judge is wrong, or a function cannot be loaded.
    """

    def __init__(self, config: RewardConfig, cache_dir: Path, *, functions: bool = True) -> None:
        self.seconds = 0.0
        self.answered: Counter[str] = Counter()
        self._config, self._lock, self._loop = config, Lock(), BackgroundLoop()
        self._counts: Counter[str] = Counter()
        loaded = {name: load_reward(name) for name in config.functions} if functions else {}
        self._functions = {name: function for name, function in loaded.items() if is_async(function)}
        self._callers = {name: self._caller(config) for name in self._functions}
        self._judge: LLMJudge | None = None
        if config.judge.url is not None:
            self._judge = LLMJudge(config.judge)
            self._callers[JUDGE] = self._caller(config.judge)
            self._cache = JudgeCache(config.judge.cache_dir or cache_dir)
        self._told = False  # whether it was told that the cache has failed
        self._asked: dict[str, Future[float]] = {}  # requests to the judge that are not answered yet
        self.patience = max(config.timeout, config.judge.timeout)

    def __enter__(self) -> SlowRewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def some(self) -> bool:
        """Whether there are rewards that take time at all."""
        return bool(self._callers)

    def judges(self, sample: Sample) -> bool:
        """Return whether the judge gives the accuracy of answers to a sample."""
        return judged(sample.problem_type, self._config)

    def group(self, sample: Sample, *, opened: str = "", functions: bool = True) -> GroupScores | None:
        """Return what collects the rewards of a group of completions; None where none of them takes time.

        Args:
            opened: what the chat template opened the answers with.
            functions: whether functions are called for them.
        """
        names = list(self._functions) if functions else []
        return GroupScores(self, sample, opened, names) if names or self.judges(sample) else None

    def take_counts(self) -> SlowCounts:
        """Return what was counted since the last call."""
        with self._lock:
            counts, self._counts = SlowCounts(**self._counts), Counter()
        return counts

    def take_cache_failure(self) -> str | None:
        """Return why the judge's scores cannot be kept, the first time that it is asked for; None while they can."""
        problem = self._cache.failure if self._judge and not self._told else None
        self._told = self._told or problem is not None
        return problem

    def count(self, **numbers: int) -> None:
        """Count groups; see :class:`SlowCounts`."""
        with self._lock:
            self._counts.update(numbers)

    def wait(self, futures: Sequence[Future[Any]]) -> None:
        """Wait until all are done, and count the time."""
        started = perf_counter()
        try:
            self._loop.wait(futures, self.patience)
        finally:
            self.seconds += perf_counter() - started

    def close(self) -> None:
        """Cancel what is left, and end the thread."""
        self._loop.close(self._judge.close if self._judge else None)
        self._asked.clear()
        if self._judge:
            self._cache.close()

    def call(self, name: str, answer: str, sample: Sample) -> Future[float]:
        """Call an async function for a whole answer."""
        function = self._functions[name]

        async def attempt() -> float:
            value = await function(answer, sample)
            reward = finite_number(value)
            if reward is None:
                raise AttemptFailed(
                    f"expected a finite number (an async reward is called with one completion), got {value!r:.200}"
                )
            return reward

        return self._submit(name, attempt, lambda _: None)

    def ask(self, answer: str, sample: Sample) -> Future[float]:
        """Ask the judge for the accuracy of a whole answer; nothing in the answer's tags earns 0 without a question.

        Equal requests are asked once, so that a resumed run gives the same scores.
        """
        assert self._judge is not None, "there is no judge"
        judge, given = self._judge, extract_answer(answer)
        if not given:
            return _known(0.0)
        request = judge.request(sample, given)
        key = request_key(request)
        with self._lock:
            score = self._cache.get(key)
            if score is not None:
                self._counts["cache_hits"] += 1
                self.answered[JUDGE] += 1
                return _known(score)
            if key in self._asked:
                return self._asked[key]

        def answered(score: float | None) -> None:
            """Keep the score; None: there is none, and the next such request is sent again."""
            with self._lock:
                if score is not None:
                    self._cache.add(key, score)
                self._asked.pop(key, None)

        return self._submit(JUDGE, lambda: judge.ask(request), answered, asked=key)

    def _submit(
        self, name: str, attempt: Callable[[], Any], done: Callable[[float | None], None], asked: str | None = None
    ) -> Future[float]:
        caller = self._callers[name]

        async def work() -> float:
            score: float | None = None
            try:
                score = result = await caller.call(attempt)
                with self._lock:
                    self.answered[name] += 1
                return result
            finally:
                done(score)

        with self._lock:
            self._counts["calls"] += 1
            future = self._loop.submit(work())
            if asked is not None:
                self._asked[asked] = future
        return future

    def _caller(self, limits: Any) -> Caller:
        """Return what makes calls within ``concurrency``, ``timeout`` and ``retries`` of some options."""

        def retried() -> None:
            self.count(retries=1)

        return Caller(concurrency=limits.concurrency, timeout=limits.timeout, retries=limits.retries, on_retry=retried)


class GroupScores:
    """The rewards that take time of one group, whose completions are reported as they end.

    Args:
        slow: those of the run.
        sample: the group's.
        opened: what the chat template opened the answers with.
        names: of the async functions that are called.
    """

    def __init__(self, slow: SlowRewards, sample: Sample, opened: str, names: Sequence[str]) -> None:
        self._slow, self._sample, self._opened, self._names = slow, sample, opened, names
        self._judged = slow.judges(sample)
        # By the completion's text: its accuracy, and for each ordered completion that has it what the functions give.
        self._accuracies: dict[str, Future[float]] = {}
        self._calls: dict[str, list[dict[str, Future[float]]]] = {}

    def start(self, completion: Completion, *, ordered: bool) -> Future[float] | None:
        """Start the rewards of a completion that has ended.

        Returns:
            Its accuracy; None where the judge does not give it.
        """
        answer = whole_text(self._opened, completion.text)
        if ordered:
            calls = {name: self._slow.call(name, answer, self._sample) for name in self._names}
            self._calls.setdefault(completion.text, []).append(calls)
        if self._judged and completion.text not in self._accuracies:
            self._accuracies[completion.text] = self._slow.ask(answer, self._sample)
        return self._accuracies.get(completion.text)

    def wait(self, futures: Sequence[Future[float]]) -> None:
        """Wait until all of these are done."""
        self._slow.wait(futures)

    def collect(self, group: Group) -> Group:
        """Wait for the rewards of a group's completions, and return the group with them.

        What an engine has not reported starts now.

        Raises:
            RewardFailed: one of them failed; of several the first in the group counts.
        """
        calls = [self._calls_of(completion) for completion in group.ordered]
        if self._judged:
            for completion in group.shuffled:
                self.start(completion, ordered=False)
        texts = [c.text for c in (*group.ordered, *group.shuffled)] if self._judged else []
        named = [(name, future) for row in calls for name, future in row.items()]
        named += [(JUDGE, self._accuracies[text]) for text in texts]
        self._slow.count(groups=1)
        self._slow.wait([future for _, future in named])
        try:
            values = {id(future): _result(name, future) for name, future in named}
        except RewardFailed:
            self._slow.count(failed=1)
            raise
        return replace(
            group,
            accuracies={**group.accuracies, **{text: values[id(self._accuracies[text])] for text in texts}},
            rewards={name: tuple(values[id(row[name])] for row in calls) for name in self._names},
        )

    def abandon(self) -> None:
        """Cancel the calls of functions of a group that is not used. The judge's scores are kept for later."""
        for calls in self._calls.values():
            for future in (future for row in calls for future in row.values()):
                future.cancel()

    def _calls_of(self, completion: Completion) -> dict[str, Future[float]]:
        """Return the calls of an ordered completion; equal ones take theirs in turn."""
        if not self._calls.get(completion.text):
            self.start(completion, ordered=True)
        return self._calls[completion.text].pop(0)


def _known(score: float) -> Future[float]:
    future: Future[float] = Future()
    future.set_result(score)
    return future


def _result(name: str, future: Future[float]) -> float:
    """Return the result of a call that is done. Raises RewardFailed."""
    try:
        return future.result()
    except (CallFailed, CancelledError) as error:
        raise RewardFailed(f"{name}: {error or 'cancelled'}", name) from None
