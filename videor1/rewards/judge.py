"""Exact skipping: deciding whether the shuffled completions of a group can still change its advantages.

The temporal bonus is one number per group, given to its correct ordered completions. It therefore changes nothing where
no ordered completion is correct. Applied to the rewards, it also changes nothing where all are correct, since a
constant cancels in the group's normalisation; but not where rewards are divided by the standard deviation of a batch,
which all rewards are part of. In every other group the bonus itself must be known. It may be decided before all
completions are finished: the accuracy of each is between 0 and 1, which bounds their mean.

An accuracy that takes time (:mod:`videor1.rewards.slow`) counts as one that is not known until
:meth:`TemporalJudge.settle` takes it into account. Only that can change a verdict, and not the moment at which a score
arrives: so an engine that settles at the same places of every run skips the same completions in each.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from videor1.answer import whole_text
from videor1.config import TrainConfig
from videor1.rewards.scoring import accuracy_of, judged
from videor1.rewards.slow import GroupScores
from videor1.types import Completion, Sample


class TemporalJudge:
    """Decides for one group, whose completions are reported to it as they finish.

    Its means and comparisons are those of ``tgrpo_advantages``: fp32, with sums in fp64. It computes with plain numbers
    instead of tensors, since an engine asks after every completion.

    Args:
        ordered, shuffled: number of completions that the group will have.
        known: accuracies that another judge of the group has computed, by the completion's text.
        opened: what the chat template opened the answers with.
        offline: completions of the group that the policy did not sample. They are none of p, and get the bonus alike.
        scores: the group's rewards that take time, which start as completions are reported; None: there are none.

    Attributes:
        ordered, shuffled: accuracies of the reported completions, in the order of the reports; those that take time are
            added by :meth:`settle`.
        offline: those of the completions that were not sampled, in the same way.
        accuracies: accuracy of every reported or known text that does not take time.
    """

    def __init__(
        self,
        sample: Sample,
        config: TrainConfig,
        *,
        ordered: int,
        shuffled: int,
        known: Mapping[str, float] | None = None,
        opened: str = "",
        offline: Sequence[Completion] = (),
        scores: GroupScores | None = None,
    ) -> None:
        self._sample, self._config, self._opened, self._scores = sample, config, opened, scores
        self._counts = (ordered, shuffled)
        self.ordered: list[float] = []
        self.shuffled: list[float] = []
        self.offline: list[float] = []
        self.accuracies = dict(known or {})
        # The numbers of reported completions, and the verdict at that time.
        self._last_verdict: tuple[tuple[int, ...], bool | None] | None = None

        self._unsettled: list[tuple[list[float], Future[float]]] = []
        self._failed = False  # whether a score that was settled has failed: the group will be dropped
        self._rewarded = ordered + len(offline)  # completions that the bonus is for
        for completion in offline:
            self._done(completion, self.offline)

    def ordered_done(self, completion: Completion) -> None:
        self._done(completion, self.ordered)

    def shuffled_done(self, completion: Completion) -> None:
        self._done(completion, self.shuffled)

    @property
    def unsettled(self) -> Sequence[Future[float]]:
        """The accuracies of reported completions that are not taken into account yet."""
        return [future for _, future in self._unsettled]

    def settle(self, *, wait: bool) -> None:
        """Take accuracies into account that take time, in the order of the reports.

        Args:
            wait: wait for those of all reported completions; False: take those that have arrived.
        """
        if wait and self._scores is not None:
            self._scores.wait(self.unsettled)
        reported, self._unsettled = self._unsettled, []
        for values, future in reported:
            if not future.done():
                self._unsettled.append((values, future))
            elif future.cancelled() or future.exception() is not None:
                self._failed = True
            else:
                values.append(future.result())

    @property
    def needed(self) -> bool | None:
        """True: the bonus matters and is not decided; False: it is decided or does not matter; None: it may matter.

        It does not matter to a group that will be dropped, since a score has failed.
        """
        if self._failed:
            return False
        reported = (len(self.ordered), len(self.shuffled), len(self.offline))
        if self._last_verdict is None or self._last_verdict[0] != reported:
            self._last_verdict = reported, self._verdict()
        return self._last_verdict[1]

    @property
    def decided(self) -> bool:
        """Whether the temporal bonus is the same for every outcome of the unfinished completions.

        The bonus grows with p and falls with p~, so that its extremes are at theirs.
        """
        (p_low, p_high), (shuffled_low, shuffled_high) = (
            _mean_bounds(values, count)
            for values, count in zip((self.ordered, self.shuffled), self._counts, strict=True)
        )
        if (p_low, shuffled_low) == (p_high, shuffled_high):
            return True
        temporal = self._config.temporal
        if temporal.rule == "margin":
            return p_high <= shuffled_low  # Then there is no bonus; one above 0 depends on the exact p~.
        threshold_low, threshold_high = (_fp32(_fp32(temporal.mu) * p) for p in (shuffled_low, shuffled_high))
        if temporal.rule == "threshold":
            return p_low > threshold_high or p_high <= threshold_low
        return p_low >= threshold_high or p_high < threshold_low

    def _verdict(self) -> bool | None:
        rewarded = self.ordered + self.offline
        done = len(rewarded)
        cancels = self._config.temporal_apply == "reward" and not self._config.scales_by_batch
        above = _fp32(self._config.reward.above(self._sample.problem_type))
        correct = sum(_fp32(accuracy) > above for accuracy in rewarded)
        if done == self._rewarded and (not correct or (cancels and correct == done)):
            return False
        if not self._config.temporal.alpha or self.decided:
            return False
        return True if correct and (not cancels or correct < done) else None

    def _done(self, completion: Completion, accuracies: list[float]) -> None:
        ordered = accuracies is not self.shuffled
        score = None if self._scores is None else self._scores.start(completion, ordered=ordered)
        if score is None:
            accuracies.append(self._accuracy(completion))
        else:
            self._unsettled.append((accuracies, score))

    def _accuracy(self, completion: Completion) -> float:
        text = completion.text
        if text not in self.accuracies:
            if judged(self._sample.problem_type, self._config.reward):
                raise AssertionError("the judge has not been asked for this accuracy")
            answer = whole_text(self._opened, text)
            reward = self._config.reward
            self.accuracies[text] = accuracy_of(
                answer, self._sample, lenient=reward.lenient, regression=reward.regression
            )
        return self.accuracies[text]


class Starter:
    """Starts the rewards that take time of a group, all of whose completions are needed."""

    needed = True

    def __init__(self, scores: GroupScores, offline: Sequence[Completion] = ()) -> None:
        self._scores = scores
        for completion in offline:
            self.ordered_done(completion)

    def ordered_done(self, completion: Completion) -> None:
        self._scores.start(completion, ordered=True)

    def shuffled_done(self, completion: Completion) -> None:
        self._scores.start(completion, ordered=False)


def _mean_bounds(known: Sequence[float], count: int) -> tuple[float, float]:
    """Return the lowest and the highest possible mean of ``count`` accuracies of which some are known."""
    total, missing = sum(map(_fp32, known)), count - len(known)
    return _fp32(total / count), _fp32((total + missing) / count)


def _fp32(value: float) -> float:
    """Round a number to fp32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
