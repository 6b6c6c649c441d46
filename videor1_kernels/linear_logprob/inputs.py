"""The inputs of a linear head, as every implementation takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from videor1_kernels.checks import compute_dtype


class HeadInputs(NamedTuple):
    """Checked inputs of a linear head with softmax. N rows, H hidden, V vocabulary."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # int64 [N]; rows labelled IGNORED are left out
    bias: Tensor | None  # [V]
    temperature: float | Tensor  # one number, or one per row: [N]
    given: tuple[torch.dtype, ...] = ()  # dtypes of hidden, weight and bias as the caller has them, if others
    softcap: float = 0.0  # c of c tanh(logits / c), which the temperature divides; 0: none

    @property
    def gradient_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the gradients of hidden, weight and, if there is one, bias."""
        return self.given or tuple(x.dtype for x in (self.hidden, self.weight, self.bias) if x is not None)


def head_inputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    operands: torch.dtype | None,
    softcap: float = 0.0,
) -> HeadInputs:
    """The inputs as the torch operators receive them: with ``temperatures`` [N], or None and one ``temperature``.

    Unless ``operands`` is None, hidden, weight and bias are converted to that dtype; gradients keep those given.
    """
    given = tuple(x.dtype for x in (hidden, weight, bias) if x is not None)
    if operands is not None:
        hidden, weight, bias = (None if x is None else x.to(operands) for x in (hidden, weight, bias))  # type: ignore[assignment]
    return HeadInputs(
        hidden, weight, labels, bias, temperature if temperatures is None else temperatures, given, softcap
    )


def autocast_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """The dtype in which ``F.linear`` would multiply here: autocast's, which leaves fp64 alone; None: as they are."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or compute_dtype(hidden, weight, bias) == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
