"""Row kernels over logits in memory: the statistics of their softmax, and their gradient, which may replace them.

R rows, V vocabulary, K chosen entries per row. Logits are [R, V], or [B, T, V] with R = B T and any strides of B and T,
as of a slice: row r is (r // T, r % T). With z the logit (bias and soft cap included), t = 1 / temperature, m = max z:
log p = (z - m) t - log sum exp((z - m) t). Differences are taken before the temperature multiplies, as in plain torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)
BLOCK = 2048  # with 4096 the statistics take so many registers that the compiler spills some for occupancy
NUM_WARPS = 8


@triton.jit
def _capped(z, softcap):
    """c tanh(z / c); -inf, a banned token, stays."""
    a = tl.abs(z) / softcap
    small = tl.exp2(a * (-2 * LOG2E))
    tanh = (1 - small) / (1 + small)
    # Of small numbers 1 - exp(-2 a) would keep few digits.
    s = a * a
    series = a * (1 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315 - s * (62 / 2835 - s * (1382 / 155925))))))
    tanh = tl.where(a < 0.25, series, tanh)
    return tl.where(z == float("-inf"), z, tl.where(z < 0, -tanh, tanh) * softcap)


@triton.jit
def _slope(capped, softcap):
    """d c tanh(z / c) / dz, of the capped logit."""
    ratio = capped / softcap
    return tl.where(capped == float("-inf"), 0.0, (1 - ratio) * (1 + ratio))


@triton.jit
def row_statistics_kernel(
    logits,
    index,
    bias,
    scale,
    logp,
    entropy,
    top_out,
    log_total_out,
    T,
    outer_stride,
    stride,
    V,
    K,
    softcap,
    HAS_BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write logp [R, K] and entropy, top and log_total [R], of logits [R, V] and index [R, K]; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + (row // T) * outer_stride + (row % T) * stride
    t = tl.load(scale + row)
    top = tl.full((), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = tl.load(base + columns, mask=columns < V, other=float("-inf")).to(tl.float32)  # [BLOCK]
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)
        if SOFTCAP:
            z = _capped(z, softcap)
        new = tl.maximum(top, tl.max(z, 0))
        shrink = tl.exp2((top - new) * t * LOG2E)
        below = z - new
        below = tl.where(below < LOWEST, LOWEST, below)  # -inf: exp gives 0, and 0 * below is 0
        exps = tl.exp2(below * (t * LOG2E))
        if ENTROPY:
            weighted = shrink * (weighted + (top - new) * total) + exps * below
        total = shrink * total + exps
        top = new
    whole = tl.sum(total, 0)
    log_total = tl.log(whole)
    tl.store(top_out + row, top)
    tl.store(log_total_out + row, log_total)
    if ENTROPY:
        tl.store(entropy + row, log_total - t * tl.sum(weighted, 0) / whole)
    for first in range(0, K, BLOCK_K):
        entries = first + tl.arange(0, BLOCK_K)
        chosen = tl.load(index + row * K + entries, mask=entries < K, other=0)
        z = tl.load(base + chosen, mask=entries < K, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + chosen, mask=entries < K, other=0.0).to(tl.float32)
        if SOFTCAP:
            z = _capped(z, softcap)
        tl.store(logp + row * K + entries, (z - top) * t - log_total, mask=entries < K)


@triton.jit
def row_gradient_kernel(
    logits,
    out,
    index,
    bias,
    scale,
    top,
    log_total,
    grad,
    entropy,
    grad_entropy,
    source,
    T,
    outer_stride,
    stride,
    out_stride,
    V,
    K,
    softcap,
    HAS_BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MOVED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write d_logits = t (sum_k g_k (1[v = index_k] - p_v) - e p_v (log p_v + E)) to ``out``; one program per row. With
    SOFTCAP that is times the slope of c tanh(z / c).

    An index below 0 is no entry of this row. With MOVED, program i reads row source[i] and writes row i. ``out`` may be
    the memory of ``logits``, even in a narrower dtype, if no other program writes the row that program i reads: element
    v of the result then lies at or before element v of the input, so a block may be overwritten once all threads have
    read it.
    """
    target = tl.program_id(0).to(tl.int64)
    row = tl.load(source + target).to(tl.int64) if MOVED else target
    base = logits + (row // T) * outer_stride + (row % T) * stride
    result = out + target * out_stride
    t = tl.load(scale + row)
    m = tl.load(top + row)
    log_sum = tl.load(log_total + row)
    entries = tl.arange(0, BLOCK_K)
    chosen = tl.load(index + row * K + entries, mask=entries < K, other=-1)  # [BLOCK_K]
    gains = tl.load(grad + row * K + entries, mask=entries < K, other=0.0)
    gain = tl.sum(gains, 0)
    active = tl.max((gains != 0).to(tl.int32), 0) > 0
    e = 0.0
    spread = 0.0
    if ENTROPY:
        e = tl.load(grad_entropy + row)
        spread = tl.load(entropy + row)
        active = active | (e != 0)
    if active:
        # The chosen entries are read before their block may be overwritten, and written after it. They have names of
        # their own, because in Triton a name cannot change its shape inside a loop.
        z_k = tl.load(base + chosen, mask=chosen >= 0, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z_k += tl.load(bias + chosen, mask=chosen >= 0, other=0.0).to(tl.float32)
        if SOFTCAP:
            z_k = _capped(z_k, softcap)
        same = tl.zeros((BLOCK_K,), tl.float32)  # an entry chosen several times gets the sum of its gradients
        for k in range(0, K):
            same += tl.where(chosen == tl.load(index + row * K + k), tl.load(grad + row * K + k), 0.0)
        lp_k = (z_k - m) * t - log_sum
        p_k = tl.exp2(lp_k * LOG2E)
        d = same - gain * p_k
        if ENTROPY:
            d -= e * p_k * (tl.where(lp_k < LOWEST, LOWEST, lp_k) + spread)
        d *= t
        if SOFTCAP:
            d *= _slope(z_k, softcap)
        for first in range(0, V, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            z = tl.load(base + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            if HAS_BIAS:
                z += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)
            if SOFTCAP:
                z = _capped(z, softcap)
            lp = (z - m) * t - log_sum
            p = tl.exp2(lp * LOG2E)
            dz = -gain * p
            if ENTROPY:
                dz -= e * p * (tl.where(lp < LOWEST, LOWEST, lp) + spread)
            if SOFTCAP:
                dz *= _slope(z, softcap)
            tl.debug_barrier()
            tl.store(result + columns, (dz * t).to(out.dtype.element_ty), mask=columns < V)
        tl.debug_barrier()
        tl.store(result + chosen, d.to(out.dtype.element_ty), mask=chosen >= 0)
    else:
        for first in range(0, V, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            tl.store(result + columns, tl.zeros((BLOCK,), out.dtype.element_ty), mask=columns < V)


class RowStatistics(NamedTuple):
    """What the softmax of each row needs beside its logits; fp32 [R]."""

    top: Tensor  # the largest logit, bias included
    log_total: Tensor  # log sum exp((z - top) / temperature)
    entropy: Tensor  # nats; empty where it was not asked for


def row_statistics(
    logits: Tensor, index: Tensor, bias: Tensor | None, scale: Tensor, *, entropy: bool, softcap: float = 0.0
) -> tuple[Tensor, RowStatistics]:
    """Log-probs of the chosen entries, fp32 [R, K] in nats, and the statistics of the rows.

    logits [R, V] or [B, T, V], unit stride in V; index int64 [R, K]; scale fp32 [R], contiguous: 1 / temperature.
    """
    (rows, entries), vocabulary = index.shape, logits.shape[-1]
    index, bias = index.contiguous(), None if bias is None else bias.contiguous()
    logp = logits.new_empty((rows, entries), dtype=torch.float32)
    spread, top, log_total = (logits.new_empty(n, dtype=torch.float32) for n in (rows if entropy else 0, rows, rows))
    if rows:
        row_statistics_kernel[(rows,)](
            logits,
            index,
            logits if bias is None else bias,
            scale,
            logp,
            spread,
            top,
            log_total,
            *_row_strides(logits),
            vocabulary,
            entries,
            softcap,
            HAS_BIAS=bias is not None,
            ENTROPY=entropy,
            SOFTCAP=softcap > 0,
            BLOCK=block_for(vocabulary),
            BLOCK_K=triton.next_power_of_2(min(max(entries, 1), 1024)),
            num_warps=NUM_WARPS,
        )
    return logp, RowStatistics(top, log_total, spread)


def row_gradient(
    logits: Tensor,
    out: Tensor,
    index: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    statistics: RowStatistics,
    grad: Tensor,
    *,
    grad_entropy: Tensor | None = None,
    source: Tensor | None = None,
    softcap: float = 0.0,
) -> None:
    """Write d_logits to ``out`` [len(source) or R, V]; the kernel says what may share memory.

    The incoming gradients are ``grad`` fp32 [R, K] of the log-probs and ``grad_entropy`` fp32 [R] of the entropy.
    source int64: the row from which each output row is made. A row whose gradients are all 0 becomes exactly 0, and
    its logits are not read.
    """
    top, log_total, entropy = statistics
    entries = index.shape[1]
    if not len(out):
        return
    index, bias, grad = index.contiguous(), None if bias is None else bias.contiguous(), grad.contiguous()
    row_gradient_kernel[(len(out),)](
        logits,
        out,
        index,
        logits if bias is None else bias,
        scale,
        top,
        log_total,
        grad,
        scale if grad_entropy is None else entropy,
        scale if grad_entropy is None else grad_entropy,
        index if source is None else source,
        *_row_strides(logits),
        out.stride(0),
        logits.shape[-1],
        entries,
        softcap,
        HAS_BIAS=bias is not None,
        ENTROPY=grad_entropy is not None,
        SOFTCAP=softcap > 0,
        MOVED=source is not None,
        BLOCK=block_for(logits.shape[-1]),
        BLOCK_K=triton.next_power_of_2(max(entries, 1)),
        num_warps=NUM_WARPS,
    )


def _row_strides(logits: Tensor) -> tuple[int, int, int]:
    """(T, the strides of B and T) of logits [R, V], which are one B, or [B, T, V]."""
    outer, inner = (0, logits.stride(0)) if logits.dim() == 2 else logits.stride()[:2]
    return max(1, logits.shape[-2]), outer, inner


def block_for(vocabulary: int) -> int:
    """Columns of one step: fewer for a small vocabulary, where most of a large block would be padding."""
    return min(BLOCK, max(128, triton.next_power_of_2(vocabulary)))
