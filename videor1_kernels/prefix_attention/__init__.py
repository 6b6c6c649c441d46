"""Attention of completions that share their prompt: over a packed row (training, prefill), and for decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import INTEGERS, check_number, check_tensor, compute_dtype, fail
from videor1_kernels.prefix_attention import native, native_decode, reference, reference_decode
from videor1_kernels.prefix_attention.decode_layout import LAYOUTS, DecodeInputs, DecodeLayout
from videor1_kernels.prefix_attention.layout import PrefixLayout, layout_numbers
from videor1_kernels.prefix_attention.ops import prefix_attention_op
from videor1_kernels.prefix_attention.rows import RowPart, plan_rows

MOST_D = 256  # the largest head dim of the Triton kernels

__all__ = ["DecodeLayout", "PrefixLayout", "RowPart", "plan_rows", "prefix_attention", "prefix_decode_attention"]

dispatch.register_triton("prefix_attention", "videor1_kernels.prefix_attention.triton", only_16_bit=True)
dispatch.register("prefix_attention", "native", native, unavailable=native.unavailable)
dispatch.register("prefix_attention", "reference", reference)
dispatch.register_triton("prefix_decode_attention", "videor1_kernels.prefix_attention.triton_decode", only_16_bit=True)
dispatch.register("prefix_decode_attention", "native", native_decode, unavailable=native_decode.unavailable)
dispatch.register("prefix_decode_attention", "reference", reference_decode)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Attention over one packed row of shared-prefix groups, [prompt | completion 1 | ... | completion G] each.

    out_t = sum_j softmax_j(scale q_t . k_j) v_j over the positions j that t sees: a prompt token its own prompt up to
    itself; a completion token its whole prompt, and its own completion up to itself. Equal to causal attention over
    each [prompt | completion] by itself, with the prompt stored and attended once.

    Args:
        q: [T, Hq, D], rotary positions already applied; fp64, fp32, bf16 or fp16.
        k, v: [T, Hkv, D], fp64, fp32, bf16 or fp16; Hq a multiple of Hkv (grouped-query attention: query head h reads
            key head h // (Hq / Hkv)).
        layout: the order of the row, T = ``layout.total_tokens``.
        scale: factor on the scores; None: D ** -0.5.
        backend: ``auto``, ``triton`` (on a GPU: bf16 and fp16, D of 256 or less), ``native`` (on a CPU: fp32 and bf16;
            C++ compiled at its first use), ``reference``.

    Returns:
        [T, Hq, D] in q's dtype, differentiable into q, k and v (once). Scores and sums are fp32, or fp64 if an input
        is; nothing of size T x T is stored. The same bits every time.

    Raises:
        ValueError: a wrong shape, dtype or device, or a backend that cannot run here.
        TypeError: a layout of another type, or an argument that is no tensor.

    Source:
        This library; a prompt shared in training as in Prefix Grouper (arXiv 2506.05433), the online softmax of
        FlashAttention (arXiv 2205.14135).
    """
    op = "prefix_attention"
    if not isinstance(layout, PrefixLayout):
        raise TypeError(f"{op}: layout: expected a PrefixLayout, got {type(layout).__name__}")
    check_tensor(op, "q", q, (layout.total_tokens, "Hq", "D"))
    heads = _check_heads(op, q, k, "k")
    check_tensor(op, "k", k, (layout.total_tokens, heads, q.shape[2]), device=q.device)
    check_tensor(op, "v", v, (layout.total_tokens, heads, q.shape[2]), device=q.device)
    if layout.prompt_index.device != q.device:
        raise fail(op, "layout", f"index tensors on {q.device} (use layout.to)", layout.device)
    backend = _within_most_d(op, q.shape[2], q.device, backend)
    out, _ = prefix_attention_op(q, k, v, *layout_numbers(layout), _scale(op, scale, q), backend)
    return out.to(q.dtype)


def prefix_decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    *,
    suffix_lengths: Tensor,
    cu_prefix: Tensor | None = None,
    row_group: Tensor | None = None,
    layout: DecodeLayout | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one new token per row over its group's prefix, stored once per group, and its own suffix.

    Row r attends to prefix ``row_group[r]`` and the first ``suffix_lengths[r]`` entries of its suffix, in one softmax.

    Args:
        q: [R, Hq, D]; fp64, fp32, bf16 or fp16.
        prefix_k, prefix_v: [Tp, Hkv, D], the prefixes end to end; fp64, fp32, bf16 or fp16.
        suffix_k, suffix_v: [R, C, Hkv, D], fp64, fp32, bf16 or fp16, preallocated; entries from ``suffix_lengths`` on
            are never read. With a layout that has ``suffix_slots`` [S, C, Hkv, D], of which row r owns
            ``suffix_slots[r]``.
        suffix_lengths: int32 or int64 [R], tokens: valid entries, the new token's own included: 1 to C.
        cu_prefix: int32 or int64 [B+1], cumulative prefix lengths in tokens, each 1 or more.
        row_group: int64 [R], in [0, B); the rows of a group may be scattered.
        layout: ``DecodeLayout(cu_prefix, row_group)`` in place of these two: their indices, built once for all steps
            and layers; it may also place prefixes and suffixes anywhere in preallocated memory.
        scale: factor on the scores; None: D ** -0.5.
        backend: ``auto``, ``native`` (on a CPU: fp32, D a multiple of 16, no gradient; C++ compiled at its first use),
            ``triton`` (on a GPU: inputs all bf16 or all fp16, D of 256 or less, no gradient),
            ``reference``.

    Returns:
        [R, Hq, D] in q's dtype; the maths is fp32, or fp64 if an input is. The reference is differentiable.

    Raises:
        ValueError: a wrong shape, dtype, device, length or group, or a backend that cannot run here. The Triton kernel
            does not wait for the device, so a length out of range is not found: it is taken as 1 or as C.
        TypeError: an argument that is no tensor.

    Source:
        This library; prefixes read once for the rows that share them as in Hydragen (arXiv 2402.05099), in one launch.
    """
    op = "prefix_decode_attention"
    sources = {"cu_prefix": cu_prefix, "row_group": row_group, "layout": layout}
    given = [name for name, value in sources.items() if value is not None]
    if given not in (["cu_prefix", "row_group"], ["layout"]):
        raise fail(op, "prefixes", "cu_prefix and row_group, or layout", " and ".join(given) or "none of them")
    if torch.compiler.is_compiling():  # A layout is built from values, and its implementations read them.
        inputs = (q, prefix_k, prefix_v, suffix_k, suffix_v)
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            raise fail(op, "inputs", "none that requires a gradient under torch.compile (torch.no_grad)", "one")
        number = -1 if layout is None else layout.number
        return _decode_op(*inputs, suffix_lengths, cu_prefix, row_group, number, scale, backend)
    check_tensor(op, "q", q, ("R", "Hq", "D"))
    heads = _check_heads(op, q, prefix_k, "prefix_k")
    if layout is None:
        assert cu_prefix is not None
        assert row_group is not None
        layout = DecodeLayout(cu_prefix, row_group)
    check_tensor(op, "row_group", layout.row_group, (q.shape[0],), (torch.int64,), q.device)
    tokens = layout.prefix_tokens if layout.prefix_starts is None else "Tp"
    check_tensor(op, "prefix_k", prefix_k, (tokens, heads, q.shape[2]), device=q.device)
    check_tensor(op, "prefix_v", prefix_v, prefix_k.shape, device=q.device)
    if len(prefix_k) < layout.prefix_tokens:
        raise fail(op, "prefix_k", f"at least the {layout.prefix_tokens} tokens of the layout", len(prefix_k))
    check_tensor(
        op,
        "suffix_k",
        suffix_k,
        (q.shape[0] if layout.suffix_slots is None else "S", "C", heads, q.shape[2]),
        device=q.device,
    )
    check_tensor(op, "suffix_v", suffix_v, suffix_k.shape, device=q.device)
    if len(suffix_k) < layout.slots:
        raise fail(op, "suffix_k", f"at least the {layout.slots} slots of the layout", len(suffix_k))
    check_tensor(op, "suffix_lengths", suffix_lengths, (q.shape[0],), INTEGERS, q.device)
    backend = decode_backend(q.shape[2], q.device, backend)
    inputs = (q, prefix_k, prefix_v, suffix_k, suffix_v)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        if backend in ("triton", "native"):
            raise fail(op, "inputs", f"none that requires a gradient for the {backend} backend (torch.no_grad)", "one")
        backend = "reference"
    dtype = q.dtype if len({x.dtype for x in inputs}) == 1 else compute_dtype(*inputs)
    run = dispatch.resolve(op, backend, q.device, dtype)
    with dispatch.running_on(q):
        return run.prefix_decode_attention(DecodeInputs(*inputs, suffix_lengths), layout, _scale(op, scale, q))


@torch.library.custom_op("videor1::prefix_decode_attention", mutates_args=())
def _decode_op(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    cu_prefix: Tensor | None,
    row_group: Tensor | None,
    layout: int,
    scale: float | None,
    backend: str,
) -> Tensor:
    """The whole function as a node of a compiled graph; ``layout`` is a number in LAYOUTS, or -1 for none."""
    if layout >= 0 and layout not in LAYOUTS:
        raise fail("prefix_decode_attention", "layout", "one that is kept while the compiled graph runs", "none")
    out = prefix_decode_attention(
        q,
        prefix_k,
        prefix_v,
        suffix_k,
        suffix_v,
        suffix_lengths=suffix_lengths,
        cu_prefix=cu_prefix,
        row_group=row_group,
        layout=None if layout < 0 else LAYOUTS[layout],
        scale=scale,
        backend=backend,
    )
    return out.contiguous()


@_decode_op.register_fake
def _(q: Tensor, *inputs: Any) -> Tensor:
    return q.new_empty(q.shape)


def decode_backend(dim: int, device: torch.device, backend: str) -> str:
    """The backend of prefix_decode_attention for heads of ``dim`` entries: that which is given, but the reference for
    ``auto`` where no kernel has such heads.

    Raises:
        ValueError: the backend that is asked for has none.
    """
    op = "prefix_decode_attention"
    if dim % native_decode.LANES and device.type == "cpu":
        if backend == "native":
            raise fail(op, "q", f"a head dim that {native_decode.LANES} divides for the native backend", dim)
        return "reference" if backend == "auto" else backend
    return _within_most_d(op, dim, device, backend)


def _within_most_d(op: str, dim: int, device: torch.device, backend: str) -> str:
    """The backend, or on a GPU the reference for a head dim that the Triton kernels do not have."""
    if dim > MOST_D and backend == "triton":
        raise fail(op, "q", f"a head dim of at most {MOST_D} for the triton backend", dim)
    return "reference" if dim > MOST_D and backend == "auto" and device.type == "cuda" else backend


def _check_heads(op: str, q: Tensor, k: Tensor, name: str) -> int:
    if q.shape[1] < 1 or q.shape[2] < 1:  # Heads are divided by in native code.
        raise fail(op, "q", "at least one head of at least one entry", list(q.shape))
    check_tensor(op, name, k, ("T", "Hkv", q.shape[2]), device=q.device)
    heads = k.shape[1]
    if heads < 1 or q.shape[1] % heads:
        raise fail(op, name, f"a number of heads that divides the {q.shape[1]} of q", heads)
    return heads


def _scale(op: str, scale: float | None, q: Tensor) -> float:
    if scale is None:
        return q.shape[2] ** -0.5
    check_number(op, "scale", scale, above=0)
    return float(scale)
