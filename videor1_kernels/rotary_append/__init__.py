"""Norms and rotary positions of a decode step's queries and keys, and the write of keys and values into the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import INTEGERS, check_no_gradient, check_number, check_tensor, fail
from videor1_kernels.rotary_append import native, reference
from videor1_kernels.rotary_append.ops import rotary_append_op, run
from videor1_kernels.rotary_append.reference import HeadNorms, Places

__all__ = ["rotary_append"]

dispatch.register_triton("rotary_append", "videor1_kernels.rotary_append.triton")
dispatch.register("rotary_append", "native", native, unavailable=native.unavailable)
dispatch.register("rotary_append", "reference", reference)


def rotary_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    *,
    positions: Tensor,
    suffix_lengths: Tensor,
    suffix_slots: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Rotary positions of one new token per row, and the write of its keys and values into the cache. For inference.

    With x a head of q or k and p = ``positions[r]``: x * cos[p] + rotate_half(x) * sin[p], where rotate_half(x) is
    [-x2 | x1] of the halves [x1 | x2]. Row r's rotated k and its v go to ``suffix_k[slot, suffix_lengths[r] - 1]`` and
    ``suffix_v[slot, suffix_lengths[r] - 1]``, slot = ``suffix_slots[r]``: the cache of ``prefix_decode_attention``.
    Products and sum are fp32, rounded once to qkv's dtype. With ``q_norm`` and ``k_norm``, heads of q and k are first
    normalised, as Qwen3's layers do: x becomes weight * x / sqrt(mean(x^2) + eps), the mean over D, in fp32, where
    x / sqrt(...) is rounded to qkv's dtype, as transformers' RMSNorm rounds it. With ``unit_offset`` the factor is 1 +
    weight, as Qwen3.5's layers have it: the whole is fp32 and rounded once, as transformers' Qwen3_5RMSNorm rounds it.

    Tables of Rd < D columns rotate the first Rd entries of a head, whose halves are then of Rd / 2; the others pass
    through (normalised where there are norms).

    **suffix_k and suffix_v change in place.** Rows with the same place must hold the same values.

    Args:
        qkv: [R, W] with W = (Hq + 2 Hkv) D: the heads of q, then of k, then of v in each row, as one product gives
            them; fp64, fp32, bf16 or fp16. Hq a multiple of Hkv, D even.
        cos, sin: [P, Rd], the tables as a model's rotary embedding gives them, sin without signs; fp64, fp32, bf16 or
            fp16. Rd even, 2 to D.
        suffix_k, suffix_v: [S, C, Hkv, D] in qkv's dtype (fp64, fp32, bf16 or fp16), preallocated, of any strides
            except that the D entries of a head lie side by side.
        positions: int32 or int64 [R], in [0, P).
        suffix_lengths: int32 or int64 [R], tokens: valid entries of the suffix, the new token's own included: 1 to C.
        suffix_slots: int32 or int64 [R], in [0, S); None: row r has slot r.
        q_norm, k_norm: [D], the weights of the norms, fp64, fp32, bf16 or fp16; both or neither.
        eps: added to the mean of squares, 0 or more.
        unit_offset: whether the factors of the norms are 1 + weight; only with q_norm and k_norm.
        backend: ``auto``, ``triton``, ``native`` (on a CPU: fp32 and bf16; C++ compiled at its first use),
            ``reference``.

    Returns:
        q rotated: [R, Hq, D] in qkv's dtype; no gradient. Products and sum are fp64 where an input is.

    Raises:
        ValueError: a wrong shape, dtype, device or stride, a position, length or slot out of range, an input that
            requires a gradient while torch records them, or a backend that cannot run here. The Triton kernel does not
            wait for the device, so that nothing out of range is found: such a row gets a q of NaN and writes nothing.
        TypeError: an argument that is no tensor.

    Source:
        This library; rotary positions are those of arXiv 2104.09864.
    """
    op = "rotary_append"
    check_tensor(op, "qkv", qkv, ("R", "W"))
    rows, width = qkv.shape
    check_tensor(op, "suffix_k", suffix_k, ("S", "C", "Hkv", "D"), (qkv.dtype,), qkv.device)
    slots, _, kv_heads, dim = suffix_k.shape
    if not kv_heads or not dim or dim % 2:
        raise fail(op, "suffix_k", "at least one head of an even number of entries", list(suffix_k.shape))
    if width % (kv_heads * dim) or width < 3 * kv_heads * dim:
        expected = f"q of a multiple of {kv_heads} heads of {dim}, and k and v of {kv_heads} heads, in a row"
        raise fail(op, "qkv", expected, f"{width} entries")
    check_tensor(op, "suffix_v", suffix_v, suffix_k.shape, (qkv.dtype,), qkv.device)
    for name, cache in (("suffix_k", suffix_k), ("suffix_v", suffix_v)):
        if cache.stride(3) != 1:
            raise fail(op, name, "the entries of a head side by side (a last stride of 1)", cache.stride())
    check_tensor(op, "cos", cos, ("P", "Rd"), device=qkv.device)
    if cos.shape[1] % 2 or not 2 <= cos.shape[1] <= dim:
        raise fail(op, "cos", f"an even number of columns from 2 to the head's {dim}", cos.shape[1])
    check_tensor(op, "sin", sin, cos.shape, device=qkv.device)
    check_tensor(op, "positions", positions, (rows,), INTEGERS, qkv.device)
    check_tensor(op, "suffix_lengths", suffix_lengths, (rows,), INTEGERS, qkv.device)
    if suffix_slots is not None:
        check_tensor(op, "suffix_slots", suffix_slots, (rows,), INTEGERS, qkv.device)
    elif slots < rows:
        raise fail(op, "suffix_k", f"a slot for each of the {rows} rows, or suffix_slots", slots)
    if (q_norm is None) != (k_norm is None):
        raise fail(op, "q_norm", "both q_norm and k_norm, or neither", "k_norm" if q_norm is None else "q_norm")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_tensor(op, name, weight, (dim,), device=qkv.device)
    if unit_offset and q_norm is None:
        raise fail(op, "unit_offset", "q_norm and k_norm with it", "neither")
    check_number(op, "eps", eps, at_least=0)
    caches = {"suffix_k": suffix_k, "suffix_v": suffix_v}
    check_no_gradient(op, qkv=qkv, cos=cos, sin=sin, **caches, q_norm=q_norm, k_norm=k_norm)
    inputs = (qkv, cos, sin, suffix_k, suffix_v)
    if torch.compiler.is_compiling():
        places = (positions, suffix_lengths, suffix_slots)
        return rotary_append_op(*inputs, *places, q_norm, k_norm, float(eps), unit_offset, backend)
    norms = None if q_norm is None or k_norm is None else HeadNorms(q_norm, k_norm, float(eps), unit_offset)
    return run(*inputs, Places(positions, suffix_lengths, suffix_slots), norms, backend)
