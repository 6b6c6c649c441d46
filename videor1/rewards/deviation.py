"""The standard deviation of the rewards of more than one group.

Sums are exact before they are rounded (``math.fsum``), so that a deviation depends on no order of the rewards, and
with it on no division of a batch among ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def deviation(rewards: Sequence[float]) -> float:
    """Return the standard deviation (ddof 1) of rewards; 0 of fewer than two."""
    if len(rewards) < 2:
        return 0.0
    mean = math.fsum(rewards) / len(rewards)
    return math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))


class TaskDeviations:
    """The standard deviation of rewards by problem type, from exponential moving averages of their two moments.

    Each batch with rewards of a type moves the type's averages, before its rewards are divided:

        m1 <- decay m1 + (1 - decay) mean(r)        m2 <- decay m2 + (1 - decay) mean(r^2)
        w  <- decay w + (1 - decay)                 std = sqrt(m2 / w - (m1 / w)^2)

    All three begin at 0; w corrects the averages for that, as Adam does, so that the first batches count alike.

    Args:
        decay: in [0, 1).
        saved: an earlier :meth:`state`.

    Source:
        EMA-GRPO of OneThinker (https://github.com/tulerfeng/OneThinker), whose averages begin at the first batch, and
        which divides a group with an advantage above 5 by its own deviation instead; here none is.
    """

    def __init__(self, decay: float, saved: Mapping[str, Sequence[float]] | None = None) -> None:
        self._decay = decay
        self._averages = {name: list(values) for name, values in (saved or {}).items()}  # m1, m2, w

    def update(self, rewards: Mapping[str, Sequence[float]]) -> None:
        """Count a batch's rewards of all ranks, by problem type; a type without any keeps its averages."""
        for name, values in rewards.items():
            if values:
                means = [math.fsum(x) / len(values) for x in (values, [r * r for r in values])]
                before = self._averages.get(name, [0.0] * 3)
                moved = zip(before, [*means, 1.0], strict=True)
                self._averages[name] = [self._decay * old + (1 - self._decay) * new for old, new in moved]

    def of(self, problem_type: str) -> float:
        """Return the standard deviation of a type that has been counted."""
        first, second, weight = self._averages[problem_type]
        return math.sqrt(max(0.0, second / weight - (first / weight) ** 2))

    def state(self) -> dict[str, list[float]]:
        """Return what a checkpoint keeps, as JSON values: [m1, m2, w] of each problem type."""
        return {name: list(values) for name, values in self._averages.items()}
