"""Exact skipping: whether the shuffled answers of a group can still change its advantages.

The temporal bonus is one number per group, given to its correct ordered answers. So it changes nothing where no ordered
answer is correct; and, applied to the rewards, nothing where all are, since a constant falls out of the group's
normalisation. In every other group the bonus itself must be known: bounds on the mean accuracy of answers that are not
finished (each is between 0 and 1) may decide it before they are.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from videor1.config import TrainConfig
from videor1.rewards.scoring import accuracy_of
from videor1.types import Completion, Sample


class TemporalJudge:
    """Hears of one group's answers as they finish. Its means and comparisons are those of ``tgrpo_advantages``: fp32,
    sums in fp64. Plain numbers, since an engine asks after every answer.

    Args:
        ordered, shuffled: how many answers the group will have.
        known: accuracies that another judge of the group has worked out, by the answer's text.

    Attributes:
        ordered, shuffled: accuracies of the answers, as they were heard.
        accuracies: of every text that was heard, and the known ones.
    """

    def __init__(
        self,
        sample: Sample,
        config: TrainConfig,
        *,
        ordered: int,
        shuffled: int,
        known: Mapping[str, float] | None = None,
    ) -> None:
        self._sample, self._config = sample, config
        self._counts = (ordered, shuffled)
        self.ordered: list[float] = []
        self.shuffled: list[float] = []
        self.accuracies = dict(known or {})
        self._known: tuple[tuple[int, int], bool | None] | None = None  # the last verdict, and how many it had heard

    def ordered_done(self, answer: Completion) -> None:
        self.ordered.append(self._accuracy(answer))

    def shuffled_done(self, answer: Completion) -> None:
        self.shuffled.append(self._accuracy(answer))

    @property
    def needed(self) -> bool | None:
        """True: the bonus matters and is not decided; False: it is decided, or matters not; None: it may matter."""
        heard = (len(self.ordered), len(self.shuffled))
        if self._known is None or self._known[0] != heard:
            self._known = heard, self._verdict()
        return self._known[1]

    @property
    def decided(self) -> bool:
        """Whether the temporal bonus is the same however the unfinished answers end. It grows with p and falls with
        p~, so its extremes are at theirs."""
        (p_low, p_high), (other_low, other_high) = (
            _mean_bounds(values, count)
            for values, count in zip((self.ordered, self.shuffled), self._counts, strict=True)
        )
        if (p_low, other_low) == (p_high, other_high):
            return True
        temporal = self._config.temporal
        if temporal.rule == "margin":
            return p_high <= other_low  # no bonus; any other depends on p~ itself
        bar_low, bar_high = (_fp32(_fp32(temporal.mu) * other) for other in (other_low, other_high))
        if temporal.rule == "threshold":
            return p_low > bar_high or p_high <= bar_low
        return p_low >= bar_high or p_high < bar_low

    def _verdict(self) -> bool | None:
        done, in_reward = len(self.ordered), self._config.temporal_apply == "reward"
        above = _fp32(self._config.reward.correct_above)
        correct = sum(_fp32(accuracy) > above for accuracy in self.ordered)
        if done == self._counts[0] and (not correct or (in_reward and correct == done)):
            return False
        if not self._config.temporal.alpha or self.decided:
            return False
        return True if correct and (not in_reward or correct < done) else None

    def _accuracy(self, answer: Completion) -> float:
        if answer.text not in self.accuracies:
            accuracy = accuracy_of(answer.text, self._sample, lenient=self._config.reward.lenient)
            self.accuracies[answer.text] = accuracy
        return self.accuracies[answer.text]


def _mean_bounds(known: Sequence[float], count: int) -> tuple[float, float]:
    """The least and the greatest mean of ``count`` accuracies of which some are known."""
    total, missing = sum(map(_fp32, known)), count - len(known)
    return _fp32(total / count), _fp32((total + missing) / count)


def _fp32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
