"""OpenRLHF: its ``log_probs_from_logits``.

    from videor1_kernels.integrations.openrlhf import use

    use()

Written against OpenRLHF 0.11.2 (``openrlhf/models/utils.py``).
"""

from __future__ import annotations

import functools
from contextlib import ExitStack

from torch import Tensor

from videor1_kernels import selective_log_softmax
from videor1_kernels.checks import fail
from videor1_kernels.integrations.host import Replacement, replace

__all__ = ["log_probs_from_logits", "use"]


def use(*, backend: str = "auto") -> ExitStack:
    """Put this library's ``log_probs_from_logits`` into OpenRLHF, for the rest of the process or for a ``with`` block.

    Args:
        backend: the kernels' backend: ``auto``, ``triton``, ``reference``.

    Returns:
        An ``ExitStack``. When it is closed or its ``with`` block ends, OpenRLHF has its own function back.

    Raises:
        ImportError: OpenRLHF is not installed, or its version keeps the name elsewhere or with other parameters.

    Source:
        This library; the names and arguments replaced are OpenRLHF's (https://github.com/OpenRLHF/OpenRLHF).
    """
    ours = functools.partial(log_probs_from_logits, backend=backend)
    return replace("openrlhf", ["openrlhf"], [Replacement("openrlhf.models.utils", "log_probs_from_logits", ours)])


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0, *, backend: str = "auto") -> Tensor:
    """Log-probability of each label under softmax(logits / temperature), in nats.

    Args:
        logits: [..., V]. They are left as they are; OpenRLHF's own divides them by the temperature in place.
        labels: int64 [...] in [0, V).
        temperature: above 0.

    Returns:
        [...], fp32 (fp64 for fp64 logits). OpenRLHF's own returns the logits' dtype, which its actor makes fp32.

    Raises:
        ValueError: as :func:`videor1_kernels.selective_log_softmax`, or ``labels`` of another shape than [...].
    """
    if labels.shape != logits.shape[:-1]:
        raise fail("log_probs_from_logits", "labels", f"shape {list(logits.shape[:-1])}", list(labels.shape))
    return selective_log_softmax(logits, labels, temperature=temperature, backend=backend)
