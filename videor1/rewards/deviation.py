"""The standard deviation of the rewards of more than one group.

Sums are exact before they are rounded (``math.fsum``), so that a deviation depends on no order of the rewards, and
with it on no division of a batch among ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def deviation(rewards: Sequence[float]) -> float:
    """Return the standard deviation (ddof 1) of rewards; 0 of fewer than two."""
    if len(rewards) < 2:
        return 0.0
    mean = math.fsum(rewards) / len(rewards)
    return math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
