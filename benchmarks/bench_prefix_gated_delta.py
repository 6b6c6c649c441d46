"""prefix_gated_delta and prefix_causal_conv: one group of a shared prompt and its completions, beside repeated rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.oracle import Expected
from videor1_kernels import PrefixLayout, prefix_causal_conv, prefix_gated_delta

Call = Callable[[Sequence[Tensor], PrefixLayout], Tensor]


@dataclass(frozen=True)
class Size:
    """P prompt tokens, G completions of C tokens, Hk heads of q and k, Hv of v, all of D entries."""

    model: str
    prompt: int
    generations: int
    completion: int
    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype

    @property
    def channels(self) -> int:
        """Of the convolution: q, k and v."""
        return (2 * self.heads[0] + self.heads[1]) * self.head_dim


@dataclass(frozen=True)
class RowInputs:
    """A packed row: leaves that require gradients, and the gradient of the output."""

    size: Size
    layout: PrefixLayout
    leaves: Sequence[Tensor]
    grad: Tensor

    @property
    def repeated(self) -> tuple[Tensor, PrefixLayout]:
        """int64 [G (P + C)]: the positions of every [prompt | completion], and their layout, without completions."""
        size, layout = self.size, self.layout
        prompt = layout.prompt_index.expand(size.generations, -1)
        rows = torch.cat([prompt, layout.completion_index.view(size.generations, -1)], 1)
        lengths = [rows.shape[1]] * size.generations
        return rows.flatten(), PrefixLayout(lengths, [[]] * size.generations, layout.device)


def cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        sizes = [Size("Qwen3.5, 32 heads", 1224, 8, 768, (16, 32), 128, torch.bfloat16)]
    else:
        sizes = [
            Size("small", 96, 4, 48, (2, 4), 32, torch.float32),
            Size("medium", 306, 8, 64, (2, 4), 64, torch.float32),
        ]
    return [make(size, backward=backward) for size in sizes for make in (_delta, _conv) for backward in (False, True)]


def _delta(size: Size, *, backward: bool) -> Case:
    def call(leaves: Sequence[Tensor], layout: PrefixLayout) -> Tensor:
        return prefix_gated_delta(*leaves, layout)

    return _case("prefix_gated_delta", size, delta_inputs, call, ("dq", "dk", "dv", "dg", "dbeta"), backward)


def _conv(size: Size, *, backward: bool) -> Case:
    def call(leaves: Sequence[Tensor], layout: PrefixLayout) -> Tensor:
        return prefix_causal_conv(*leaves, layout, activation="silu")

    return _case("prefix_causal_conv", size, conv_inputs, call, ("dx", "dweight"), backward)


def _case(
    op: str,
    size: Size,
    inputs: Callable[[Size, torch.device], RowInputs],
    call: Call,
    names: Sequence[str],
    backward: bool,
) -> Case:
    build = functools.partial(_step, call=call, names=names if backward else ())
    return Case(
        op=op,
        title="forward + backward" if backward else "forward",
        size={"model": size.model, "P": size.prompt, "G": size.generations, "C": size.completion},
        dtype=size.dtype,
        inputs=functools.partial(inputs, size),
        expected=functools.partial(_expected, op=op, names=names if backward else ()),
        work=functools.partial(_work, backward=backward),
        contenders=(
            Contender(OURS, build),
            Contender(
                "torch (our reference), repeated rows",
                functools.partial(build, repeated=True),
                lambda device: None if device.type == "cpu" else "it is not meant for 16 bits on a GPU",
                does="every prompt G times",
            ),
        ),
    )


def delta_inputs(size: Size, device: torch.device) -> RowInputs:
    """Decays from 0.3 to 1, rates from 0 to 1."""
    layout = PrefixLayout([size.prompt], [[size.completion] * size.generations], device)
    generator = torch.Generator(device).manual_seed(0)
    (key_heads, heads), rows = size.heads, layout.total_tokens

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator, device=device)

    q, k, v, grad = (normal(n, size.head_dim).to(size.dtype) for n in (key_heads, key_heads, heads, heads))
    g, beta = -1.2 * torch.rand(rows, heads, generator=generator, device=device), normal(heads).sigmoid().to(size.dtype)
    return RowInputs(size, layout, [x.requires_grad_() for x in (q, k, v, g, beta)], grad)


def conv_inputs(size: Size, device: torch.device) -> RowInputs:
    layout = PrefixLayout([size.prompt], [[size.completion] * size.generations], device)
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((layout.total_tokens, size.channels), (size.channels, 4), (layout.total_tokens, size.channels))
    x, weight, grad = (torch.randn(s, generator=generator, device=device).to(size.dtype) for s in shapes)
    return RowInputs(size, layout, [x.requires_grad_(), weight.requires_grad_()], grad)


def _step(inputs: RowInputs, *, call: Call, names: Sequence[str], repeated: bool = False) -> Step:
    """``repeated``: every [prompt | completion] by itself, its rows gathered, from which the packed row is taken."""
    index, rows = inputs.repeated
    prompt, tokens = inputs.size.prompt, inputs.layout.total_tokens

    def packed(leaves: Sequence[Tensor]) -> Tensor:
        if not repeated:
            return call(leaves, inputs.layout)
        out = call([x[index] if len(x) == tokens else x for x in leaves], rows)
        out = out.unflatten(0, (inputs.size.generations, -1))
        return torch.cat([out[0, :prompt], out[:, prompt:].flatten(0, 1)])

    def forward() -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"out": packed(inputs.leaves)}

    def forward_backward() -> Mapping[str, Tensor]:
        out = packed(inputs.leaves)
        gradients = torch.autograd.grad(out, inputs.leaves, inputs.grad)
        return {"out": out.detach()} | dict(zip(names, gradients, strict=True))

    return forward_backward if names else forward


def _expected(inputs: RowInputs, *, op: str, names: Sequence[str]) -> Sequence[Expected]:
    """All of the outputs by the reference in fp64; errors relative to their norms."""
    leaves = [x.detach().double().requires_grad_() for x in inputs.leaves]
    if op == "prefix_gated_delta":
        out = prefix_gated_delta(*leaves, inputs.layout, backend="reference")
    else:
        out = prefix_causal_conv(*leaves, inputs.layout, activation="silu", backend="reference")
    values = {"out": out.detach()}
    if names:
        values |= dict(zip(names, torch.autograd.grad(out, leaves, inputs.grad.double()), strict=True))
    return [Expected(name, name, value.flatten(0, -2), gradient=True) for name, value in values.items()]


def _work(inputs: RowInputs, *, backward: bool) -> Work:
    """Bound by memory: what chunks multiply depends on their length, which is the implementation's choice."""
    moved = sum(x.nbytes for x in inputs.leaves) + inputs.grad.nbytes
    return Work(0.0, float(moved * (3 if backward else 1)), "")


def test_prefix_gated_delta(run_case):
    run_case()
