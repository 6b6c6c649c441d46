"""Reference in plain torch: the tokens of all completions of a group attend to their prompt in one product.

T tokens of a packed row, Hq query heads, Hkv key heads, D head dim. The softmax of a completion's token has two parts,
over the prompt and over the completion itself. With o_1, l_1 and o_2, l_2 their outputs and log-sum-exps,

    l = log(exp l_1 + exp l_2),   o = o_1 exp(l_1 - l) + o_2 exp(l_2 - l).

The gradient of each part needs only the merged o and l: its probabilities are exp(score - l), and the term that all
scores of a row share, the sum of do * o, belongs to the whole softmax. The compute dtype is fp64 if an input is fp64,
else fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from videor1_kernels.checks import compute_dtype
from videor1_kernels.prefix_attention import softmax
from videor1_kernels.prefix_attention.layout import PrefixLayout


def forward(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [T, Hq, D] and lse [Hq, T], in the compute dtype, of q [T, Hq, D] and k, v [T, Hkv, D]."""
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
    """Return (dq, dk, dv), each in its input's dtype, from the gradient of ``out`` and the forward pass's results."""
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
