"""Linear attention (gated delta rule) and the convolution before it: with shared prompts, and one token at a time."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import FLOATS, INTEGERS, check_choice, check_no_gradient, check_number, check_tensor, fail
from videor1_kernels.prefix_attention.layout import PrefixLayout, layout_numbers
from videor1_kernels.prefix_gated_delta import fla, reference, reference_conv, reference_step
from videor1_kernels.prefix_gated_delta.fork import PrefixStates
from videor1_kernels.prefix_gated_delta.ops import (
    causal_conv_step_op,
    gated_delta_step_op,
    prefix_causal_conv_op,
    prefix_gated_delta_op,
    run_conv,
    run_conv_step,
    run_delta,
    run_delta_step,
)
from videor1_kernels.prefix_gated_delta.reference_step import ConvStep, DeltaStep

ACTIVATIONS = ("none", "silu")

__all__ = ["PrefixStates", "causal_conv_step", "gated_delta_step", "prefix_causal_conv", "prefix_gated_delta"]

for _op, _module in (("prefix_gated_delta", reference), ("prefix_causal_conv", reference_conv)):
    dispatch.register(_op, "fla", fla, unavailable=fla.unavailable)
    dispatch.register(_op, "reference", _module, only_explicit=fla.reference_is_slow)
for _op in ("gated_delta_step", "causal_conv_step"):
    dispatch.register_triton(_op, "videor1_kernels.prefix_gated_delta.triton_step")
    dispatch.register(_op, "reference", reference_step)


@overload
def prefix_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: PrefixLayout, *, scale: float | None = None,
    use_qk_l2norm: bool = True, return_states: Literal[False] = False, backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def prefix_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: PrefixLayout, *, scale: float | None = None,
    use_qk_l2norm: bool = True, return_states: Literal[True], backend: str = "auto",
) -> tuple[Tensor, PrefixStates]: ...  # fmt: skip


def prefix_gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    return_states: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, PrefixStates]:
    """Gated delta rule over one packed row of shared-prefix groups, [prompt | completion 1 | ... | completion G] each.

    Each value head has a state S [Dk, Dv]. A token decays it, corrects what it holds for its key, and reads it::

        S <- exp(g_t) S
        S <- S + beta_t k_t^T (v_t - k_t S)
        out_t = scale q_t S

    A prompt begins with S = 0, and each of its completions with the prompt's last S: equal to the rule over each
    [prompt | completion] by itself, with the prompt run once. The gradients of all completions are summed into it.

    Args:
        q, k: [T, Hk, Dk], fp64, fp32, bf16 or fp16.
        v: [T, Hv, Dv], fp64, fp32, bf16 or fp16; Hv a multiple of Hk: value head h reads key head h // (Hv / Hk).
        g: [T, Hv], the logarithm of the decay, 0 or less; fp64, fp32, bf16 or fp16.
        beta: [T, Hv], how much of the correction is made, 0 to 1; fp64, fp32, bf16 or fp16.
        layout: the order of the row, T = ``layout.total_tokens``.
        scale: factor on q; None: Dk ** -0.5.
        use_qk_l2norm: whether q and k are divided by their length first: x / sqrt(sum(x^2) + 1e-6), as Qwen3.5 does.
        return_states: whether to return the states too.
        backend: ``auto``, ``fla`` (on a GPU: q, k and v all bf16 or all fp16, Dk of 256 or less; the extra ``fla``),
            ``reference``. For 16 bits on a GPU ``auto`` takes nothing but ``fla``: without the extra it is an error.

    Returns:
        [T, Hv, Dv] in v's dtype, differentiable into the five tensors; with ``return_states`` (out, states),
        states being a :class:`PrefixStates`. States and sums are fp32, or fp64 if an input is.

    Raises:
        ValueError: a wrong shape, dtype or device, or a backend that cannot run here.
        TypeError: a layout of another type, or an argument that is no tensor.

    Source:
        This library; the rule is that of arXiv 2412.06464, in chunks as in arXiv 2406.06484, on a GPU by
        https://github.com/fla-org/flash-linear-attention.
    """
    op = "prefix_gated_delta"
    _check_layout(op, layout)
    _check_heads(op, layout.total_tokens, "T", q, k, v, g, beta)
    _check_place(op, layout, q)
    _check_flag(op, "use_qk_l2norm", use_qk_l2norm)
    _check_flag(op, "return_states", return_states)
    factor, inputs = _scale(op, scale, k), (q, k, v, g, beta)
    if torch.compiler.is_compiling():
        out, *states = prefix_gated_delta_op(*inputs, *layout_numbers(layout), factor, use_qk_l2norm, backend)
        return (out, PrefixStates(*states)) if return_states else out
    out, after = run_delta(inputs, layout, factor, use_qk_l2norm, backend, states=return_states)
    return out if after is None else (out, after)


@overload
def prefix_causal_conv(
    x: Tensor, weight: Tensor, layout: PrefixLayout, *, bias: Tensor | None = None, activation: str = "none",
    return_states: Literal[False] = False, backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def prefix_causal_conv(
    x: Tensor, weight: Tensor, layout: PrefixLayout, *, bias: Tensor | None = None, activation: str = "none",
    return_states: Literal[True], backend: str = "auto",
) -> tuple[Tensor, PrefixStates]: ...  # fmt: skip


def prefix_causal_conv(
    x: Tensor,
    weight: Tensor,
    layout: PrefixLayout,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    return_states: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, PrefixStates]:
    """Causal convolution of each channel by itself, over one packed row of shared-prefix groups.

    out_t = activation(bias + sum_j weight[:, j] x_{t-K+1+j}), j from 0 to K - 1, where x before a prompt is 0 and x
    before a completion is the end of its prompt.

    Args:
        x: [T, C], fp64, fp32, bf16 or fp16.
        weight: [C, K], the newest input's last, as ``conv1d.weight.squeeze(1)``; fp64, fp32, bf16 or fp16.
        layout: the order of the row, T = ``layout.total_tokens``.
        bias: [C], fp64, fp32, bf16 or fp16.
        activation: ``none`` or ``silu``.
        return_states: whether to return the last K - 1 inputs of each prompt and completion too.
        backend: ``auto``, ``fla`` (on a GPU: x bf16 or fp16; the extra ``fla``), ``reference``. ``auto`` does not take
            the reference for 16 bits on a GPU: without the extra it is an error.

    Returns:
        [T, C] in x's dtype, differentiable into x, weight and bias; with ``return_states`` (out, states), states
        being a :class:`PrefixStates`. Products and sum are fp32, or fp64 if an input is, rounded once.

    Raises:
        ValueError: a wrong shape, dtype, device or activation, or a backend that cannot run here.
        TypeError: a layout of another type, or an argument that is no tensor.

    Source:
        This library; on a GPU by https://github.com/fla-org/flash-linear-attention.
    """
    op = "prefix_causal_conv"
    _check_layout(op, layout)
    check_tensor(op, "x", x, (layout.total_tokens, "C"))
    _check_filter(op, x, weight, bias, activation)
    _check_place(op, layout, x)
    _check_flag(op, "return_states", return_states)
    if torch.compiler.is_compiling():
        out, *states = prefix_causal_conv_op(x, weight, bias, *layout_numbers(layout), activation, backend)
        return (out, PrefixStates(*states)) if return_states else out
    out, after = run_conv(x, weight, bias, layout, activation, backend, states=return_states)
    return out if after is None else (out, after)


def gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Gated delta rule of one new token per row: the rule of ``prefix_gated_delta``, from a state. For inference.

    **state changes in place.** Rows may not share a slot.

    Args:
        q, k: [R, Hk, Dk], fp64, fp32, bf16 or fp16.
        v: [R, Hv, Dv], fp64, fp32, bf16 or fp16; Hv a multiple of Hk: value head h reads key head h // (Hv / Hk).
        g: [R, Hv], the logarithm of the decay, 0 or less; fp64, fp32, bf16 or fp16.
        beta: [R, Hv], how much of the correction is made, 0 to 1; fp64, fp32, bf16 or fp16.
        state: [S, Hv, Dk, Dv], fp32 (or fp64), preallocated; each slot's numbers side by side in memory.
        slots: int32 or int64 [R], in [0, S); None: row r has slot r.
        scale: factor on q; None: Dk ** -0.5.
        use_qk_l2norm: whether q and k are divided by their length first: x / sqrt(sum(x^2) + 1e-6), as Qwen3.5 does.
        backend: ``auto``, ``triton``, ``reference``.

    Returns:
        [R, Hv, Dv] in v's dtype; no gradient. The maths is fp32, or fp64 where an input is.

    Raises:
        ValueError: a wrong shape, dtype, device or stride, a slot out of range, an input that requires a gradient while
            torch records them, or a backend that cannot run here. The Triton kernel does not wait for the device, so
            that no slot out of range is found: such a row gets NaN and writes nothing.
        TypeError: an argument that is no tensor.

    Source:
        This library; the rule is that of arXiv 2412.06464.
    """
    op = "gated_delta_step"
    check_tensor(op, "q", q, ("R", "Hk", "Dk"))
    _check_heads(op, len(q), "R", q, k, v, g, beta)
    shape = ("S", v.shape[1], k.shape[2], v.shape[2])
    check_tensor(op, "state", state, shape, (torch.float64, torch.float32), q.device)
    _check_slots(op, state, slots, len(q), q.device)
    _check_flag(op, "use_qk_l2norm", use_qk_l2norm)
    check_no_gradient(op, q=q, k=k, v=v, g=g, beta=beta, state=state)
    factor = _scale(op, scale, k)
    if torch.compiler.is_compiling():
        return gated_delta_step_op(q, k, v, g, beta, state, slots, factor, use_qk_l2norm, backend)
    return run_delta_step(DeltaStep(q, k, v, g, beta, state, slots), factor, use_qk_l2norm, backend)


def causal_conv_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    slots: Tensor | None = None,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """Causal convolution of one new token per row: that of ``prefix_causal_conv``, from its last inputs. For inference.

    **state changes in place**: the oldest input goes, x comes. Rows may not share a slot.

    Args:
        x: [R, C], fp64, fp32, bf16 or fp16.
        state: [S, C, L], L = K - 1, in x's dtype (fp64, fp32, bf16 or fp16), preallocated, the oldest input first; each
            slot's numbers side by side in memory.
        weight: [C, K], the newest input's last; fp64, fp32, bf16 or fp16.
        bias: [C], fp64, fp32, bf16 or fp16.
        slots: int32 or int64 [R], in [0, S); None: row r has slot r.
        activation: ``none`` or ``silu``.
        backend: ``auto``, ``triton``, ``reference``.

    Returns:
        [R, C] in x's dtype; no gradient. Products and sum are fp32, or fp64 where an input is, rounded once.

    Raises:
        ValueError: a wrong shape, dtype, device, stride or activation, a slot out of range, an input that requires a
            gradient while torch records them, or a backend that cannot run here. The Triton kernel does not wait for
            the device, so that no slot out of range is found: such a row gets NaN and writes nothing.
        TypeError: an argument that is no tensor.

    Source:
        This library.
    """
    op = "causal_conv_step"
    check_tensor(op, "x", x, ("R", "C"))
    _check_filter(op, x, weight, bias, activation)
    check_tensor(op, "state", state, ("S", x.shape[1], weight.shape[1] - 1), (x.dtype,), x.device)
    _check_slots(op, state, slots, len(x), x.device)
    check_no_gradient(op, x=x, state=state, weight=weight, bias=bias)
    if torch.compiler.is_compiling():
        return causal_conv_step_op(x, state, weight, bias, slots, activation, backend)
    return run_conv_step(ConvStep(x, state, weight, bias, slots), activation, backend)


def _check_layout(op: str, layout: object) -> None:
    if not isinstance(layout, PrefixLayout):
        raise TypeError(f"{op}: layout: expected a PrefixLayout, got {type(layout).__name__}")


def _check_place(op: str, layout: PrefixLayout, first: Tensor) -> None:
    if layout.prompt_index.device != first.device:
        raise fail(op, "layout", f"index tensors on {first.device} (use layout.to)", layout.device)


def _check_heads(op: str, rows: int, letter: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    check_tensor(op, "q", q, (rows, "Hk", "Dk"))
    if not q.shape[1] or not q.shape[2]:
        raise fail(op, "q", "at least one head of at least one entry", list(q.shape))
    check_tensor(op, "k", k, q.shape, device=q.device)
    check_tensor(op, "v", v, (rows, "Hv", "Dv"), device=q.device)
    if not v.shape[1] or v.shape[1] % q.shape[1] or not v.shape[2]:
        expected = f"[{letter}, Hv, Dv], Hv a multiple of the {q.shape[1]} heads of q"
        raise fail(op, "v", expected, list(v.shape))
    for name, value in (("g", g), ("beta", beta)):
        check_tensor(op, name, value, v.shape[:2], device=q.device)


def _check_filter(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    if not x.shape[1]:
        raise fail(op, "x", "at least one channel", list(x.shape))
    check_tensor(op, "weight", weight, (x.shape[1], "K"), device=x.device)
    if not weight.shape[1]:
        raise fail(op, "weight", "a filter of at least one input", list(weight.shape))
    if bias is not None:
        check_tensor(op, "bias", bias, (x.shape[1],), FLOATS, x.device)
    check_choice(op, "activation", activation, ACTIVATIONS)


def _check_slots(op: str, state: Tensor, slots: Tensor | None, rows: int, device: torch.device) -> None:
    if len(state) and not state[0].is_contiguous():
        raise fail(op, "state", "the numbers of a slot side by side (state[0] contiguous)", state.stride())
    if slots is not None:
        check_tensor(op, "slots", slots, (rows,), INTEGERS, device)
    elif len(state) < rows:
        raise fail(op, "state", f"a slot for each of the {rows} rows, or slots", len(state))


def _check_flag(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise fail(op, name, "True or False", repr(value))


def _scale(op: str, scale: float | None, k: Tensor) -> float:
    if scale is None:
        return float(k.shape[2] ** -0.5)
    check_number(op, "scale", scale, above=0)
    return float(scale)
