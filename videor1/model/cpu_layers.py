"""A small model's decoder layers on a CPU in fp32, each as one function with a gradient of its own.

torch makes about forty operations of a layer and twice as many of its gradient, each of which reads and writes memory
anew; of a small model they take as long as its products. Here there are the products, attention in one call, and what
is between them in one pass each (csrc/layer_gradients.cpp).

With T tokens, H hidden, Hq and Hkv heads of D, M the width of the MLP.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from videor1.model.families import Family
from videor1.side_by_side import on_cores
from videor1_kernels import PrefixLayout, dispatch, extension
from videor1_kernels.add_rms_norm import native as add_rms_norm
from videor1_kernels.extension import vector_bits
from videor1_kernels.integrations.transformers import PackedRow
from videor1_kernels.linear_logprob.tiles import product

WIDTHS, HALF_HEADS = 16, 4  # what they are multiples of
MOST_WEIGHTS = 2**22  # numbers of a layer; of a larger one its products take nearly all the time
ROWS_OF_SUM = 64  # kRowsOfSum


class _Functions(NamedTuple):
    """Of csrc/layer_gradients.cpp."""

    norm_backward: Callable[..., int]
    silu_mul: Callable[..., int]
    rotary: Callable[..., int]
    rotary_backward: Callable[..., int]


class _Shape(NamedTuple):
    """What a layer's function needs besides tensors."""

    layer: int
    heads: int
    kv_heads: int
    dim: int
    eps: float
    head_eps: float
    scale: float
    context: Any  # of its attention
    layout: PrefixLayout | None  # of a packed row: only its attention has a gradient here


class _Weights(NamedTuple):
    """In the order of the function's arguments; a bias or a norm may be None."""

    norm: Tensor
    q: Tensor
    q_bias: Tensor | None
    k: Tensor
    k_bias: Tensor | None
    v: Tensor
    v_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def use_cpu_layers(hf: Any, family: Family) -> int:
    """Give the decoder layers of a small model on a CPU that forward pass; return how many there are.

    A layer that is not fit for it (adapters, hooks), and a call that is not (autocast, an attention of another
    backend), go the way of transformers.
    """
    layers = [layer for layer in hf.model.language_model.layers if _suits(layer, family)]
    if not layers or isinstance(_functions(), str) or add_rms_norm.unavailable(torch.device("cpu"), torch.float32):
        return 0
    for layer in layers:
        base: Any = type(layer)
        layer.__class__ = _with_forward(base, family)
    return len(layers)


@functools.cache
def _with_forward(base: Any, family: Family) -> Any:
    """A layer's class with the function in it: transformers checkpoints the ``forward`` of a class."""

    def forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = _forward(layer, family, hidden_states, kwargs)
        return base.forward(layer, hidden_states, *args, **kwargs) if out is None else out

    return type(base.__name__, (base,), {"forward": forward})


@functools.cache
def _functions() -> _Functions | str:
    pointer, number, end = [c_void_p], [c_int64], [c_int64, c_void_p]
    rotary = [*pointer * 6, *number * 4, c_float, *end]
    arguments = {
        "rms_norm_backward": [*pointer * 5, *number * 2, c_float, *end],
        "silu_mul": [*pointer * 4, *number * 2, *end],
        "rotary": rotary,
        "rotary_backward": [*pointer * 4, *rotary],
    }
    found = [extension.function("layer_gradients", name, of, "a decoder layer") for name, of in arguments.items()]
    missing = next((one for one in found if isinstance(one, str)), None)
    return missing or _Functions(*found)  # type: ignore[arg-type]


def _suits(layer: Any, family: Family) -> bool:
    """Whether all of a layer is what the function computes, whatever the call."""
    attention, linears = getattr(layer, "self_attn", None), _linears(layer)
    if attention is None or not all(type(linear) is nn.Linear for linear in linears):
        return False
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *(family.head_norms(attention) or ())]
    config, dim = attention.config, attention.head_dim
    q, k, v, out, *rest = linears
    return (
        all(hasattr(norm, "variance_epsilon") for norm in norms)
        and norms[0].variance_epsilon == norms[1].variance_epsilon
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in layer.parameters())
        and not any(hasattr(p, "ds_id") for p in layer.parameters())  # of ZeRO-3, whole for a time only
        and sum(p.numel() for p in layer.parameters()) <= MOST_WEIGHTS
        and not _hooked(layer)
        and [len(x.weight) for x in (q, k, v)]
        == [config.num_attention_heads * dim, *[config.num_key_value_heads * dim] * 2]
        and not any(x.bias is not None for x in (out, *rest))
        and (q.bias is None) == (k.bias is None) == (v.bias is None)
        and config.hidden_act == "silu"
        and getattr(attention, "sliding_window", None) is None
        and not any(width % WIDTHS for width in (len(out.weight), len(rest[0].weight)))
        and dim % (2 * HALF_HEADS) == 0
    )


def _linears(layer: Any) -> list[Any]:
    """The linear layers, in the order q, k, v, out, gate, up, down; None for those that it does not have."""
    of = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    return [getattr(getattr(layer, part, None), name, None) for part, names in of.items() for name in names]


def _hooked(layer: nn.Module) -> bool:
    """Whether a module inside has hooks, which would not be called."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules() if m is not layer)


def _forward(layer: Any, family: Family, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The layer's output [1, T, H]; None where transformers has to make it."""
    attention, context, rotary = layer.self_attn, kwargs.get("videor1_context"), kwargs.get("position_embeddings")
    linears = _linears(layer)
    fit = (
        x.shape[0] == 1
        and x.dtype == torch.float32
        and on_cores(x.device)
        and not torch.is_autocast_enabled("cpu")
        and kwargs.get("attention_mask") is None
        and context is not None
        and all(type(linear) is nn.Linear for linear in linears)
        and not _hooked(layer)
    )
    if not fit or rotary is None:
        return None
    layout = None
    if isinstance(context, PackedRow):
        if dispatch.chosen_backend("prefix_attention", x.device, context.backend, x.dtype) != "native":
            return None
        layout = context.layout
    elif torch.is_grad_enabled():
        return None
    q, k, v, o, gate, up, down = linears
    heads = family.head_norms(attention)
    shape = _Shape(
        attention.layer_idx,
        attention.config.num_attention_heads,
        attention.config.num_key_value_heads,
        attention.head_dim,
        layer.input_layernorm.variance_epsilon,
        0.0 if heads is None else heads[0].variance_epsilon,
        attention.scaling,
        context,
        layout,
    )
    q_norm, k_norm = (None, None) if heads is None else (heads[0].weight, heads[1].weight)
    weights = _Weights(
        layer.input_layernorm.weight,
        q.weight,
        q.bias,
        k.weight,
        k.bias,
        v.weight,
        v.bias,
        q_norm,
        k_norm,
        o.weight,
        layer.post_attention_layernorm.weight,
        gate.weight,
        up.weight,
        down.weight,
    )
    cos, sin = (table.reshape(x.shape[1], -1).contiguous() for table in rotary)
    out: Tensor = _DecoderLayer.apply(x[0], cos, sin, shape, *weights)
    return out[None]


class _DecoderLayer(torch.autograd.Function):
    """x [T, H] -> the residual stream [T, H] behind the layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, shape: _Shape, *given: Tensor | None) -> Tensor:
        w = _Weights(*given)  # type: ignore[arg-type]
        x = x.contiguous()
        normed, _ = add_rms_norm.add_rms_norm(x, w.norm, None, shape.eps)
        qkv = product(normed, torch.cat([w.q, w.k, w.v]))
        if w.q_bias is not None and w.k_bias is not None and w.v_bias is not None:
            qkv += torch.cat([w.q_bias, w.k_bias, w.v_bias])
        rotated = _rotary(qkv, cos, sin, w, shape)
        q, k, v = _heads(rotated, qkv, shape)
        lse: Tensor | None = None
        if shape.layout is None:
            attended = shape.context.attend(shape.layer, q, k, v, shape.scale)
        else:
            run = dispatch.resolve("prefix_attention", shape.context.backend, x.device, x.dtype)
            attended, lse = run.forward(q, k, v, shape.layout, shape.scale)
        added = product(attended.reshape(len(x), -1), w.out)
        mlp_normed, stream = add_rms_norm.add_rms_norm(added, w.mlp_norm, x, shape.eps)
        gate_up = product(mlp_normed, torch.cat([w.gate, w.up]))
        out = product(_silu_mul(gate_up)[0], w.down)
        out += stream
        if any(ctx.needs_input_grad):
            ctx.shape = shape
            inner = x, cos, sin, normed, qkv, rotated, attended, lse, stream, mlp_normed, gate_up
            ctx.save_for_backward(*inner, *w)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape: _Shape = ctx.shape
        x, cos, sin, normed, qkv, rotated, attended, lse, stream, mlp_normed, gate_up, *given = ctx.saved_tensors
        w, needs = _Weights(*given), _Weights(*ctx.needs_input_grad[4:])
        grad = grad.contiguous()
        act, gate_up_grad = _silu_mul(gate_up, product(grad, w.down.T))
        down = product(grad.T, act.T) if needs.down else None
        [gate, up] = _weight_grads(gate_up_grad, mlp_normed, (w.gate, w.up), (needs.gate, needs.up))
        dx = grad.clone()
        mlp_norm = _norm_backward(product(gate_up_grad, torch.cat([w.gate, w.up]).T), stream, w.mlp_norm, dx, shape.eps)
        heads = product(dx, w.out.T).view(attended.shape)
        out = product(dx.T, attended.view(len(x), -1).T) if needs.out else None
        run = dispatch.resolve("prefix_attention", shape.context.backend, x.device, x.dtype)
        grads = run.backward(heads, *_heads(rotated, qkv, shape), attended, lse, shape.layout, shape.scale)
        qkv_grad, q_norm, k_norm = _rotary_backward(grads, qkv, cos, sin, w, shape)
        biases: tuple[Tensor | None, ...] = (None, None, None)
        lengths = [len(w.q), len(w.k), len(w.v)]
        if needs.q_bias or needs.k_bias or needs.v_bias:
            biases = qkv_grad.sum(0).split(lengths)
        [q, k, v] = _weight_grads(qkv_grad, normed, (w.q, w.k, w.v), (needs.q, needs.k, needs.v))
        norm = _norm_backward(product(qkv_grad, torch.cat([w.q, w.k, w.v]).T), x, w.norm, dx, shape.eps)
        pairs = [part for pair in zip((q, k, v), biases, strict=True) for part in pair]
        return dx, None, None, None, norm, *pairs, q_norm, k_norm, out, mlp_norm, gate, up, down


def _heads(rotated: Tensor, qkv: Tensor, shape: _Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q [T, Hq, D] and of k, v [T, Hkv, D]."""
    heads, rows = shape.heads, len(qkv)
    qk, every = rotated.view(rows, -1, shape.dim), qkv.view(rows, -1, shape.dim)
    return qk[:, :heads], qk[:, heads:], every[:, heads + shape.kv_heads :]


def _weight_grads(grad: Tensor, x: Tensor, weights: tuple[Tensor, ...], needed: tuple[Any, ...]) -> list[Tensor | None]:
    """Of weights whose outputs lie side by side in ``grad``."""
    if not any(needed):
        return [None] * len(weights)
    return list(product(grad.T, x.T).split([len(weight) for weight in weights]))


def _blocks(x: Tensor) -> int:
    return -(-len(x) // ROWS_OF_SUM)


def _call(function: Callable[..., int], tensors: tuple[Tensor | None, ...], *numbers: Any) -> None:
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    parallel_for = extension.torch_parallel_for() if torch.get_num_threads() > 1 else None
    error = function(*pointers, *numbers, vector_bits(), parallel_for)
    if error:
        raise RuntimeError(f"layer_gradients: torch_parallel_for failed with error {error}")


def _found() -> _Functions:
    found = _functions()
    assert isinstance(found, _Functions), found
    return found


def _silu_mul(gate_up: Tensor, grad: Tensor | None = None) -> tuple[Tensor, Any]:
    """silu(gate) * up [T, M]; with its gradient also that of ``gate_up`` [T, 2 M]."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    gate_up_grad = None if grad is None else torch.empty_like(gate_up)
    _call(_found().silu_mul, (gate_up, grad, out, gate_up_grad), rows, width)
    return out, gate_up_grad


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, dx: Tensor, eps: float) -> Tensor:
    """Add the gradient of ``x`` to ``dx``; return that of the weight."""
    parts = x.new_empty(_blocks(x), x.shape[1])
    _call(_found().norm_backward, (grad, x, weight, dx, parts), *x.shape, eps)
    return parts.sum(0)


def _rotary(qkv: Tensor, cos: Tensor, sin: Tensor, w: _Weights, shape: _Shape) -> Tensor:
    """q and k with their norms and rotary positions, [T, (Hq + Hkv) D]."""
    out = qkv.new_empty(len(qkv), (shape.heads + shape.kv_heads) * shape.dim)
    numbers = len(qkv), shape.heads, shape.kv_heads, shape.dim, shape.head_eps
    _call(_found().rotary, (qkv, cos, sin, w.q_norm, w.k_norm, out), *numbers)
    return out


def _rotary_backward(
    grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor, cos: Tensor, sin: Tensor, w: _Weights, shape: _Shape
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of qkv, q_norm and k_norm from those of q, k and v."""
    out, parts = torch.empty_like(qkv), qkv.new_empty(_blocks(qkv), 2, shape.dim)
    numbers = len(qkv), shape.heads, shape.kv_heads, shape.dim, shape.head_eps
    _call(_found().rotary_backward, (*grads, qkv, cos, sin, w.q_norm, w.k_norm, out, parts), *numbers)
    q_norm, k_norm = (None, None) if w.q_norm is None else parts.sum(0).unbind()
    return out, q_norm, k_norm
