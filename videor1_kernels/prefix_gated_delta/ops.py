"""The operations of this folder on the backend that is asked for, and as nodes of a compiled graph.

Outside of one, prefix_gated_delta and prefix_causal_conv are what their backend does, which autograd records. The nodes
hold on to their inputs alone, and compute the forward pass again in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import compute_dtype, rarest_dtype
from videor1_kernels.prefix_attention.layout import PrefixLayout, known_layout
from videor1_kernels.prefix_gated_delta.fork import PrefixStates, over_groups
from videor1_kernels.prefix_gated_delta.reference_step import ConvStep, DeltaStep

_LAYOUT = "SymInt[] prompts, SymInt[] counts, SymInt[] completions"


def _dtype(rows: Sequence[Tensor], *others: Tensor | None) -> torch.dtype:
    """What a backend must take: fp64 where an input is, else the dtype of the rows, or fp32 where they differ."""
    if compute_dtype(*rows, *others) == torch.float64:
        return torch.float64
    return rows[0].dtype if len({x.dtype for x in rows}) == 1 else torch.float32


def run_delta(
    inputs: Sequence[Tensor], layout: PrefixLayout, scale: float, use_qk_l2norm: bool, backend: str, *, states: bool
) -> tuple[Tensor, PrefixStates | None]:
    """Return out [T, Hv, Dv] in v's dtype and, with ``states``, the states; of q, k, v, g and beta."""
    v = inputs[2]
    chosen = dispatch.resolve("prefix_gated_delta", backend, v.device, _dtype(inputs[:3], *inputs[3:]))
    rule = functools.partial(chosen.gated_delta_rule, scale=scale, use_qk_l2norm=use_qk_l2norm)
    with dispatch.running_on(v):
        out, after = over_groups(rule, inputs, layout, states=states)
        return out.to(v.dtype), after


def run_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: PrefixLayout, activation: str, backend: str, *, states: bool
) -> tuple[Tensor, PrefixStates | None]:
    """Return out [T, C] in x's dtype and, with ``states``, the last inputs."""
    chosen = dispatch.resolve("prefix_causal_conv", backend, x.device, _dtype([x], weight, bias))
    conv = functools.partial(chosen.causal_conv, weight=weight, bias=bias, activation=activation)
    with dispatch.running_on(x):
        return over_groups(conv, [x], layout, states=states)


def run_delta_step(step: DeltaStep, scale: float, use_qk_l2norm: bool, backend: str) -> Tensor:
    dtype = rarest_dtype(step.q, step.k, step.v, step.g, step.beta, step.state)
    chosen = dispatch.resolve("gated_delta_step", backend, step.v.device, dtype)
    with dispatch.running_on(step.v):
        out: Tensor = chosen.gated_delta_step(step, scale, use_qk_l2norm)
        return out


def run_conv_step(step: ConvStep, activation: str, backend: str) -> Tensor:
    dtype = rarest_dtype(step.x, step.weight, step.bias)
    chosen = dispatch.resolve("causal_conv_step", backend, step.x.device, dtype)
    with dispatch.running_on(step.x):
        out: Tensor = chosen.causal_conv_step(step, activation)
        return out


@torch.library.custom_op(
    "videor1::prefix_gated_delta",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, "
    f"{_LAYOUT}, float scale, bool use_qk_l2norm, str backend) -> Tensor[]",
)
def prefix_gated_delta_op(q, k, v, g, beta, prompts, counts, completions, scale, use_qk_l2norm, backend):
    """Return [out, states of prompts, states of completions]."""
    layout = known_layout(tuple(prompts), tuple(counts), tuple(completions), v.device)
    out, after = run_delta((q, k, v, g, beta), layout, scale, use_qk_l2norm, backend, states=True)
    return _results(out, after)


@prefix_gated_delta_op.register_fake
def _(q, k, v, g, beta, prompts, counts, completions, *others):
    dtype, shape = compute_dtype(q, k, v, g, beta), (v.shape[1], k.shape[2], v.shape[2])
    states = [v.new_empty((len(lengths), *shape), dtype=dtype) for lengths in (prompts, completions)]
    return [v.new_empty(v.shape), *states]


@torch.library.custom_op(
    "videor1::prefix_gated_delta_backward",
    mutates_args=(),
    schema="(Tensor[] gradients, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, "
    f"{_LAYOUT}, float scale, bool use_qk_l2norm, str backend) -> Tensor[]",
)
def prefix_gated_delta_backward_op(gradients, q, k, v, g, beta, *others):
    """Return the gradients of the five tensors."""
    return _again(lambda *leaves: prefix_gated_delta_op._init_fn(*leaves, *others), gradients, (q, k, v, g, beta))


@prefix_gated_delta_backward_op.register_fake
def _(gradients, q, k, v, g, beta, *others):
    return [x.new_empty(x.shape) for x in (q, k, v, g, beta)]


@torch.library.custom_op(
    "videor1::prefix_causal_conv",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {_LAYOUT}, str activation, str backend) -> Tensor[]",
)
def prefix_causal_conv_op(x, weight, bias, prompts, counts, completions, activation, backend):
    """Return [out, last inputs of prompts, last inputs of completions]."""
    layout = known_layout(tuple(prompts), tuple(counts), tuple(completions), x.device)
    return _results(*run_conv(x, weight, bias, layout, activation, backend, states=True))


@prefix_causal_conv_op.register_fake
def _(x, weight, bias, prompts, counts, completions, *others):
    shape = (x.shape[1], weight.shape[1] - 1)
    return [x.new_empty(x.shape), *(x.new_empty((len(lengths), *shape)) for lengths in (prompts, completions))]


@torch.library.custom_op(
    "videor1::prefix_causal_conv_backward",
    mutates_args=(),
    schema="(Tensor[] gradients, Tensor x, Tensor weight, Tensor? bias, "
    f"{_LAYOUT}, str activation, str backend) -> Tensor[]",
)
def prefix_causal_conv_backward_op(gradients, x, weight, bias, *others):
    """Return the gradients of x, weight and, where there is one, bias."""
    leaves = (x, weight) if bias is None else (x, weight, bias)

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
        return prefix_causal_conv_op._init_fn(x, weight, bias, *others)

    return _again(forward, gradients, leaves)


@prefix_causal_conv_backward_op.register_fake
def _(gradients, x, weight, bias, *others):
    return [y.new_empty(y.shape) for y in (x, weight, bias) if y is not None]


def _results(out: Tensor, states: PrefixStates | None) -> list[Tensor]:
    assert states is not None
    return [out.contiguous(), states.prompts.contiguous(), states.completions.contiguous()]


@contextmanager
def _recorded() -> Iterator[None]:
    """Autograd records what runs in the block: within an operator torch leaves autograd out, whatever is enabled."""
    with ExitStack() as stack:
        for name in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
            key = getattr(torch._C.DispatchKey, name)
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


def _again(forward: Callable[..., list[Tensor]], gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the inputs, by another forward pass."""
    with torch.enable_grad(), _recorded():
        leaves = [x.detach().requires_grad_() for x in inputs]
        results = forward(*leaves)
    pairs = [(y, dy) for y, dy in zip(results, gradients, strict=True) if y.requires_grad]
    found = torch.autograd.grad([y for y, _ in pairs], leaves, [dy for _, dy in pairs])
    return [x.contiguous() for x in found]


def _save_delta(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.others = inputs[5:]


def _differentiate_delta(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    return *prefix_gated_delta_backward_op(gradients, *ctx.saved_tensors, *ctx.others), *[None] * 6


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.others = inputs[3:]


def _differentiate_conv(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    found = prefix_causal_conv_backward_op(gradients, *ctx.saved_tensors, *ctx.others)
    return *found, *[None] * (8 - len(found))


prefix_gated_delta_op.register_autograd(_differentiate_delta, setup_context=_save_delta)
prefix_causal_conv_op.register_autograd(_differentiate_conv, setup_context=_save_conv)


@torch.library.custom_op("videor1::gated_delta_step", mutates_args=("state",))
def gated_delta_step_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    backend: str,
) -> Tensor:
    return run_delta_step(DeltaStep(q, k, v, g, beta, state, slots), scale, use_qk_l2norm, backend)


@gated_delta_step_op.register_fake
def _(q, k, v, *others):
    return v.new_empty(v.shape)


@torch.library.custom_op("videor1::causal_conv_step", mutates_args=("state",))
def causal_conv_step_op(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor | None, activation: str, backend: str
) -> Tensor:
    return run_conv_step(ConvStep(x, state, weight, bias, slots), activation, backend)


@causal_conv_step_op.register_fake
def _(x, *others):
    return x.new_empty(x.shape)
