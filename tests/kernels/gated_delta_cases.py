"""What the tests of linear attention share: rows, the rule token by token, and the convolution output by output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from videor1_kernels import PrefixLayout

Lengths = tuple[list[int], list[list[int]]]
LAYOUTS: dict[str, Lengths] = {
    "one completion": ([3], [[2]]),
    "ragged": ([20, 1, 17], [[18, 1], [16, 3], []]),
    "no completion": ([3], [[]]),
    "only prompts": ([70, 3, 2], [[], [], []]),
    "single tokens": ([1, 1], [[1], [1, 1, 1]]),
    "whole chunks": ([128], [[64, 128]]),
    "a token more than a chunk": ([65, 5], [[65, 2], [4]]),
    "many chunks": ([200, 2], [[130, 1, 64], [70]]),
}
NAMES = ("q", "k", "v", "g", "beta")


def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token, heads apart, as the formula has it: [N, Hv, Dv] and the state after it, of ready q and k."""
    repeat, outs = v.shape[1] // k.shape[1], []
    for t in range(len(q)):
        heads = []
        for h in range(v.shape[1]):
            key, query = k[t, h // repeat], q[t, h // repeat]
            held = g[t, h].exp() * state[h]
            held = held + torch.outer(key, beta[t, h] * (v[t, h] - key @ held))
            heads.append((held, query @ held))
        state = torch.stack([held for held, _ in heads])
        outs.append(torch.stack([out for _, out in heads]))
    return torch.stack(outs), state


def segments(lengths: Lengths) -> Iterator[tuple[slice, list[slice]]]:
    """Where the prompt and the completions of each group stand."""
    at = 0
    for prompt, completions in zip(*lengths, strict=True):
        parts = []
        for length in (prompt, *completions):
            parts.append(slice(at, at + length))
            at += length
        yield parts[0], parts[1:]


def over(
    lengths: Lengths, run: Callable[[slice, Tensor | None], tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The outputs in the order of the row, and the states after the prompts and after the completions."""
    outs, prompts, ends = [], [], []
    for prompt, completions in segments(lengths):
        out, state = run(prompt, None)
        outs.append(out)
        prompts.append(state)
        for own in completions:
            out, end = run(own, state)
            outs.append(out)
            ends.append(end)
    return torch.cat(outs), prompts, ends


@dataclass(frozen=True)
class Delta:
    """q, k, v, g and beta of a packed row, and the gradients of the output and of the states."""

    lengths: Lengths
    inputs: Sequence[Tensor]
    grad: Tensor
    state_grads: tuple[Tensor, Tensor]
    scale: float | None = None
    norm: bool = True
    layout: PrefixLayout = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", PrefixLayout(*self.lengths))

    def exact(self) -> list[Tensor]:
        """Output, states of prompts and of completions, and the gradients of the inputs, in fp64 by the rule."""
        leaves = [x.detach().double().requires_grad_() for x in self.inputs]
        q, k, v, g, beta = leaves
        if self.norm:
            q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        q = q * (self.scale or k.shape[-1] ** -0.5)
        nothing = v.new_zeros(v.shape[1], k.shape[2], v.shape[2])

        def run(part: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
            return rule(q[part], k[part], v[part], g[part], beta[part], nothing if state is None else state)

        out, prompts, ends = over(self.lengths, run)
        states = [torch.stack(x) if x else nothing.expand(0, *nothing.shape) for x in (prompts, ends)]
        total = (out * self.grad.double()).sum()
        for state, grad in zip(states, self.state_grads, strict=True):
            total = total + (state * grad.double()).sum()
        return [out.detach(), *(x.detach() for x in states), *torch.autograd.grad(total, leaves)]


def make_delta(
    lengths: Lengths,
    heads: tuple[int, int] = (1, 2),
    dims: tuple[int, int] = (8, 6),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: object,
) -> Delta:
    """Decays from 0.3 to 1, beta from 0 to 1, values and gradients of order 1. Without the norm of q and k in the rule
    they have it already: with longer keys a state grows without bound."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    prompts, completions = lengths
    rows = sum(prompts) + sum(map(sum, completions))
    (key_heads, value_heads), (dk, dv) = heads, dims
    q, k, v = normal(rows, key_heads, dk), normal(rows, key_heads, dk), normal(rows, value_heads, dv)
    if options.get("norm") is False:
        q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    g, beta = -1.2 * torch.rand(rows, value_heads, dtype=torch.float64, generator=generator), normal(rows, value_heads)
    counts = len(prompts), sum(map(len, completions))
    grads = [normal(n, value_heads, dk, dv) for n in counts]
    made = [x.to(dtype) for x in (q, k, v, g, beta.sigmoid(), normal(rows, value_heads, dv))]
    return replace(
        Delta(lengths, [x.requires_grad_() for x in made[:5]], made[5], (grads[0], grads[1])),
        **options,  # type: ignore[arg-type]
    )


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor) -> tuple[Tensor, Tensor]:
    """Output by output: [N, C] and the last inputs [C, K - 1], of x [N, C] after ``before`` [C, K - 1]."""
    size = weight.shape[1]
    row = torch.cat([before.T, x])
    outs = [
        sum((row[t + j] * weight[:, j] for j in range(size)), torch.zeros_like(x[0])) + (0 if bias is None else bias)
        for t in range(len(x))
    ]
    return torch.stack(outs), row[len(row) - size + 1 :].T
