"""Exact skipping: deciding whether the shuffled completions of a group can still change its advantages.

The temporal bonus is one number per group, given to its correct ordered completions. It therefore changes nothing where
no ordered completion is correct. Applied to the rewards, it also changes nothing where all are correct, since a
constant cancels in the group's normalisation; but not where rewards are divided by the standard deviation of a batch,
which all rewards are part of. In every other group the bonus itself must be known. It may be decided before all
completions are finished: the accuracy of each is between 0 and 1, which bounds their mean.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from videor1.answer import whole_text
from videor1.config import TrainConfig
from videor1.rewards.scoring import accuracy_of
from videor1.types import Completion, Sample


class TemporalJudge:
    """Decides for one group, whose completions are reported to it as they finish.

    Its means and comparisons are those of ``tgrpo_advantages``: fp32, with sums in fp64. It computes with plain numbers
    instead of tensors, since an engine asks after every completion.

    Args:
        ordered, shuffled: number of completions that the group will have.
        known: accuracies that another judge of the group has computed, by the completion's text.
        opened: what the chat template opened the answers with.

    Attributes:
        ordered, shuffled: accuracies of the reported completions, in the order of the reports.
        accuracies: accuracy of every reported or known text.
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
    ) -> None:
        self._sample, self._config, self._opened = sample, config, opened
        self._counts = (ordered, shuffled)
        self.ordered: list[float] = []
        self.shuffled: list[float] = []
        self.accuracies = dict(known or {})
        # The numbers of reported completions, and the verdict at that time.
        self._last_verdict: tuple[tuple[int, int], bool | None] | None = None

    def ordered_done(self, completion: Completion) -> None:
        self.ordered.append(self._accuracy(completion))

    def shuffled_done(self, completion: Completion) -> None:
        self.shuffled.append(self._accuracy(completion))

    @property
    def needed(self) -> bool | None:
        """True: the bonus matters and is not decided; False: it is decided or does not matter; None: it may matter."""
        reported = (len(self.ordered), len(self.shuffled))
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
        done = len(self.ordered)
        cancels = self._config.temporal_apply == "reward" and not self._config.scales_by_batch
        above = _fp32(self._config.reward.above(self._sample.problem_type))
        correct = sum(_fp32(accuracy) > above for accuracy in self.ordered)
        if done == self._counts[0] and (not correct or (cancels and correct == done)):
            return False
        if not self._config.temporal.alpha or self.decided:
            return False
        return True if correct and (not cancels or correct < done) else None

    def _accuracy(self, completion: Completion) -> float:
        text = completion.text
        if text not in self.accuracies:
            answer = whole_text(self._opened, text)
            reward = self._config.reward
            self.accuracies[text] = accuracy_of(
                answer, self._sample, lenient=reward.lenient, regression=reward.regression
            )
        return self.accuracies[text]


def _mean_bounds(known: Sequence[float], count: int) -> tuple[float, float]:
    """Return the lowest and the highest possible mean of ``count`` accuracies of which some are known."""
    total, missing = sum(map(_fp32, known)), count - len(known)
    return _fp32(total / count), _fp32((total + missing) / count)


def _fp32(value: float) -> float:
    """Round a number to fp32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
