"""Reference of prefix_causal_conv in plain torch. N tokens of S sequences end to end, C channels, K inputs a sum.

A kernel of torch would want the tokens last in memory; as K products of rows with the rows before them nothing is
transposed, and their sum is fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from videor1_kernels.checks import compute_dtype
from videor1_kernels.prefix_gated_delta.rows import Move, move_to


def causal_conv(
    inputs: Sequence[Tensor],
    lengths: tuple[int, ...],
    initial: Tensor | None,
    *,
    final: bool,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor | None]:
    """Return out [N, C] and the last inputs of each sequence [S, C, K - 1], of one input x [N, C], in x's dtype."""
    [x] = inputs
    size = weight.shape[1]
    before = x.new_zeros(len(lengths), x.shape[1], size - 1) if initial is None else initial
    rows = torch.cat([before.mT.flatten(0, 1), x])
    extended, windows = _extension(lengths, size - 1, x.device)
    rows = extended(rows)  # [N + S (K - 1), C]: before each sequence its state
    # The last rows of a sequence, which are all of its state where it is shorter.
    after = torch.stack([part[len(part) - size + 1 :].mT for part in rows.split([n + size - 1 for n in lengths])])
    dtype = compute_dtype(x, weight, bias)
    wide, weight = rows.to(dtype), weight.to(dtype)
    count = len(rows) - size + 1
    out = sum(wide[i : i + count] * weight[:, i] for i in range(size))
    assert isinstance(out, Tensor)
    out = windows(out)
    out = out if bias is None else out + bias.to(dtype)
    return (F.silu(out) if activation == "silu" else out).to(x.dtype), after


@functools.lru_cache(maxsize=64)
def _extension(lengths: tuple[int, ...], before: int, device: torch.device) -> tuple[Move, Move]:
    """The move of [S ``before`` rows of states | N rows] to sequences behind their states, and that of its windows of
    ``before`` + 1 rows to the N tokens which they end at."""
    rows, windows, states, tokens = [], [], before * len(lengths), 0
    for i, length in enumerate(lengths):
        rows += [torch.arange(i * before, (i + 1) * before), torch.arange(length) + states + tokens]
        windows.append(torch.arange(length) + tokens + i * before)
        tokens += length
    total = states + tokens
    extended = move_to(torch.cat(rows).to(device), total)
    return extended, move_to(torch.cat(windows).to(device), total - before)
