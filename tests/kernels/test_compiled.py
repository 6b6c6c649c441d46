"""What the documentation says of ``torch.compile(fullgraph=True)`` for the operations without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import videor1_kernels as vk


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(call, fullgraph=True, backend="aot_eager")


def decode_inputs(rows: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, 4, 16), (5, 2, 16), (5, 2, 16), (rows, 3, 2, 16), (rows, 3, 2, 16))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


LENGTHS, CU, GROUPS = torch.tensor([1, 3, 2, 1]), torch.tensor([0, 2, 5]), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_decode_attention_compiles_with_a_layout(backend: str) -> None:
    def call(layout: vk.DecodeLayout, lengths: Tensor, q: Tensor, *others: Tensor) -> Tensor:
        out = vk.prefix_decode_attention(2 * q, *others, suffix_lengths=lengths, layout=layout, backend=backend)
        return out.sin()

    graph, inputs = compiled(call), decode_inputs()
    for batch, groups in enumerate((GROUPS, GROUPS.flip(0), torch.zeros(4, dtype=torch.int64), GROUPS)):
        layout = vk.DecodeLayout(CU, groups)
        with torch.compiler.set_stance("default" if batch < 2 else "fail_on_recompile"):
            assert torch.equal(graph(layout, LENGTHS, *inputs), call(layout, LENGTHS, *inputs))
    with pytest.raises(ValueError, match="suffix_lengths: expected"):
        graph(layout, LENGTHS + 1, *inputs)


def test_decode_attention_compiles_with_lengths_and_groups() -> None:
    def call(cu: Tensor, groups: Tensor, q: Tensor, *others: Tensor) -> Tensor:
        return vk.prefix_decode_attention(q, *others, suffix_lengths=LENGTHS, cu_prefix=cu, row_group=groups) + 1

    graph, inputs = compiled(call), decode_inputs()
    assert torch.equal(graph(CU, GROUPS, *inputs), call(CU, GROUPS, *inputs))
    with pytest.raises(ValueError, match=r"row_group: expected values in \[0, 2\)"):
        graph(CU, GROUPS + 1, *inputs)


def test_a_compiled_decode_attention_has_no_gradient() -> None:
    q, *others = decode_inputs()

    def call(q: Tensor) -> Tensor:
        return vk.prefix_decode_attention(q, *others, suffix_lengths=LENGTHS, cu_prefix=CU, row_group=GROUPS)

    with pytest.raises(Exception, match=r"none that requires a gradient under torch\.compile"):
        compiled(call)(q.requires_grad_())
    with torch.no_grad():
        assert torch.equal(compiled(call)(q), call(q))


def nv12(frames: int = 3) -> vk.YuvFrames:
    generator = torch.Generator().manual_seed(1)
    planes = ((frames, 30, 40), (frames, 15, 20, 2))
    return vk.YuvFrames(
        tuple(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in planes), "709"
    )


RGB = torch.randint(0, 256, (3, 30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"permutation": (2, 0, 1)},
        {"permutation": (2, 0, 1), "both": True},
        {"dtype": torch.uint8, "rotation": 90},
        {"dtype": torch.float32},
    ],
    ids=["plain", "permuted", "both", "levels, turned", "fp32"],
)
@pytest.mark.parametrize("frames", [RGB, nv12()], ids=["RGB", "planes"])
def test_frames_to_patches_compiles(frames: Any, options: dict[str, Any], backend: str) -> None:
    def call(frames: Any) -> tuple[Tensor, ...]:
        made = vk.frames_to_patches(frames, size=(56, 84), backend=backend, **options)
        return tuple(x.float() + 1 for x in (made if isinstance(made, tuple) else (made,)))

    for mine, plain in zip(compiled(call)(frames), call(frames), strict=True):
        assert torch.equal(mine, plain)


def test_a_permutation_may_be_an_input_of_the_graph() -> None:
    def call(order: Tensor) -> Tensor:
        return vk.frames_to_patches(RGB, size=(56, 84), permutation=order)

    graph = compiled(call)
    for order in ([0, 1, 2], [2, 1, 0]):
        assert torch.equal(graph(torch.tensor(order)), call(torch.tensor(order)))
    with pytest.raises(ValueError, match=r"permutation: expected each of 0\.\.2 once"):
        graph(torch.tensor([0, 1, 1]))


def test_sampling_does_not_compile_whole() -> None:
    """Its truncation asks values which way to go; the rollout engine captures a CUDA graph of the kernel instead."""

    def call(logits: Tensor) -> Tensor:
        return vk.sample_tokens(logits, torch.full((3,), 0.5), top_k=4, backend="reference")[0]

    with pytest.raises(Exception, match="data-dependent"):
        compiled(call)(torch.randn(3, 5))
