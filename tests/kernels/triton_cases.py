"""What the tests of the Triton backend share: inputs, their fp64 oracle, and the comparison.

On a machine with CUDA the kernels run there, in bf16 too; elsewhere through Triton's interpreter, which gets bf16
products wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from videor1_kernels.testing import oracle_inputs

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


def quicken_interpreter() -> None:
    """Triton's interpreter replaces the functions of triton.language anew at each call of one kernel function by
    another, which takes a third of its time: where they are replaced already, that is left out."""
    from triton import language
    from triton.runtime import interpreter

    replace, nothing = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", None)
    if nothing is None or hasattr(replace, "quick"):  # another version of Triton; or done before
        return
    languages = (language, language.core)

    def replace_once(function: Any) -> Any:
        named = [x for x in function.__globals__.values() if x is languages[0] or x is languages[1]]
        if named and not any(language.core.is_builtin(x.load) for x in named):
            return nothing()
        return replace(function)

    replace_once.quick = True  # type: ignore[attr-defined]
    interpreter._patch_lang = replace_once


def for_threads(call: Callable[[], Any], *counts: int) -> list[Any]:
    """What a call gives with each of these numbers of torch's threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(threads)
    return results


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


def count_calls(monkeypatch: Any, module: Any, name: str) -> Counter:
    """Of a module's function, from now on."""
    counter = Counter(getattr(module, name))
    monkeypatch.setattr(module, name, counter)
    return counter


class Operations(TorchDispatchMode):
    """Names of torch's operations in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
