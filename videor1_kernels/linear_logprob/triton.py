"""linear_logprob and selective_log_softmax on Triton kernels.

Forward of 16-bit inputs: one kernel for the product and the statistics. fp32 inputs, and the backward pass, go by
chunks of rows: cuBLAS logits, row kernels, cuBLAS gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from videor1_kernels.checks import IGNORED
from videor1_kernels.linear_logprob.products import (
    HeadGradients,
    chunk_rows,
    common_dtype,
    logits_buffer,
    narrow_rows,
    power_of_two,
    product,
    times,
)
from videor1_kernels.linear_logprob.triton_forward import product_statistics
from videor1_kernels.linear_logprob.triton_rows import row_gradient, row_statistics


def forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H], labels [N], temperature a float or [N] -> (logp, entropy, lse) [N], lse fp64."""
    rows = (labels != IGNORED).nonzero()[:, 0]
    scale = inverse(temperature, labels)
    if len(rows) == len(labels):
        logp, entropy, lse = statistics(hidden, weight, labels, bias, scale)
        return logp, entropy, lse.double()
    outputs = tuple(hidden.new_zeros(len(labels), dtype=torch.float32) for _ in range(3))
    for whole, part in zip(outputs, statistics(hidden[rows], weight, labels[rows], bias, scale[rows]), strict=True):
        whole[rows] = part
    return outputs[0], outputs[1], outputs[2].double()


def statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse) of rows that all have labels; scale fp32 [N]: 1 / temperature."""
    hidden, weight = common_dtype(hidden, weight)
    if hidden.dtype != torch.float32 and len(hidden):
        return product_statistics(hidden, weight, labels, bias, scale)
    logp, entropy, lse = (hidden.new_empty(len(labels), dtype=torch.float32) for _ in range(3))
    size = chunk_rows(len(labels), len(weight))
    buffer = logits_buffer(min(size, len(labels)), len(weight), hidden.device)
    for first in range(0, len(labels), size):
        rows = slice(first, first + size)
        logits = product(hidden[rows], weight.T, narrow_rows(buffer, len(hidden[rows]), len(weight), torch.float32))
        part, entropy[rows], top, log_total = row_statistics(
            logits, labels[rows, None], bias, scale[rows], entropy=True
        )
        logp[rows] = part[:, 0]
        lse[rows] = top * scale[rows] + log_total
    return logp, entropy, lse


def backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    entropy: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> (d_hidden, d_weight, d_bias) where needed. Rows whose incoming gradients are all 0 are left out.

    The statistics are taken again from the recomputed logits: with saved ones, the rounding of a log-sum-exp of 1e4
    would be a relative error of 5e-4 in every probability.
    """
    head_hidden, head_weight = common_dtype(hidden, weight)
    incoming = [g.float() for g in (grad_logp, grad_entropy) if g is not None]
    active = torch.zeros_like(labels, dtype=torch.bool)
    for grad in incoming:
        active |= grad != 0
    live = (active & (labels != IGNORED)).nonzero()[:, 0]
    gradients = HeadGradients(head_hidden, head_weight, needs)
    norm = power_of_two(torch.cat([grad[live] for grad in incoming]))
    scale = inverse(temperature, labels)
    size = chunk_rows(len(live), len(weight))
    buffer = logits_buffer(min(size, len(live)), len(weight), hidden.device)
    for rows in live.split(size) if len(live) else ():
        x, chosen, t = head_hidden[rows], labels[rows, None], scale[rows]
        logits = product(x, head_weight.T, narrow_rows(buffer, len(rows), len(weight), torch.float32))
        _, spread, top, log_total = row_statistics(logits, chosen, bias, t, entropy=grad_entropy is not None)
        d_logits = narrow_rows(buffer, len(rows), len(weight), x.dtype)
        g = torch.zeros_like(t) if grad_logp is None else grad_logp[rows].float() / norm
        row_gradient(
            logits,
            d_logits,
            chosen,
            bias,
            t,
            top,
            log_total,
            g[:, None],
            entropy=None if grad_entropy is None else spread,
            grad_entropy=None if grad_entropy is None else grad_entropy[rows].float() / norm,
        )
        gradients.add(rows, x, d_logits)
    return (
        scaled(gradients.d_hidden, norm, hidden.dtype),
        scaled(gradients.d_weight, norm, weight.dtype),
        scaled(gradients.d_bias, norm, None if bias is None else bias.dtype),
    )


def selective_forward(logits: Tensor, index: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """logits [R, V], index [R, K] -> (logp [R, K], stats [2, R]: the maximum, and the log of the sum above it)."""
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    logp, _, top, log_total = row_statistics(rows, index, None, inverse(temperature, logits), entropy=False)
    return logp, torch.stack([top, log_total])


def selective_backward(
    grad: Tensor, logits: Tensor, index: Tensor, temperature: float | Tensor, stats: Tensor
) -> Tensor:
    """grad [R, K] -> d_logits [R, V] of the logits' dtype."""
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    row_gradient(rows, out, index, None, inverse(temperature, logits), stats[0], stats[1], grad.float())
    return out


def inverse(temperature: float | Tensor, rows: Tensor) -> Tensor:
    """1 / temperature, fp32 [len(rows)]."""
    if isinstance(temperature, Tensor):
        return 1 / temperature.float()
    return torch.full((len(rows),), 1 / temperature, dtype=torch.float32, device=rows.device)


def scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """gradient * factor in fp32, then of ``dtype``."""
    return None if gradient is None or dtype is None else times(gradient, factor, dtype)
