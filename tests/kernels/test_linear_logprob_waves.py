"""How d_hidden's product is cut so that it fills a GPU, and that its parts add up to it."""

from __future__ import annotations

import pytest
import torch

from videor1_kernels.linear_logprob import products, waves
from videor1_kernels.linear_logprob.waves import inner_parts

HEADS = [(3584, 152064), (2048, 151936)]  # H and V of the 7B and 3B models


@pytest.mark.grid(head=HEADS, rows=[1024, 2048, 4096, 8192, 16384])
def test_a_hopper_is_filled(head: tuple[int, int], rows: int) -> None:
    """In the chunks that these rows come in: 92% and more of its multiprocessors' time goes into what is asked for."""
    size, vocabulary = head
    chunk = products.chunk_rows(rows, vocabulary)
    parts = inner_parts(chunk, size, vocabulary, 132)
    assert waves.waves(chunk, size, parts, 132).utilisation >= 0.92
    assert parts * chunk * size * 4 < 200e6  # bytes of the parts, beside 1.7 GB of logits


def test_what_is_not_cut() -> None:
    """What fills its waves, has no inner size that can be cut, or too short a one; and what is empty."""
    assert inner_parts(2048, 2048, 151936, 132) == 1
    assert inner_parts(2731, 3584, 151937, 132) == 1
    assert inner_parts(2731, 3584, 4096, 132) == 1
    assert inner_parts(0, 3584, 152064, 132) == 1
    assert inner_parts(2731, 3584, 152064, 1) == 1  # as on a CPU


def test_waves_by_hand() -> None:
    """22 x 14 tiles are two waves and a third of one; in three parts each they are seven whole waves."""
    assert (waves.waves(2816, 3584, 1, 132).tiles, waves.waves(2816, 3584, 1, 132).waves) == (308, 3)
    assert waves.waves(2816, 3584, 3, 132) == waves.Waves(924, 7, 1.0)
    assert waves.waves(4096, 3584, 1, 132).utilisation == pytest.approx(448 / 528)
    assert waves.waves(1, 1, 1, 132).utilisation == pytest.approx(1 / (128 * 256 * 132))


@pytest.mark.parametrize("rows", [slice(0, 5), torch.tensor([4, 0, 2, 1, 3])], ids=["slice", "indices"])
def test_parts_add_up_to_the_product(rows: slice | torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    buffer = products.logits_buffer(5, 96, torch.device("cpu"))
    d_logits = products.narrow_rows(buffer, 5, 96, torch.float16)  # rows lie 128 fp32 numbers apart
    d_logits.copy_(torch.randn(5, 96, generator=generator))
    weight = torch.randn(96, 7, generator=generator).half()
    seen: list[int] = []

    def batched(a: torch.Tensor, b: torch.Tensor, product=products.batched_product) -> torch.Tensor:
        seen.append(len(a))
        return product(a, b)

    monkeypatch.setattr(products, "batched_product", batched)
    monkeypatch.setattr(products, "_processors", lambda device: 132)
    monkeypatch.setattr(waves, "LEAST_INNER", 8)
    monkeypatch.setattr(waves, "TERMS_OF_A_PART", 1)
    gradients = products.HeadGradients(weight.new_empty(5, 7), weight, (True, False, False), torch.float32)
    gradients.add(rows, weight.new_empty(5, 7), d_logits)
    assert seen == [12]
    assert gradients.d_hidden is not None
    exact = d_logits.double() @ weight.double()
    torch.testing.assert_close(gradients.d_hidden[rows].double(), exact, rtol=1e-6, atol=1e-5)
    products.long_product(d_logits.float(), weight.float())  # fp32 is not cut
    assert seen == [12]
