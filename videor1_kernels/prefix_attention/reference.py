"""References in plain torch. T tokens of a packed row, Hq query heads, Hkv key heads, D head dim."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from videor1_kernels.checks import compute_dtype, fail
from videor1_kernels.prefix_attention.layout import DecodeLayout, PrefixLayout


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
    """q [T, Hq, D], k, v [T, Hkv, D] -> [T, Hq, D] in q's dtype. A prompt is attended once, not once per completion."""
    dtype = compute_dtype(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        qc, kc, vc = q.to(dtype), k.to(dtype), v.to(dtype)
        groups = [_group(qc, kc, vc, layout, group, scale) for group in range(len(layout.prompt_lengths))]
        return torch.cat(groups).to(q.dtype)


def _group(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, group: int, scale: float) -> Tensor:
    start, length = layout.prompt_starts[group], layout.prompt_lengths[group]
    qp, kp, vp = (x[None, start : start + length].transpose(1, 2) for x in (q, k, v))  # [1, heads, P, D]
    prompt = F.scaled_dot_product_attention(qp, kp, vp, is_causal=True, scale=scale, enable_gqa=True)
    prompt = prompt[0].transpose(0, 1)  # [P, Hq, D]
    if not layout.completion_lengths[group]:
        return prompt
    index, real = layout.padded_completions(group)  # [G, C]
    count, width = index.shape
    qc, kc, vc = (x[index].transpose(1, 2) for x in (q, k, v))  # [G, heads, C, D]
    keys, values = (torch.cat([a.expand(count, -1, -1, -1), b], dim=2) for a, b in ((kp, kc), (vp, vc)))
    # [C, P + C]: the whole prompt, and the completion up to the token itself. Padding lies behind every real token.
    mask = torch.ones(width, length + width, dtype=torch.bool, device=q.device).tril(length)
    out = F.scaled_dot_product_attention(qc, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    return torch.cat([prompt, out.transpose(1, 2)[real]])


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
    """Two softmax parts, over the group's prefix and over the row's own suffix, merged by their maxima and sums.

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
        keys, values = (x[layout.prefix_index].to(dtype).transpose(1, 2) for x in (prefix_k, prefix_v))
        parts = _softmax_part(grouped, keys, values, layout.prefix_real[:, None, None])
        high_p, sum_p, out_p = (
            x.view(groups, kv_heads, most, repeat, -1).transpose(1, 2).flatten(0, 1)[layout.slot] for x in parts
        )

        shortest, width = torch.stack(suffix_lengths.aminmax()).tolist()  # one wait for the device
        if shortest < 1 or width > suffix_k.shape[1]:
            expected, got = f"values from 1 to C = {suffix_k.shape[1]}", f"{shortest} to {width}"
            raise fail("prefix_decode_attention", "suffix_lengths", expected, got)
        real = torch.arange(width, device=q.device) < suffix_lengths[:, None]  # [R, C]
        # Entries past a row's length may hold anything: zero them, as 0 * NaN would be NaN.
        keys, values = (
            x[:, :width].to(dtype).masked_fill(~real[..., None, None], 0.0).transpose(1, 2)
            for x in (suffix_k, suffix_v)
        )
        high_s, sum_s, out_s = _softmax_part(scaled, keys, values, real[:, None, None])

        high = torch.maximum(high_p, high_s)
        by_p, by_s = (high_p - high).exp(), (high_s - high).exp()
        out = (out_p * by_p + out_s * by_s) / (sum_p * by_p + sum_s * by_s)
        return out.reshape(rows, q_heads, dim).to(q.dtype)


def _softmax_part(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [..., m, D] (scaled), k, v [..., n, D], real [..., 1, n] -> max, sum [..., m, 1], out [..., m, D]."""
    scores = (q @ k.transpose(-1, -2)).masked_fill(~real, -torch.inf)
    high = scores.amax(-1, keepdim=True)
    weights = (scores - high).exp()
    return high, weights.sum(-1, keepdim=True), weights @ v
