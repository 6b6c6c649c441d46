"""Reference of decode attention in plain torch: one softmax over the scores of a row's prefix and of its own suffix.

R rows, Hq = Hkv * r heads; B prefixes of at most L tokens with at most M rows each; suffixes of at most W tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels.checks import compute_dtype, fail
from videor1_kernels.dispatch import exactly
from videor1_kernels.prefix_attention.decode_layout import DecodeInputs, DecodeLayout


def prefix_decode_attention(inputs: DecodeInputs, layout: DecodeLayout, scale: float) -> Tensor:
    """The attention's output [R, Hq, D], in q's dtype. Each prefix is multiplied once with the queries of its rows."""
    q, prefix_k, prefix_v, suffix_k, suffix_v, suffix_lengths = inputs
    if not len(q):
        return torch.empty_like(q)
    lengths = suffix_lengths.tolist()  # waits for the device
    shortest, width = min(lengths), max(lengths)
    if shortest < 1 or width > suffix_k.shape[1]:
        expected, got = f"values from 1 to C = {suffix_k.shape[1]}", f"{shortest} to {width}"
        raise fail("prefix_decode_attention", "suffix_lengths", expected, got)
    dtype = compute_dtype(q, prefix_k, prefix_v, suffix_k, suffix_v)
    with exactly(q):
        rows, q_heads, dim = q.shape
        heads = prefix_k.shape[1]
        padded = layout.gather
        groups, most = padded.rows.shape

        # Key heads first: each product is one batched product of blocks that lie together.
        queries = (q.to(dtype) * scale).view(rows, heads, -1, dim).transpose(0, 1)  # [Hkv, R, r, D]
        shared = queries if padded.in_order else queries.index_select(1, padded.rows.flatten())
        keys, values = (_by_head(padded.select(x.to(dtype))) for x in (prefix_k, prefix_v))  # [Hkv * B, L, D]
        scores = torch.bmm(shared.reshape(heads * groups, -1, dim), keys.mT)
        if padded.hidden is not None:
            hidden = padded.hidden[None, :, None]
            scores.view(heads, groups, *scores.shape[1:]).masked_fill_(hidden, -torch.inf)
        scores = padded.to_rows(scores.view(heads, groups * most, -1, keys.shape[1]))

        own_keys, own_values = (_own(x, layout, width).to(dtype) for x in (suffix_k, suffix_v))  # [R, W, Hkv, D]
        if shortest < width:
            # Entries past a row's length may hold anything: their scores are masked, but 0 * NaN would be NaN.
            unused = torch.arange(width, device=q.device) >= suffix_lengths[:, None]  # [R, W]
            own_values = own_values.masked_fill(unused[:, :, None, None], 0.0)
        own_keys, own_values = _by_head(own_keys), _by_head(own_values)  # [Hkv * R, W, D]
        own_scores = torch.bmm(queries.reshape(heads * rows, -1, dim), own_keys.mT).view(heads, rows, -1, width)
        if shortest < width:
            own_scores.masked_fill_(unused[None, :, None], -torch.inf)

        weights = torch.cat([scores, own_scores], -1).softmax(-1)  # [Hkv, R, r, L + W]
        by_prefix, by_own = weights.split([keys.shape[1], width], -1)
        if not padded.in_order:
            by_prefix = by_prefix.index_select(1, padded.rows.flatten())
        out = torch.bmm(by_prefix.reshape(heads * groups, -1, keys.shape[1]), values)
        out = padded.to_rows(out.view(heads, groups * most, -1, dim))
        out = torch.baddbmm(out.reshape(heads * rows, -1, dim), by_own.flatten(0, 1), own_values)
        return out.view(heads, rows, -1, dim).transpose(0, 1).reshape(rows, q_heads, dim).to(q.dtype)


def _own(suffix: Tensor, layout: DecodeLayout, width: int) -> Tensor:
    """The rows' own entries [R, W, Hkv, D]."""
    suffix = suffix[:, :width]
    if layout.slots_in_order:
        return suffix[: len(layout.row_group)]
    assert layout.suffix_slots is not None
    return suffix.index_select(0, layout.suffix_slots)


def _by_head(x: Tensor) -> Tensor:
    """[n, m, Hkv, D] -> [Hkv * n, m, D]."""
    return x.permute(2, 0, 1, 3).flatten(0, 1)
