"""The inputs of a linear head, as every implementation takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class HeadInputs(NamedTuple):
    """Checked inputs of a linear head with softmax. N rows, H hidden, V vocabulary."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # int64 [N]; rows labelled IGNORED are left out
    bias: Tensor | None  # [V]
    temperature: float | Tensor  # one number, or one per row: [N]


def head_inputs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, temperatures: Tensor | None, temperature: float
) -> HeadInputs:
    """The inputs as the torch operators receive them: with ``temperatures`` [N], or None and one ``temperature``."""
    return HeadInputs(hidden, weight, labels, bias, temperature if temperatures is None else temperatures)
