"""The choice of an implementation: ``auto`` takes the fastest that can run, a named backend is that one or an error."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from videor1_kernels.checks import check_choice

BACKENDS = ("auto", "reference", "triton", "native", "fla")


# (device, dtype) -> why it cannot run there, or None if it can. The dtype is None where no particular call is meant.
Unavailable = Callable[[torch.device, torch.dtype | None], str | None]
# (device, dtype) -> whether ``auto`` leaves it out there.
OnlyExplicit = Callable[[torch.device, torch.dtype | None], bool]


@dataclass(frozen=True)
class Implementation:
    """One backend of one operation."""

    backend: str
    what: Any  # a callable, a module, or the name of a module to import at its first use
    unavailable: Unavailable
    only_explicit: OnlyExplicit


_registry: dict[str, list[Implementation]] = {}
_last: dict[str, str] = {}


def register(
    op: str,
    backend: str,
    what: Any,
    *,
    unavailable: Unavailable = lambda device, dtype: None,
    only_explicit: OnlyExplicit = lambda device, dtype: False,
) -> None:
    """Add an implementation of ``op``. ``auto`` takes the first one that can run, so register the fastest first."""
    check_choice("register", "backend", backend, BACKENDS[1:])
    implementations = _registry.setdefault(op, [])
    if any(known.backend == backend for known in implementations):
        raise ValueError(f"register: {op} has a {backend!r} backend already")
    implementations.append(Implementation(backend, what, unavailable, only_explicit))


def register_triton(op: str, module: str, *, only_16_bit: bool = False) -> None:
    """Register the kernels of ``module``: for CUDA tensors and, by name with TRITON_INTERPRET=1, for CPU tensors."""

    def unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
        if only_16_bit and device.type == "cuda" and dtype == torch.float32:
            return "its kernels take bf16 and fp16 inputs, and an input is fp32"
        return _triton_unavailable(device, dtype)

    register(op, "triton", module, unavailable=unavailable, only_explicit=lambda device, _: device.type != "cuda")


def _triton_unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with videor1 on Linux)"
    if dtype == torch.float64:
        return "its kernels compute in fp32, and an input is fp64"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        return None
    return "it needs CUDA tensors (or TRITON_INTERPRET=1 in the environment, which runs the kernels slowly on the CPU)"


def resolve(op: str, backend: str, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """The implementation of ``op`` for ``backend`` on ``device``; :func:`last_backend` then names it.

    ``dtype`` is the compute dtype. An unknown or unavailable backend is a ValueError, which says what can run and why
    the others cannot.
    """
    chosen = _choose(op, backend, torch.device(device), dtype)
    _last[op] = chosen.backend
    return importlib.import_module(chosen.what) if isinstance(chosen.what, str) else chosen.what


def exactly(values: Tensor) -> AbstractContextManager[Any]:
    """A context in which products run in the dtypes of their operands.

    To disable autocast takes longer than a small product, so it is disabled only where it is on.
    """
    kind = values.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@contextmanager
def running_on(values: Tensor) -> Iterator[None]:
    """A context for an implementation: the device of ``values`` is current, and autocast is off.

    Triton launches on the current device, and autocast would round the products of an implementation.
    """
    with exactly(values):
        if values.is_cuda:
            with torch.cuda.device(values.device):
                yield
        else:
            yield


def nearest_capability(known: Collection[int], device: torch.device) -> int:
    """The largest of the ``known`` compute capabilities that is not above the GPU's, or 80 if all are."""
    major, minor = torch.cuda.get_device_capability(device)
    return max((capability for capability in known if capability <= 10 * major + minor), default=80)


def chosen_backend(
    op: str, device: torch.device | str = "cpu", backend: str = "auto", dtype: torch.dtype | None = None
) -> str:
    """The name of the backend that a call takes.

    Args:
        op: the name of an operation of this package, "linear_logprob" for example.
        device: where its tensors are.
        backend: as the call has it.
        dtype: the dtype of the computation, ``torch.bfloat16`` for example; None if no particular call is meant.

    Returns:
        "triton", "native", "fla" or "reference".

    Raises:
        ValueError: no such operation or backend, or a named backend that cannot run there (the message says why).

    Source:
        This library.
    """
    return _choose(op, backend, torch.device(device), dtype).backend


def last_backend(op: str) -> str | None:
    """The name of the backend that the last call in this process took.

    Args:
        op: the name of an operation of this package.

    Returns:
        "triton", "native", "fla" or "reference"; None before the first call.

    Raises:
        ValueError: no such operation.

    Source:
        This library.
    """
    _implementations(op)
    return _last.get(op)


def backends(op: str, device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every backend of an operation in this version, and whether it can run here.

    Args:
        op: the name of an operation of this package.
        device: where its tensors would be.

    Returns:
        Name -> None if it can run on ``device``, else the reason it cannot; in the order in which "auto" tries them.

    Raises:
        ValueError: no such operation.

    Source:
        This library.
    """
    return {known.backend: known.unavailable(torch.device(device), None) for known in _implementations(op)}


def _implementations(op: str) -> list[Implementation]:
    if op not in _registry:
        raise ValueError(f"expected the name of an operation ({', '.join(sorted(_registry))}), got {op!r}")
    return _registry[op]


def _choose(op: str, backend: str, device: torch.device, dtype: torch.dtype | None) -> Implementation:
    known = _implementations(op)
    check_choice(op, "backend", backend, BACKENDS)
    for entry in known:
        wanted = not entry.only_explicit(device, dtype) if backend == "auto" else backend == entry.backend
        if wanted and entry.unavailable(device, dtype) is None:
            return entry
    reasons = {entry.backend: entry.unavailable(device, dtype) for entry in known}
    usable = [repr(name) for name, reason in reasons.items() if reason is None]
    if backend == "auto":  # all that it may take is missing: what it would have taken first
        why = next(reason for reason in reasons.values() if reason is not None)
    else:
        why = reasons.get(backend) or f"this version of videor1_kernels has no {backend} implementation of it"
        usable = ["'auto'", *usable]
    raise ValueError(f"{op}: backend {backend!r} cannot run on {device}: {why}; usable here: {', '.join(usable)}")
