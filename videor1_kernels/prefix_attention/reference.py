"""Reference in plain torch: each prompt is attended once, and once by all its completions' tokens together.

T tokens of a packed row, Hq query heads, Hkv key heads, D head dim. A completion's softmax has two parts, over its
prompt and over itself. With o_1, l_1 and o_2, l_2 the outputs and the log-sum-exps of the parts,

    l = log(exp l_1 + exp l_2),   o = o_1 exp(l_1 - l) + o_2 exp(l_2 - l).

The gradient of either part needs the merged o and l alone: its probabilities are exp(score - l), and the term that
all scores of a row share, the sum of do * o, belongs to the whole softmax. The compute dtype is fp64 where an input is
fp64, else fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from videor1_kernels.checks import compute_dtype
from videor1_kernels.prefix_attention import softmax
from videor1_kernels.prefix_attention.layout import PrefixLayout


def forward(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k, v [T, Hkv, D] -> (out [T, Hq, D], lse [Hq, T]), in the compute dtype."""
    q, k, v = _wide(q, k, v)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
    for prompt, completions in _segments(layout):
        out[prompt], lse[:, prompt] = softmax.forward(q[prompt], k[prompt], v[prompt], scale, causal=True)
        if not completions:
            continue
        every = slice(completions[0].start, completions[-1].stop)
        out[every], lse[:, every] = softmax.forward(q[every], k[prompt], v[prompt], scale, causal=False)
        for own in completions:
            o, high = softmax.forward(q[own], k[own], v[own], scale, causal=True)
            merged = torch.logaddexp(lse[:, own], high)
            out[own] *= (lse[:, own] - merged).exp_().T[..., None]
            out[own] += o * (high - merged).exp_().T[..., None]
            lse[:, own] = merged
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: PrefixLayout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each in its input's dtype, from the gradient of ``out``; ``out``, ``lse``: :func:`forward`'s."""
    inputs, (q, k, v, grad) = (q, k, v), _wide(q, k, v, grad)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))

    def part(rows: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        return softmax.backward(grad[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows], scale, causal=causal)

    for prompt, completions in _segments(layout):
        dq[prompt], dk[prompt], dv[prompt] = part(prompt, prompt, causal=True)
        if not completions:
            continue
        every = slice(completions[0].start, completions[-1].stop)
        dq[every], dk_prompt, dv_prompt = part(every, prompt, causal=False)
        dk[prompt] += dk_prompt
        dv[prompt] += dv_prompt
        for own in completions:
            dq_own, dk[own], dv[own] = part(own, own, causal=True)
            dq[own] += dq_own
    dq, dk, dv = (gradient.to(x.dtype) for gradient, x in zip((dq, dk, dv), inputs, strict=True))
    return dq, dk, dv


def _wide(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> list[Tensor]:
    dtype = compute_dtype(q, k, v)
    return [x.to(dtype) if x.stride(-1) == 1 else x.to(dtype).contiguous() for x in (q, k, v, *others)]


def _segments(layout: PrefixLayout) -> Iterator[tuple[slice, list[slice]]]:
    """Per group, the row positions of its prompt and of each of its completions."""
    for start, length, starts, lengths in zip(
        layout.prompt_starts, layout.prompt_lengths, layout.completion_starts, layout.completion_lengths, strict=True
    ):
        own = [slice(first, first + count) for first, count in zip(starts, lengths, strict=True)]
        yield slice(start, start + length), own
