"""Reference of prefix_gated_delta in plain torch: the gated delta rule in chunks, differentiated by autograd.

N tokens of S sequences end to end, Hk heads of q and k with Dk entries, Hv = R Hk heads of v with Dv; M chunks of C
tokens, the last of a sequence padded: there g, beta, q, k and v are 0, which leaves the state as it is.

Within a chunk, with G_t the sum of g up to token t, S the state before the chunk and k_t, v_t as rows, the rule is

    u_t = beta_t (v_t - exp(G_t) k_t S - sum_{s<t} exp(G_t - G_s) (k_t . k_s) u_s)
    out_t = exp(G_t) q_t S + sum_{s<=t} exp(G_t - G_s) (q_t . k_s) u_s
    S' = exp(G_C) S + sum_s exp(G_C - G_s) k_s^T u_s

so that u is a triangular system, solved once for v and once for what stands before S, for all chunks together. Only the
states follow one another. (arXiv 2406.06484, with the gate of arXiv 2412.06464.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from videor1_kernels.checks import compute_dtype
from videor1_kernels.prefix_gated_delta.rows import Move, move_to

CHUNK = 64
EPS = 1e-6  # of the norm of q and k, as in transformers and flash-linear-attention


@dataclass(frozen=True, eq=False)
class Chunks:
    """How sequences are cut: first the first chunk of each, then the second of each that has one, and so on."""

    size: int  # C
    tokens: Move  # N tokens -> M C places
    active: list[int]  # how many sequences have a first chunk, a second, ...
    order: Move  # S sequences -> those with most chunks first


def gated_delta_rule(
    inputs: Sequence[Tensor],
    lengths: tuple[int, ...],
    initial: Tensor | None,
    *,
    final: bool,
    scale: float,
    use_qk_l2norm: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return out [N, Hv, Dv] and the states after the sequences [S, Hv, Dk, Dv], of q, k [N, Hk, Dk], v [N, Hv, Dv],
    g and beta [N, Hv]; both are fp32, or fp64 if an input is."""
    dtype = compute_dtype(*inputs)
    chunks = cut(lengths, inputs[0].device)
    q, k, v, g, beta = (x.to(dtype) for x in inputs)
    key_heads, heads = k.shape[1], v.shape[1]
    if use_qk_l2norm:
        q, k = normalised(q), normalised(k)
    q, k = (_chunked(x, chunks).unsqueeze(2) for x in (q * scale, k))  # [M, Hk, 1, C, Dk]
    v, g, beta = (_chunked(x, chunks).unflatten(1, (key_heads, -1)) for x in (v, g, beta))  # [M, Hk, R, C, ...]

    total = g.cumsum(-1)  # G, [M, Hk, R, C]
    later = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=g.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()  # [M, Hk, R, C, C]
    since = total.exp()  # of the state before the chunk
    system = (k @ k.mT) * (decay * beta[..., None])
    known = torch.cat([v * beta[..., None], k * (beta * since)[..., None]], -1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    own, of_state = solved.split([v.shape[-1], k.shape[-1]], -1)  # u = own - of_state S
    parts = (
        own,
        of_state,
        q * since[..., None],
        (q @ k.mT) * decay,
        k * (total[..., -1:] - total).exp()[..., None],
        total[..., -1, None, None].exp(),
    )
    state = own.new_zeros(len(lengths), heads, k.shape[-1], v.shape[-1]) if initial is None else initial.to(dtype)
    state = chunks.order(state)
    outs, ended = [], []
    steps = zip(*(x.flatten(1, 2).split(chunks.active) for x in parts), strict=True)
    for count, (u, of_state, q, scores, k, kept) in zip(chunks.active, steps, strict=True):  # [count, Hv, C, ...]
        ended.append(state[count:])
        state = state[:count]
        u = u - of_state @ state
        outs.append(q @ state + scores @ u)
        state = kept * state + k.mT @ u
    out = torch.cat(outs).transpose(1, 2).flatten(0, 1)  # [M C, Hv, Dv]
    return chunks.tokens.reverse(out), chunks.order.reverse(torch.cat([state, *reversed(ended)]))


def normalised(x: Tensor) -> Tensor:
    """Each head divided by its length."""
    return x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt()


def _chunked(x: Tensor, chunks: Chunks) -> Tensor:
    """[N, H, ...] -> [M, H, C, ...]."""
    return chunks.tokens(x).unflatten(0, (-1, chunks.size)).transpose(1, 2).contiguous()


@functools.lru_cache(maxsize=64)
def cut(lengths: tuple[int, ...], device: torch.device) -> Chunks:
    """Cut sequences into chunks, of the longest one's length where that is less than CHUNK. Cached, since all layers of
    a model cut the same."""
    size, total = min(CHUNK, max(lengths)), sum(lengths)
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    counts = -(-torch.tensor(lengths) // size)
    order = counts.argsort(descending=True, stable=True)
    active = [int((counts > i).sum()) for i in range(int(counts.max()))]
    first = torch.cat([starts[order[:count]] + i * size for i, count in enumerate(active)])  # [M]
    end = torch.cat([ends[order[:count]] for count in active])
    place = first[:, None] + torch.arange(size)
    place = place.masked_fill(place >= end[:, None], total).flatten()
    return Chunks(size, move_to(place.to(device), total), active, move_to(order.to(device), len(lengths)))
