"""The argument checks of every operation. A message names the operation, the argument, what was expected and given."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
IGNORED = -100


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute in: fp64 if any input is fp64 (as for an oracle or a gradcheck), else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def rarest_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype among the floats that fewest backends take: fp64 before fp16, bf16 and fp32."""
    found = {t.dtype for t in tensors if t is not None}
    return next(dtype for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32) if dtype in found)


def fail(op: str, name: str, expected: str, got: object) -> ValueError:
    """The error to raise. Every check below makes its message here."""
    return ValueError(f"{op}: {name}: expected {expected}, got {got}")


def check_tensor(
    op: str,
    name: str,
    value: object,
    shape: Sequence[int | str] | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Check type, dtype, shape and device. A string in ``shape`` stands for a dimension of any size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: expected a torch.Tensor, got {type(value).__name__}")
    if not torch.compiler.is_compiling() and unpack_dual(value).tangent is not None:
        # An operator outside of autograd would return its result without a tangent, as if the derivative were 0.
        raise NotImplementedError(
            f"{op}: {name}: expected a tensor without a tangent, got a dual tensor: there is no forward-mode derivative"
            " (torch.func.jvp, jacfwd, torch.autograd.forward_ad); take the gradient by a backward pass"
        )
    if value.dtype not in dtypes:
        raise fail(op, name, f"dtype {_join(dtypes)}", value.dtype)
    if shape is not None:
        matches = value.dim() == len(shape) and all(
            isinstance(want, str) or want == have for want, have in zip(shape, value.shape, strict=True)
        )
        if not matches:
            raise fail(op, name, f"shape [{', '.join(map(str, shape))}]", list(value.shape))
    if device is not None and value.device != device:
        raise fail(op, name, f"device {device} (that of the first argument)", value.device)


def check_no_gradient(op: str, **tensors: Tensor | None) -> None:
    """Check that no gradient is asked for, of an operation that has none."""
    if not torch.is_grad_enabled():
        return
    for name, value in tensors.items():
        if value is not None and value.requires_grad:
            expected = "a tensor that requires no gradient (there is no backward pass; torch.no_grad allows it)"
            raise fail(op, name, expected, "one that does")


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of ``choices``; the message suggests the nearest one."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise fail(op, name, f"one of {', '.join(map(repr, choices))}", f"{value!r}{hint}")


def check_number(
    op: str, name: str, value: object, *, above: float | None = None, at_least: float | None = None
) -> None:
    """Check that ``value`` is a finite int or float in the range."""
    bound = f" above {above:g}" if above is not None else f" of {at_least:g} or more" if at_least is not None else ""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if good and above is not None:
        good = value > above  # type: ignore[operator]
    if good and at_least is not None:
        good = value >= at_least  # type: ignore[operator]
    if not good:
        raise fail(op, name, f"a finite number{bound}", repr(value))


def check_indices(op: str, name: str, index: Tensor, size: int, *, ignored: int | None = None) -> None:
    """Check that every entry lies in [0, size) or equals ``ignored``.

    This waits for the device once, so it is left out while a CUDA graph is captured.
    """
    if capturing(index):
        return
    bad = (index < 0) | (index >= size)
    if ignored is not None:
        bad &= index != ignored
    count = int(bad.sum())
    if count:
        also = "" if ignored is None else f", or {ignored} (ignored)"
        first = int(index[bad][0])
        raise fail(op, name, f"values in [0, {size}){also}", f"{count} outside, the first of them {first}")


def check_temperature(op: str, temperatures: Tensor | None) -> None:
    """Check that every entry is finite and above 0; left out while a CUDA graph is captured, as it waits."""
    if temperatures is None or capturing(temperatures):
        return
    if not bool(((temperatures > 0) & temperatures.isfinite()).all()):
        raise fail(op, "temperature", "finite values above 0", f"a smallest value of {temperatures.min().item():g}")


def check_cu_seqlens(
    op: str, name: str, cu_seqlens: Tensor, total: int, *, smallest: int = 0, values: Sequence[int] | None = None
) -> None:
    """Check cumulative lengths: from 0 to ``total`` in steps of ``smallest`` or more.

    This waits for the device once, unless ``values`` are those of ``cu_seqlens``, read before.
    """
    check_tensor(op, name, cu_seqlens, ("S+1",), INTEGERS)
    if values is None:
        if capturing(cu_seqlens):
            return
        values = cu_seqlens.tolist()
    if not values:
        raise fail(op, name, "at least one entry (the leading 0)", "an empty tensor")
    if values[0] != 0 or values[-1] != total:
        raise fail(op, name, f"the first entry 0 and the last {total}", f"{values[0]} and {values[-1]}")
    for i in range(1, len(values)):
        if values[i] - values[i - 1] < smallest:
            rule = "non-decreasing entries" if smallest == 0 else f"steps of {smallest} or more"
            raise fail(op, name, rule, f"{values[i - 1]} then {values[i]} at position {i}")


def capturing(values: Tensor) -> bool:
    """Whether a CUDA graph is being captured. Nothing may wait for the device then, so values are not checked."""
    return values.is_cuda and torch.cuda.is_current_stream_capturing()


def _join(dtypes: Sequence[torch.dtype]) -> str:
    names = [str(d).removeprefix("torch.") for d in dtypes]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
