"""What the tests of the Triton backend share: inputs, their fp64 oracle, and the comparison.

On a machine with CUDA the kernels run there, in bf16 too; elsewhere through Triton's interpreter, which gets bf16
products wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from videor1_kernels.testing import assert_matches, oracle_inputs

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
HALF = DTYPES[1:]
# NumPy's remarks on rows and columns that only pad a tile, and on the stand-in for -inf: its product with log2(e) /
# temperature leaves fp32, and the exponential of that is the 0 wanted.
QUIET = (
    "ignore:overflow encountered in (multiply|reduce):RuntimeWarning",
    "ignore:divide by zero encountered in log:RuntimeWarning",
    "ignore:invalid value encountered in divide:RuntimeWarning",
)


@dataclass(frozen=True)
class Head:
    """N rows before a linear head of V tokens; hidden, weight and bias are leaves that require a gradient."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]

    def oracle(self) -> Head:
        """The same values in fp64."""
        hidden, weight, bias = oracle_inputs(self.hidden, self.weight, self.bias)
        return replace(self, hidden=hidden, weight=weight, bias=bias)


def leaf(values: Tensor) -> Tensor:
    return values.detach().requires_grad_()


def make_head(
    rows: int,
    vocab: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    ignored: bool = False,
    seed: int = 0,
) -> Head:
    """Logits of order 1; the labels hold both ends of the vocabulary, and with ``ignored`` every third is -100."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[:1] = vocab - 1
    labels[1:2] = 0
    if ignored:
        labels[2::3] = -100
    hidden, weight, offset = normal(rows, size), normal(vocab, size) / size**0.5, normal(vocab)
    return Head(
        leaf(hidden.to(DEVICE, dtype)),
        leaf(weight.to(DEVICE, dtype)),
        labels.to(DEVICE),
        leaf(offset.to(DEVICE, dtype)) if bias else None,
    )


def upstream(*shape: int, seed: int = 1, zeros: bool = True) -> Tensor:
    """Incoming gradients, fp32; with ``zeros`` some are exactly 0."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if zeros:
        values.view(-1)[3::4] = 0.0
    return values.to(DEVICE)


def assert_all_match(
    actual: Sequence[Tensor], oracle: Sequence[Tensor], names: Sequence[str], dtypes: Sequence[torch.dtype | None]
) -> None:
    for a, o, name, dtype in zip(actual, oracle, names, dtypes, strict=True):
        assert a.shape == o.shape, name
        assert_matches(a, o, dtype, name)


def error_of(call: Callable[[], object]) -> str:
    """Type and text of the error that ``call`` raises."""
    try:
        call()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error was raised")


def shared_error(call: Callable[..., object], arguments: Mapping[str, object]) -> str:
    """The error of a call with these arguments, which is the same on the Triton backend as in the reference."""
    given = {
        name: x.to(DEVICE) if isinstance(x, Tensor) and x.device.type == "cpu" else x for name, x in arguments.items()
    }
    ours, theirs = (error_of(lambda b=b: call(**given, backend=b)) for b in ("triton", "reference"))
    assert ours == theirs
    return ours


class Launches:
    """Stands in for a kernel: remembers the grids of its launches, and launches it if it is given."""

    def __init__(self, kernel: Any = None) -> None:
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        self.grids.append(grid)
        return self.kernel[grid] if self.kernel else lambda *args, **options: None


class Counter:
    """Stands in for a function and counts its calls."""

    def __init__(self, function: Callable) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: object, **options: object) -> object:
        self.calls += 1
        return self.function(*args, **options)
