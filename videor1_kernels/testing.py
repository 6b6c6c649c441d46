"""Tools for testing a kernel against its fp64 oracle; any codebase may use them.

The bar: a kernel may err no more against the fp64 oracle than plain torch does at the same dtype (plus what the order
of a sum may change), whatever its outputs' memory held before.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Tolerance:
    """Bounds for ``torch.testing.assert_close``."""

    rtol: float
    atol: float


# Of a result against the fp64 oracle on inputs of order 1. fp32 and fp64: rounding() of a thousand terms is 64 eps; the
# table allows up to 3 times (fp64: 7,000 times) that, for partial sums which are larger than the result. 16 bits: the
# result is summed in fp32 and stored, 2.5 to 4 eps, for intermediate results that are stored too.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(rtol=1e-10, atol=1e-11),
    torch.float32: Tolerance(rtol=2e-5, atol=5e-6),
    torch.float16: Tolerance(rtol=4e-3, atol=1e-3),
    torch.bfloat16: Tolerance(rtol=2e-2, atol=1e-2),
}


def assert_matches(actual: Tensor, oracle: Tensor, dtype: torch.dtype | None = None, name: str = "result") -> None:
    """``actual`` equals the fp64 ``oracle`` within the table's bounds for ``dtype`` (default: that of ``actual``)."""
    bound = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(
        actual.double(), oracle.double(), rtol=bound.rtol, atol=bound.atol, msg=lambda text: f"{name}: {text}"
    )


def rounding(terms: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """What rounding may change in a result: a bound for tests that holds on every machine.

    Which terms are added first is BLAS's choice, and differs with the instruction set, the number of threads and the
    version. The result errs by ``terms`` roundings of numbers up to ``scale``; each is uniform in +-eps scale / 2, of
    standard deviation eps scale / sqrt(12). The bound, 2 sqrt(terms) eps scale, is 7 standard deviations of one such
    sum, and 4.9 of the difference between two.

    Args:
        terms: additions that one element of the result goes through, those of all sums in a row together.
        scale: the largest number that is summed, or a partial sum if that is larger.
        dtype: what is summed in; 16 bits mean fp32, as everywhere in these kernels.
    """
    summed = torch.float32 if dtype.itemsize == 2 else dtype
    return 2 * math.sqrt(terms) * torch.finfo(summed).eps * scale


def assert_no_worse(
    actual: Tensor,
    baseline: Tensor,
    oracle: Tensor,
    *,
    terms: int,
    scale: float | None = None,
    slack: float = 1.1,
    name: str = "result",
) -> None:
    """The largest error of ``actual`` against ``oracle`` is at most ``slack`` times that of ``baseline`` (plain torch
    at the same dtype), plus one rounding of the stored dtype, plus :func:`rounding` of ``terms``.

    The last is there because plain torch's error is one draw: with another order of summation, no worse a one, it is
    another, and where few results are compared it may happen to be 0.

    Args:
        terms: additions that one element of the result goes through.
        scale: the largest number that is summed; without one the largest magnitude in ``oracle``. To be given where
            the terms cancel.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {list(actual.shape)}, oracle {list(oracle.shape)}"
    if not actual.numel():
        return
    error = (actual.double() - oracle.double()).abs().max().item()
    allowed = (baseline.double() - oracle.double()).abs().max().item()
    scale = max(scale or 0.0, oracle.abs().max().item())
    limit = slack * allowed + torch.finfo(actual.dtype).eps * scale + rounding(terms, scale, actual.dtype)
    assert error <= limit, f"{name}: error {error:.3e} against fp64, plain torch {allowed:.3e}, limit {limit:.3e}"


def oracle_inputs(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Copies for the oracle: floats as fp64 leaves that require a gradient where the original does; the rest as is."""
    return tuple(
        t.detach().double().requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
        for t in tensors
    )


def poison_padding(values: Tensor, lengths: Tensor, poison: float = float("nan")) -> Tensor:
    """A copy of ``values`` [R, C, ...] with NaN from ``lengths`` [R] on: reading there shows in the result."""
    column = torch.arange(values.shape[1], device=values.device)
    padding = column[None, :] >= lengths.to(values.device)[:, None]  # [R, C]
    return values.detach().clone().masked_fill_(padding.reshape(*padding.shape, *[1] * (values.dim() - 2)), poison)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` returns NaN (integers: the largest value), so that an output element never written shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


class LargestTensor(TorchDispatchMode):
    """Records the most elements (``numel``) of any tensor that an operation in the block returns, backward included.

    CPU only: a CUDA backward runs in threads that the mode does not see (use ``torch.cuda.max_memory_allocated``).
    """

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.operation = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.numel() > self.numel:
                self.numel, self.operation = value.numel(), str(func)
        return out


class PeakMemory:
    """``bytes``: the most that was allocated at once inside the block, beyond what was there before it."""

    bytes: int

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._profile.__exit__(*error)
        profiler: Any = self._profile.profiler
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        live = self.bytes = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            self.bytes = max(self.bytes, live)
