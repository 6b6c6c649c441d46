"""linear_logprob and selective_log_softmax on Triton kernels.

For 16-bit inputs the forward pass is one kernel that computes the product and the statistics. fp32 inputs and the
backward pass take a chunk of rows at a time: cuBLAS computes the logits, row kernels work on them, and cuBLAS computes
the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from videor1_kernels.checks import IGNORED, capturing
from videor1_kernels.dispatch import nearest_capability
from videor1_kernels.linear_logprob.inputs import HeadInputs
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
from videor1_kernels.linear_logprob.triton_rows import RowStatistics, row_gradient, row_statistics

# How the statistics of 16-bit inputs are found, by compute capability; others take the nearest one below. "fused": one
# kernel computes product and statistics. "chunks": cuBLAS computes logits in fp32, and a row kernel reads them. A card
# says which is faster: python -m benchmarks.tune.
WAYS: dict[int, str] = {80: "fused", 90: "fused", 100: "fused"}


def forward(inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logp, entropy, lse), each [N]; lse is fp64.

    Rows without a label are left out, for which the host waits once to know how many there are. While a CUDA graph is
    captured nothing may wait: then they are computed, and their results are 0 all the same.
    """
    hidden, weight, labels, bias, temperature, _, softcap = inputs
    scale = inverse(temperature, labels)
    if capturing(labels):
        wanted = labels != IGNORED
        found = statistics(hidden, weight, labels.clamp(min=0), bias, scale, softcap=softcap)
        logp, entropy, lse = (torch.where(wanted, value, 0.0) for value in found)
        return logp, entropy, lse.double()
    rows = (labels != IGNORED).nonzero()[:, 0]
    if len(rows) == len(labels):
        logp, entropy, lse = statistics(hidden, weight, labels, bias, scale, softcap=softcap)
        return logp, entropy, lse.double()
    outputs = tuple(hidden.new_zeros(len(labels), dtype=torch.float32) for _ in range(3))
    parts = statistics(hidden[rows], weight, labels[rows], bias, scale[rows], softcap=softcap)
    for whole, part in zip(outputs, parts, strict=True):
        whole[rows] = part
    return outputs[0], outputs[1], outputs[2].double()


def statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    way: str | None = None,
    *,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logp, entropy, lse) of rows that all have labels; scale fp32 [N]: 1 / temperature.

    way: one of :data:`WAYS`, for 16-bit inputs; None: that of the device. A soft cap is for the row kernels alone.
    """
    hidden, weight = common_dtype(hidden, weight)
    way = "chunks" if softcap else way or (WAYS[nearest_capability(WAYS, hidden.device)] if hidden.is_cuda else "fused")
    if hidden.dtype != torch.float32 and len(hidden) and way == "fused":
        return product_statistics(hidden, weight, labels, bias, scale)
    logp, entropy, lse = (hidden.new_empty(len(labels), dtype=torch.float32) for _ in range(3))
    size = chunk_rows(len(labels), len(weight))
    buffer = logits_buffer(min(size, len(labels)), len(weight), hidden.device)
    for first in range(0, len(labels), size):
        rows = slice(first, first + size)
        logits = product(hidden[rows], weight.T, narrow_rows(buffer, len(hidden[rows]), len(weight), torch.float32))
        part, softmax = row_statistics(logits, labels[rows, None], bias, scale[rows], entropy=True, softcap=softcap)
        logp[rows], entropy[rows] = part[:, 0], softmax.entropy
        lse[rows] = softmax.top * scale[rows] + softmax.log_total
    return logp, entropy, lse


def backward(
    inputs: HeadInputs,
    grads: Sequence[Tensor | None],
    entropy: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
    *,
    part_lse: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias where needed; the arguments are those of the reference.

    Rows whose incoming gradients are all 0 are left out. The statistics are computed again from the recomputed
    logits: if those of the forward pass were used, the rounding of a log-sum-exp of 1e4 would be a relative error of
    5e-4 in every probability.
    """
    hidden, weight, labels, bias, temperature, _, softcap = inputs
    hidden_dtype, weight_dtype, *bias_dtype = inputs.gradient_dtypes
    grad_logp, grad_entropy = grads
    head_hidden, head_weight = common_dtype(hidden, weight)
    incoming = [g.float() for g in grads if g is not None]
    active = torch.zeros_like(labels, dtype=torch.bool)
    for grad in incoming:
        active |= grad != 0
    live = (active & (labels != IGNORED)).nonzero()[:, 0]
    gradients = HeadGradients(head_hidden, head_weight, needs, hidden_dtype)
    norm = power_of_two(torch.cat([grad[live] for grad in incoming]))
    scale = inverse(temperature, labels)
    size = chunk_rows(len(live), len(weight))
    buffer = logits_buffer(min(size, len(live)), len(weight), hidden.device)
    for rows in live.split(size) if len(live) else ():
        x, chosen, t = head_hidden[rows], labels[rows, None], scale[rows]
        logits = product(x, head_weight.T, narrow_rows(buffer, len(rows), len(weight), torch.float32))
        known = chosen if part_lse is None else chosen.clamp(min=0)
        _, softmax = row_statistics(logits, known, bias, t, entropy=grad_entropy is not None, softcap=softcap)
        if part_lse is not None:  # the part's share of the whole
            further = (lse[rows] - part_lse[rows]).float()
            softmax = RowStatistics(softmax.top, softmax.log_total + further, entropy[rows].float())
        d_logits = narrow_rows(buffer, len(rows), len(weight), x.dtype)
        g = torch.zeros_like(t) if grad_logp is None else grad_logp[rows].float() / norm
        e = None if grad_entropy is None else grad_entropy[rows].float() / norm
        row_gradient(logits, d_logits, chosen, bias, t, softmax, g[:, None], grad_entropy=e, softcap=softcap)
        gradients.add(rows, x, d_logits)
    buffer = logits = d_logits = x = None  # type: ignore[assignment]  # d_weight's last step needs room for another
    return (
        scaled(gradients.d_hidden, norm, hidden_dtype),
        scaled(gradients.d_weight, norm, weight_dtype),
        scaled(gradients.d_bias, norm, bias_dtype[0] if bias_dtype else None),
    )


def selective_forward(logits: Tensor, index: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return logp [R, K], and the statistics [2, R]: the largest logit, and the log of the sum of exponentials.

    logits [R, V] or [B, T, V], R = B T; a slice is read where it lies.
    """
    rows = logits if logits.stride(-1) == 1 else logits.contiguous()
    logp, softmax = row_statistics(rows, index, None, inverse(temperature, index), entropy=False)
    return logp, torch.stack([softmax.top, softmax.log_total])


def selective_backward(
    grad: Tensor, logits: Tensor, index: Tensor, temperature: float | Tensor, stats: Tensor
) -> Tensor:
    """Return d_logits, shaped as logits and in their dtype, of the incoming gradient [R, K]."""
    rows = logits if logits.stride(-1) == 1 else logits.contiguous()
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    softmax = RowStatistics(stats[0], stats[1], entropy=stats.new_empty(0))
    flat = out.view(len(index), out.shape[-1])
    row_gradient(rows, flat, index, None, inverse(temperature, index), softmax, grad.float())
    return out


def inverse(temperature: float | Tensor, rows: Tensor) -> Tensor:
    """1 / temperature, fp32 [len(rows)]."""
    if isinstance(temperature, Tensor):
        return 1 / temperature.float()
    return torch.full((len(rows),), 1 / temperature, dtype=torch.float32, device=rows.device)


def scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """gradient * factor, in fp32 and then converted to ``dtype``."""
    return None if gradient is None or dtype is None else times(gradient, factor, dtype)
