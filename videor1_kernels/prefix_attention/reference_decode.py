"""Reference of decode in plain torch: two softmax parts, over the group's prefix and over the row's own suffix."""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels.checks import compute_dtype, fail
from videor1_kernels.prefix_attention.layout import DecodeLayout


def prefix_decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    layout: DecodeLayout,
    scale: float,
) -> Tensor:
    """The parts merged by their maxima and sums.

    q [R, Hq, D], prefix_k/v [Tp, Hkv, D], suffix_k/v [R, C, Hkv, D], suffix_lengths [R] -> [R, Hq, D] in q's dtype.
    """
    if not len(q):
        return torch.empty_like(q)
    dtype = compute_dtype(q, prefix_k, prefix_v, suffix_k, suffix_v)
    with torch.autocast(q.device.type, enabled=False):
        rows, q_heads, dim = q.shape
        kv_heads = prefix_k.shape[1]
        repeat = q_heads // kv_heads
        scaled = (q.to(dtype) * scale).view(rows, kv_heads, repeat, dim)

        # B prefixes of at most L tokens, at most M rows each: [B, Hkv, M * repeat, D] against [B, Hkv, L, D].
        groups, most = layout.rows.shape
        grouped = scaled[layout.rows].transpose(1, 2).reshape(groups, kv_heads, most * repeat, dim)
        keys, values = (
            x[layout.prefix_index].to(dtype).transpose(1, 2).contiguous() for x in (prefix_k, prefix_v)
        )
        padding = None if layout.prefix_padding is None else layout.prefix_padding[:, None, None]  # [B, 1, 1, L]
        parts = _softmax_part(grouped, keys, values, padding)
        high_p, sum_p, out_p = (
            x.view(groups, kv_heads, most, repeat, -1).transpose(1, 2).flatten(0, 1)[layout.slot] for x in parts
        )

        shortest, width = torch.stack(suffix_lengths.aminmax()).tolist()  # one wait for the device
        if shortest < 1 or width > suffix_k.shape[1]:
            expected, got = f"values from 1 to C = {suffix_k.shape[1]}", f"{shortest} to {width}"
            raise fail("prefix_decode_attention", "suffix_lengths", expected, got)
        keys, values = (x[:, :width].to(dtype).transpose(1, 2).contiguous() for x in (suffix_k, suffix_v))
        padding = None
        if shortest < width:
            padding = (torch.arange(width, device=q.device) >= suffix_lengths[:, None])[:, None, None]  # [R, 1, 1, C]
            # Entries past a row's length may hold anything: their scores are masked, but 0 * NaN would be NaN.
            values = values.masked_fill(padding.transpose(2, 3), 0.0)
        high_s, sum_s, out_s = _softmax_part(scaled, keys, values, padding)

        high = torch.maximum(high_p, high_s)
        by_p, by_s = (high_p - high).exp(), (high_s - high).exp()
        out = (out_p * by_p + out_s * by_s) / (sum_p * by_p + sum_s * by_s)
        return out.reshape(rows, q_heads, dim).to(q.dtype)


def _softmax_part(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q [..., m, D] (scaled), k, v [..., n, D], padding [..., 1, n] -> max, sum [..., m, 1], out [..., m, D]."""
    scores = q @ k.transpose(-1, -2)
    if padding is not None:
        scores = scores.masked_fill(padding, -torch.inf)
    high = scores.amax(-1, keepdim=True)
    weights = (scores - high).exp()
    return high, weights.sum(-1, keepdim=True), weights @ v
