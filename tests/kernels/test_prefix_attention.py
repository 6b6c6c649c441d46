"""prefix_attention on every backend against one dense masked softmax over the whole row, in fp64.

On Triton in the interpreter with blocks of 16, so that rows have several, and with the queries of a key split as they
are on long rows, so that partial results are summed. In C++ with the vectors of each kind of processor.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import CUDA, DEVICE, HALF

from videor1_kernels import PrefixLayout, chosen_backend, extension, last_backend, prefix_attention
from videor1_kernels.prefix_attention import native, reference, softmax, triton, triton_decode, work
from videor1_kernels.prefix_attention.triton import Block, Blocks
from videor1_kernels.testing import LargestTensor, assert_matches, assert_no_worse, poisoned_memory

NATIVE = ["native"] if any(map(shutil.which, ("c++", "g++", "clang++"))) else []
BACKENDS = ["reference", *NATIVE, "triton"]
EXACT = {"reference": torch.float64, "native": torch.float32, "triton": torch.float16 if CUDA else torch.float32}
OWN = {"native": [torch.float32, torch.bfloat16], "triton": HALF}  # the dtypes of those that do not take all
LAYOUTS: dict[str, tuple[list[int], list[list[int]]]] = {
    "one completion": ([3], [[2]]),
    "ragged": ([20, 1, 17], [[18, 1], [16, 3], []]),
    "no completion": ([3], [[]]),
    "single tokens": ([1, 1], [[1], [1, 1, 1]]),
    "whole blocks": ([32], [[16, 32]]),
    "one key more than a block": ([33, 5], [[17], [4]]),
    "a short prompt": ([3], [[50]]),
    **({"blocks of a card": ([300, 128, 1], [[257, 1, 129], [128], [64, 300]])} if CUDA else {}),
}
# Tiles of C++ with several segments, segments of several tiles, and key gradients summed in several parts.
LONG: dict[str, tuple[list[int], list[list[int]]]] = {
    "many short completions": ([75, 130], [[9] * 11, [14, 1, 97, 3]]),
    "more than a tile": ([300], [[97, 1, 200, 96]]),
    "a long prompt": ([700], [[]]),
}
RAGGED, SHORT = LAYOUTS["ragged"], ([20, 1], [[18, 1], [16]])

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on the padding of interpreted kernels


@pytest.fixture(autouse=True)
def _small_blocks_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "LEAST_PART", 20)
    monkeypatch.setattr(triton, "INTERPRETED", Blocks(*[Block(16, 16, 4, 1)] * 3))


def mask_of(prompts: list[int], completions: list[list[int]]) -> Tensor:
    """bool [T, T], from the definition: who sees whom, by (group, completion or -1 for the prompt, position in it)."""
    owner = []
    for group, (prompt, lengths) in enumerate(zip(prompts, completions, strict=True)):
        for part, length in enumerate([prompt, *lengths], -1):
            owner += [(group, part, i) for i in range(length)]
    group, part, place = torch.tensor(owner).T
    own = (part[:, None] == part) & (place <= place[:, None])
    return (group[:, None] == group) & (own | ((part[:, None] >= 0) & (part == -1)))


def naive(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[list[int], list[list[int]]], scale: float | None) -> Tensor:
    repeat, mask = q.shape[1] // k.shape[1], mask_of(*lengths).to(q.device)
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q * (scale or q.shape[2] ** -0.5), k).masked_fill(~mask, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


class Case:
    """Inputs for a layout, and the gradient of the result."""

    def __init__(
        self,
        lengths: tuple[list[int], list[list[int]]] = RAGGED,
        backend: str = "reference",
        heads: tuple[int, int] = (2, 1),
        dim: int = 16,
        dtype: torch.dtype | None = None,
    ) -> None:
        device = DEVICE if backend == "triton" else "cpu"
        self.lengths, self.backend, self.layout = lengths, backend, PrefixLayout(*lengths, device)
        torch.manual_seed(0)
        q, k, v, self.grad = (
            torch.randn(self.layout.total_tokens, h, dim, dtype=torch.float64).to(device, dtype or EXACT[backend])
            for h in (*heads, heads[1], heads[0])
        )
        self.inputs = [x.requires_grad_() for x in (q, k, v)]

    def __call__(self, change: Callable[[Tensor], Tensor] = lambda x: x, **options: Any) -> list[Tensor]:
        """The result and the gradients, of inputs and gradient that were ``change``d."""
        inputs = [change(x.detach()).requires_grad_() for x in self.inputs]
        out = prefix_attention(*inputs, self.layout, backend=self.backend, **options)
        assert last_backend("prefix_attention") == self.backend
        return [out.detach(), *torch.autograd.grad(out, inputs, change(self.grad))]

    def naive(self, dtype: torch.dtype = torch.float64, scale: float | None = None) -> list[Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in self.inputs]
        out = naive(*inputs, self.lengths, scale)
        return [out.detach(), *torch.autograd.grad(out, inputs, self.grad.to(dtype))]

    def check(self, scale: float | None = None) -> list[Tensor]:
        found = self(scale=scale)
        for name, ours, exact in zip(("out", "dq", "dk", "dv"), found, self.naive(scale=scale), strict=True):
            assert ours.dtype == self.inputs[0].dtype
            # A gradient's rounding is that of its largest terms, whatever cancels in an element.
            size = exact.abs().max().clamp(min=1).to(exact.dtype) if name != "out" and exact.numel() else 1.0
            assert_matches(ours.double() / size, exact / size, ours.dtype, name)
        return found


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.grid(
    name=list(LAYOUTS), backend=BACKENDS, heads=[(4, 2), (2, 2), (3, 1)], dim=[16, 20, 64], scale=[None, 0.3]
)
def test_equals_dense_fp64(name: str, backend: str, heads: tuple[int, int], dim: int, scale: float | None) -> None:
    Case(LAYOUTS[name], backend, heads, dim).check(scale)


@pytest.mark.parametrize(
    ("backend", "dim", "dtype"),
    [
        *(("triton", 16, dtype) for dtype in HALF),
        *((backend, dim, None) for backend in ("triton", *NATIVE) for dim in (80, 128)),
        *((backend, *row) for backend in NATIVE for row in ((1, None), (200, None), (20, torch.bfloat16))),
    ],
)
def test_other_head_dims_and_16_bits(backend: str, dim: int, dtype: torch.dtype | None) -> None:
    Case(SHORT, backend, (2, 1), dim, dtype).check()


@pytest.mark.grid(
    backend=BACKENDS,
    dim=[160, 192, 256],
    heads=[(1, 1), (4, 2), (4, 1)],
    name=["ragged", "one key more than a block", "single tokens", "no completion"],
    apart=[True, False],
)
def test_wide_heads(
    backend: str, dim: int, heads: tuple[int, int], name: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the head dim from which on kernels have other blocks; gradients of keys and values ``apart`` or not."""
    monkeypatch.setattr(triton, "INTERPRETED", Blocks(*[Block(16, 16, 4, 1)] * 3, apart=apart))
    Case(LAYOUTS[name], backend, heads, dim).check()


@pytest.mark.parametrize(("dim", "wide"), [(16, False), (128, False), (136, True), (256, True)])
def test_blocks_of_a_card(dim: int, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of more than 128 entries have smaller ones, in training and in decoding."""

    class OnACard:
        device, shape = torch.device("cuda"), (5, 4, dim)

    for capability in (80, 86, 90, 100, 120):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: divmod(c, 10))
        expected = (triton.WIDE_BLOCKS if wide else triton.BLOCKS)[capability]
        assert triton.blocks_for(OnACard()) == expected
        expected = (triton_decode.WIDE_BLOCKS if wide else triton_decode.BLOCKS)[capability]
        assert triton_decode.block_for(OnACard()) == expected


@pytest.mark.skipif(not NATIVE, reason="there is no C++ compiler")
@pytest.mark.grid(bits=[128, 256, 512], name=list(LONG), heads=[(4, 2), (7, 1)], dim=[32, 100], poisoned=[False, True])
def test_native_on_long_rows(
    bits: int, name: str, heads: tuple[int, int], dim: int, poisoned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor without vectors of that many bits takes its widest."""
    monkeypatch.setattr(native, "vector_bits", lambda: bits)
    case = Case(LONG[name], "native", heads, dim)
    with poisoned_memory() if poisoned else contextlib.nullcontext():
        found = case()
    group, rows = heads[0] // heads[1], max(case.layout.completion_lengths[0], default=0) + case.layout.total_tokens
    terms = (dim + rows) * group
    for name, ours, plain, exact in zip(
        ("out", "dq", "dk", "dv"), found, case.naive(torch.float32), case.naive(), strict=True
    ):
        assert_no_worse(ours, plain, exact, terms=terms, name=name)


@pytest.mark.skipif(not NATIVE, reason="there is no C++ compiler")
@pytest.mark.parametrize("bits", [128, 256, 512])
def test_native_has_the_same_bits_for_any_threads(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "vector_bits", lambda: bits)
    case = Case(([400], [[150, 30, 200]]), "native", dim=32)  # of more than one part, and worth several threads
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(case())
        monkeypatch.setattr(extension, "torch_parallel_for", lambda: None)
        results.append(case())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.skipif(not NATIVE, reason="there is no C++ compiler")
def test_native_and_the_reference_read_each_other_s_results() -> None:
    case = Case(heads=(4, 2), dim=20, dtype=torch.float32)
    inputs, scale = [x.detach() for x in case.inputs], 0.3
    forwards = [run.forward(*inputs, case.layout, scale) for run in (native, reference)]
    exact = case.naive(scale=scale)
    for out, lse in forwards:
        for run in (native, reference):
            gradients = run.backward(case.grad, *inputs, out, lse, case.layout, scale)
            for ours, theirs in zip((out, *gradients), exact, strict=True):
                assert_matches(ours, theirs)


@pytest.mark.skipif(not NATIVE, reason="there is no C++ compiler")
def test_native_takes_mixed_dtypes() -> None:
    case = Case(SHORT, "native", dim=32, dtype=torch.bfloat16)
    q, k, v = case.inputs
    case.inputs = [q.detach().float().requires_grad_(), k, v.detach().half().requires_grad_()]
    found = case()
    for x, ours, exact in zip((q.float(), *case.inputs), found, case.naive(), strict=True):
        assert ours.dtype == x.dtype
        assert_matches(ours, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_auto_on_a_cpu(dtype: torch.dtype) -> None:
    expected = "native" if NATIVE and dtype in OWN["native"] else "reference"
    assert chosen_backend("prefix_attention", "cpu", dtype=dtype) == expected
    case = Case(SHORT, dtype=dtype)
    prefix_attention(*case.inputs, case.layout)
    assert last_backend("prefix_attention") == expected


@pytest.mark.skipif(not NATIVE, reason="there is no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_native_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(
        ValueError, match="'native' cannot run on cpu: it takes fp32 and bf16, and the inputs are torch"
    ):
        Case(SHORT, "native", dtype=dtype)()


@pytest.fixture
def _turned_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VIDEOR1_NATIVE", "0")
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@pytest.mark.usefixtures("_turned_off")
def test_native_turned_off_says_so_once_and_the_reference_serves(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(SHORT, dtype=torch.float32)
    for _ in range(2):
        out = prefix_attention(*case.inputs, case.layout)
        assert last_backend("prefix_attention") == "reference"
    assert_matches(out, case.naive()[0])
    [said] = [r.getMessage() for r in caplog.records if "prefix attention on the CPU runs in plain" in r.getMessage()]
    assert "VIDEOR1_NATIVE=0 turns it off" in said
    with pytest.raises(ValueError, match="backend 'native' cannot run on cpu: VIDEOR1_NATIVE=0"):
        Case(SHORT, "native")()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend: str) -> None:
    case = Case(SHORT, backend, dtype=None if CUDA else torch.float32)
    q, k, v = case.inputs
    case.inputs = [(x.detach() * factor).requires_grad_() for x, factor in ((q, 90), (k, 90), (v, 1))]
    assert (case.inputs[0][:, 0].float() @ case.inputs[1][:, 0].float().T).max() > 1e4
    assert_matches(case()[0], case.naive()[0])


def test_gradcheck() -> None:
    case = Case(([2, 1], [[2, 1], [1]]), dim=2)
    assert torch.autograd.gradcheck(lambda q, k, v: prefix_attention(q, k, v, case.layout), case.inputs)


@pytest.mark.fits(lambda dtype, backend: dtype in OWN.get(backend, [dtype]))
@pytest.mark.grid(dtype=[torch.float32, torch.bfloat16, torch.float16], backend=BACKENDS)
def test_no_worse_than_plain_torch_at_its_dtype(dtype: torch.dtype, backend: str) -> None:
    """Scores, probabilities and products rounded where a dense attention rounds them."""
    case = Case(backend=backend, dim=32, dtype=dtype)
    terms = 2 * (32 + case.layout.total_tokens)  # of a score and of a softmax; again in the gradients
    for ours, plain, exact in zip(case(), case.naive(dtype), case.naive(), strict=True):
        assert ours.dtype == dtype
        assert_no_worse(ours, plain, exact, terms=terms)


def test_equals_each_completion_by_itself() -> None:
    """What sharing must not change: a completion's outputs are those of causal attention over prompt + completion."""
    case = Case(([5], [[3, 4]]), heads=(4, 2))
    (q, k, v), layout = case.inputs, case.layout
    shared, repeated = prefix_attention(q, k, v, layout), (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    for start, length in zip(layout.completion_starts[0], layout.completion_lengths[0], strict=True):
        rows = torch.cat([torch.arange(5), torch.arange(start, start + length)])
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[rows].transpose(0, 1) for x in repeated), is_causal=True
        ).transpose(0, 1)
        assert_matches(shared[rows], alone)


@pytest.mark.parametrize("block", [1, 2**28])
def test_devices_without_the_blocked_kernel(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of other devices, with scores of one query at a time and of all at once."""
    monkeypatch.setattr(softmax, "SCORE_BYTES", block)
    monkeypatch.setattr(softmax, "_blocked", lambda q: False)
    monkeypatch.setattr(softmax, "_flash", None)
    monkeypatch.setattr(softmax, "_flash_backward", None)
    Case(heads=(4, 2)).check()


def test_scores_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt once by itself and once by its completions together, not once per completion."""
    prompts, completions = [40, 7], [[10, 3, 10, 1], [5]]
    seen = []

    def counted(original: Callable[..., Any], first: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            q, k = args[first : first + 2]
            seen.append(q.shape[-2] * k.shape[-2])
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(softmax, "_flash", counted(softmax._flash, 0))
    monkeypatch.setattr(softmax, "_flash_backward", counted(softmax._flash_backward, 1))
    Case((prompts, completions))()
    expected = sum(
        p * p + p * sum(group) + sum(c * c for c in group) for p, group in zip(prompts, completions, strict=True)
    )
    assert sum(seen) == 2 * expected


def test_no_mask_over_the_whole_row() -> None:
    case = Case(([40] * 6, [[10] * 4] * 6), dim=4, dtype=torch.float32)  # T = 480
    inputs = [x.detach() for x in case.inputs]
    with LargestTensor() as seen:  # below the operator, inside of which the mode does not look
        out, lse = reference.forward(*inputs, case.layout, 0.5)
        reference.backward(torch.ones_like(out), *inputs, out, lse, case.layout, 0.5)
    assert case.layout.total_tokens < seen.numel < case.layout.total_tokens**2 // 8, seen.operation


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_again_in_poisoned_memory_and_under_autocast(backend: str) -> None:
    case = Case(SHORT, backend, dtype=None if CUDA else torch.float32)
    first = case()
    with poisoned_memory():
        assert_same(case(), first)
    with torch.autocast(case.grad.device.type, torch.bfloat16):
        assert_same(case(), first)


@pytest.mark.parametrize("backend", ["triton", *NATIVE])
def test_views_of_other_layouts(backend: str) -> None:
    """q, k and v as transformers hands them over, [heads, T, D]; ones that cannot be read as they are; a gradient
    broadcast from a sum."""
    case = Case(([18], [[2]]), backend)
    plain = case()
    assert_same(case(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)), plain)
    assert_same(case(lambda x: x.repeat_interleave(2, 2)[..., ::2]), plain)
    assert_same(case(lambda x: x[..., 3:15]), case(lambda x: x[..., 3:15].contiguous()))  # unaligned, D 12
    case.grad = torch.ones(1, 1, 1, dtype=case.grad.dtype, device=case.grad.device).expand_as(case.grad)
    assert_same(case(), case(lambda x: x.contiguous()))


def test_how_the_queries_are_split_changes_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    case, block = Case(SHORT, "triton"), 128 if CUDA else 16
    split = case()
    assert work.key_items(case.layout, block)[2] > 2
    monkeypatch.setattr(work, "LEAST_PART", 10**6)
    case.layout = PrefixLayout(*SHORT, DEVICE)
    for a, b in zip(split, case(), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-3, atol=3e-3)
    assert work.key_items(case.layout, block)[2] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_completion_does_not_depend_on_its_neighbours(backend: str) -> None:
    case = Case(SHORT, backend)
    with torch.inference_mode():  # which needs no gradient
        before = prefix_attention(*(x.detach() for x in case.inputs), case.layout, backend=backend)
        second = case.layout.completion_starts[0][1]
        q, k, v = (x.detach().clone() for x in case.inputs)
        k[second:], v[second:] = torch.nan, torch.nan
        assert torch.equal(prefix_attention(q, k, v, case.layout, backend=backend)[:second], before[:second])
