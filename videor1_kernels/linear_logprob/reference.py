"""Reference in plain torch: tiles of logits go into a running softmax, and the backward pass computes them again.

N rows, H hidden, V vocabulary. z = (x W^T + b) / t, p = softmax(z), E = -sum p log p. With incoming gradients g (of
logp) and e (of E):  dz_v = g (1[v = label] - p_v) - e p_v (log p_v + E),  dx = dz W / t,  dW = (dz / t)^T x.

The compute dtype is fp64 if an input is fp64, else fp32. 16-bit inputs are converted tile by tile. Only the product
that gives the logits may take bf16 operands as they are, on a CPU that multiplies them exactly and sums in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from videor1_kernels.checks import IGNORED, compute_dtype
from videor1_kernels.linear_logprob.inputs import HeadInputs
from videor1_kernels.linear_logprob.tiles import (
    FAR_BELOW,
    RunningSoftmax,
    at_rows,
    operand_dtype,
    product,
    spans,
    tile_sizes,
)


@torch.no_grad()
def forward(inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logp, entropy, lse), each [N].

    All three are 0 in ignored rows, whose hidden state is never read. lse = log sum_v exp z_v is always fp64, because
    the backward pass makes the rounding error of lse a relative error of every probability in its row.
    """
    hidden, weight, labels, bias, temperature, _, softcap = inputs
    dtype = compute_dtype(hidden, weight, bias)
    live = (labels != IGNORED).nonzero()[:, 0]
    n, m = tile_sizes(len(live), weight, dtype)
    operand = operand_dtype(hidden, weight, dtype)
    softmax = RunningSoftmax(len(live), dtype, hidden.device)
    chosen = softmax.top.clone()  # the label's logit
    scratch = hidden.new_empty(n * m, dtype=dtype)
    for columns in spans(len(weight), m):
        head = weight[columns].to(operand)
        for block in spans(len(live), n):
            rows = block if len(live) == len(labels) else live[block]  # a slice copies nothing
            logits = _logits(hidden[rows].to(operand), head, bias, columns, softcap)  # [n, m]
            _divide(logits, temperature, rows)
            here, position = _labels_within(labels[rows], columns)
            chosen[block] = torch.where(here, logits.gather(1, position)[:, 0], chosen[block])
            softmax.add(block, logits, scratch[: logits.numel()].view_as(logits))
    log_total = softmax.total.log()
    logp = torch.zeros(len(labels), dtype=dtype, device=hidden.device)
    entropy, lse = torch.zeros_like(logp), torch.zeros_like(logp, dtype=torch.float64)
    logp[live] = chosen - softmax.top - log_total
    entropy[live] = log_total - softmax.weighted / softmax.total
    lse[live] = softmax.top.double() + softmax.total.double().log()
    return logp, entropy, lse


@torch.no_grad()
def backward(
    inputs: HeadInputs,
    grads: Sequence[Tensor | None],
    entropy: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
    *,
    part_lse: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden, weight and bias, None for each that ``needs`` leaves out.

    Each has the dtype of its input as it was given, and is rounded to it once.
    Rows whose incoming gradients are 0 are left out.

    Args:
        grads: the incoming gradients [N] of logp and of entropy, each a tensor or None.
        entropy, lse: what :func:`forward` returned.
        needs: which of the three gradients are wanted.
        part_lse: where the weight is a part of the vocabulary, and ``lse`` and ``entropy`` are of the whole: the lse
            of the part, which the kernels need and this does not. A label below 0 is then in another part.
    """
    hidden, weight, labels, bias, temperature, _, softcap = inputs
    hidden_dtype, weight_dtype, *bias_dtype = inputs.gradient_dtypes
    grad_logp, grad_entropy = grads
    need_hidden, need_weight, need_bias = needs
    dtype = compute_dtype(hidden, weight, bias)
    live = _rows_with_gradient(labels, grads)
    n, m = tile_sizes(len(live), weight, dtype)
    operand = operand_dtype(hidden, weight, dtype)
    lse_high = lse.to(dtype)
    lse_low = (lse.double() - lse_high).to(dtype)
    d_rows = torch.zeros(len(live), hidden.shape[1], dtype=dtype, device=hidden.device) if need_hidden else None
    d_weight = torch.zeros_like(weight, dtype=weight_dtype) if need_weight else None
    d_bias = torch.zeros_like(bias, dtype=bias_dtype[0]) if need_bias and bias is not None else None
    scratch = hidden.new_empty(n * m, dtype=dtype)
    for columns in spans(len(weight), m):
        head = weight[columns].to(operand)
        wide_head = head.to(dtype) if need_hidden else None
        d_head = torch.zeros_like(head, dtype=dtype) if need_weight else None
        d_offset = head.new_zeros(len(head), dtype=dtype)
        for block in spans(len(live), n):
            rows = block if len(live) == len(labels) else live[block]
            x = hidden[rows].to(operand)
            scores = _logits(x, head, bias, columns, softcap)  # [n, m]: first z, then log p, then dz / t
            slope = _slope(scores, softcap) if softcap else None
            _divide(scores, temperature, rows)
            scores.sub_(lse_high[rows, None]).sub_(lse_low[rows, None])
            probs = torch.exp(scores, out=scratch[: scores.numel()].view_as(scores))
            g = None if grad_logp is None else grad_logp[rows, None].to(dtype) / at_rows(temperature, rows)
            if grad_entropy is None:
                assert g is not None  # or no row would be live
                torch.mul(probs, -g, out=scores)
            else:
                scores.clamp_(min=FAR_BELOW).add_(entropy[rows, None])
                scores.mul_(-grad_entropy[rows, None].to(dtype) / at_rows(temperature, rows))
                if g is not None:
                    scores.sub_(g)
                scores.mul_(probs)
            if g is not None:
                here, position = _labels_within(labels[rows], columns)
                scores.scatter_add_(1, position, g.masked_fill(~here[:, None], 0.0))
            if slope is not None:
                scores.mul_(slope)
            if d_rows is not None and wide_head is not None:
                d_rows[block] += product(scores, wide_head.T)
            if d_head is not None:
                d_head += product(scores.T, x.to(dtype).T)
            if d_bias is not None:
                d_offset += scores.sum(0)
        if d_weight is not None and d_head is not None:
            d_weight[columns] = d_head
        if d_bias is not None:
            d_bias[columns] = d_offset
    d_hidden = None
    if d_rows is not None:
        d_hidden = torch.zeros_like(hidden, dtype=hidden_dtype)
        d_hidden[live] = d_rows.to(hidden_dtype)
    return d_hidden, d_weight, d_bias


def _logits(x: Tensor, head: Tensor, bias: Tensor | None, columns: slice, softcap: float) -> Tensor:
    logits = product(x, head)  # [n, m]
    if bias is not None:
        logits += bias[columns].to(logits.dtype)
    if softcap:  # a banned token stays so
        logits = torch.where(logits == -torch.inf, logits, torch.tanh(logits / softcap) * softcap)
    return logits


def _slope(capped: Tensor, softcap: float) -> Tensor:
    """d c tanh(z / c) / dz, of the capped logits; 0 for banned tokens."""
    return (1 - (capped / softcap).square()).masked_fill_(capped == -torch.inf, 0.0)


def _divide(logits: Tensor, temperature: float | Tensor, rows: slice | Tensor) -> None:
    if not isinstance(temperature, float) or temperature != 1.0:
        logits.div_(at_rows(temperature, rows))


def _labels_within(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which labels lie in these columns, [n], and the column of each label, [n, 1]; any column for the others."""
    here = (labels >= columns.start) & (labels < columns.stop)
    return here, (labels - columns.start).masked_fill_(~here, 0)[:, None]


def _rows_with_gradient(labels: Tensor, grads: Sequence[Tensor | None]) -> Tensor:
    active = torch.zeros_like(labels, dtype=torch.bool)
    for grad in grads:
        if grad is not None:
            active |= grad != 0
    return (active & (labels != IGNORED)).nonzero()[:, 0]
