"""What linear_logprob costs on a CPU: memory beside F.linear + log_softmax + gather, products, conversions.

Times are in benchmarks/: a machine that is busy with other work cannot tell them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from videor1_kernels.linear_logprob import reference, tiles
from videor1_kernels.linear_logprob.inputs import HeadInputs
from videor1_kernels.testing import PeakMemory

ROWS, HIDDEN, VOCAB = 4096, 256, 32768
MIB = 2**20
# oneDNN keeps copies of its operands outside torch's allocator. Both operands and the result of the largest tile:
UNSEEN = tiles.WEIGHT_BYTES["cpu"] + tiles.CHUNK_BYTES["cpu"] + tiles.CHUNK_ROWS["cpu"] * HIDDEN * 4


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held at once for ``call``, its result included."""
    with PeakMemory(torch.device("cpu")) as peak:
        result = call()
    del result
    return peak.bytes


def make(rows: int, hidden_size: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, hidden_size), torch.randn(vocab, hidden_size) / hidden_size**0.5
    return hidden.to(dtype), weight.to(dtype), torch.randint(vocab, (rows,))


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear(hidden, weight).log_softmax(-1).gather(1, labels[:, None])


def test_the_instrument() -> None:
    logits = ROWS * 512 * 4
    hidden, weight, labels = make(ROWS, 16, 512, torch.float32)
    assert 2 * logits <= peak_bytes(lambda: naive(hidden, weight, labels)) <= 2.1 * logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tenth_of_the_memory(dtype: torch.dtype) -> None:
    """Of logits and their log-softmax, and of autograd's log-softmax and its gradient."""
    plain = 2 * ROWS * VOCAB * dtype.itemsize
    inputs = HeadInputs(*make(ROWS, HIDDEN, VOCAB, dtype), None, 1.0)
    assert peak_bytes(lambda: reference.forward(inputs)) + UNSEEN <= min(plain / 10, 36 * MIB)

    hidden, weight, labels = make(ROWS, 64, VOCAB, dtype)
    inputs = HeadInputs(hidden, weight, labels, None, 1.0)
    grad, entropy, lse = torch.ones(ROWS), torch.ones(ROWS), torch.full((ROWS,), 10.0, dtype=torch.float64)
    ours = peak_bytes(lambda: reference.backward(inputs, (grad, grad), entropy, lse, (True, True, False)))
    assert ours + UNSEEN - hidden.nbytes - weight.nbytes <= plain / 10


class Work(TorchDispatchMode):
    """Counts multiply-adds of products and elements converted from 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplied = self.converted = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if name in ("mkldnn._linear_pointwise.default", "aten.mm.default"):
            self.multiplied += args[0].numel() * out.shape[1]
        if name == "aten._to_copy.default" and args[0].dtype == torch.bfloat16:
            self.converted += args[0].numel()
        return out


@pytest.mark.parametrize("way", ["bf16", "onednn", "mm"])
def test_nothing_is_multiplied_or_converted_twice(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``bf16`` has a stand-in for csrc/bf16_product.cpp: its bookkeeping is tested on every CPU."""
    unconverted: list[int] = []

    def stand_in(a: Tensor, b: Tensor) -> Tensor:
        unconverted.append(a.numel() * len(b))
        with _disable_current_modes():
            return a.float() @ b.float().T

    monkeypatch.setattr(tiles, "bf16_product", lambda: stand_in if way == "bf16" else None)
    monkeypatch.setattr(tiles, "onednn", lambda: way != "mm")
    rows, hidden_size, vocab = 700, 8, 9000
    hidden, weight, labels = make(rows, hidden_size, vocab, torch.bfloat16)
    inputs = HeadInputs(hidden, weight, labels, None, 1.0)
    with Work() as forward:
        _, entropy, lse = reference.forward(inputs)
    with Work() as backward:
        reference.backward(inputs, (torch.ones(rows), None), entropy, lse, (True, True, False))
    passes = -(-vocab // tiles.tile_sizes(rows, weight, torch.float32)[1])
    assert passes == 7
    product, converted = rows * hidden_size * vocab, vocab * hidden_size + passes * rows * hidden_size
    if way == "bf16":
        assert sum(unconverted) == 2 * product
        assert forward.multiplied == forward.converted == 0
        assert backward.multiplied == 2 * product
    else:
        assert forward.multiplied == product
        assert forward.converted == converted
        assert backward.multiplied == 3 * product
    assert backward.converted == converted
