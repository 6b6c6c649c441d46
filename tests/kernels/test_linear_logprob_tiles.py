"""How linear_logprob cuts its work: the reference into tiles, Triton into tiles, chunks and steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import loss_cases as cases
import pytest
import torch
from torch import Tensor
from triton_cases import CUDA, DEVICE, DTYPES, HALF, QUIET, Head, count_calls, for_threads, leaf, make_head, upstream

from videor1_kernels import linear_grpo_loss, linear_logprob, selective_log_softmax
from videor1_kernels.grpo_loss.records import GrpoLossOptions
from videor1_kernels.linear_logprob import products, tiles, triton, triton_rows
from videor1_kernels.linear_logprob.triton_forward import TILES, Tile, product_statistics, tile_for
from videor1_kernels.linear_logprob.triton_rows import RowStatistics, row_gradient, row_statistics
from videor1_kernels.testing import PeakMemory, assert_matches, poisoned_memory

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def small_tiles(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> None:
    """Tiles of at most so many rows and vocabulary entries."""
    monkeypatch.setitem(tiles.CHUNK_ROWS, DEVICE, rows)
    monkeypatch.setitem(tiles.CHUNK_BYTES, DEVICE, rows * columns * max(dtype.itemsize, 4))


@pytest.mark.grid(
    size=[(1, 1), (1, 31), (2, 5), (7, 30), (27, 1), (1000, 1000)], dtype=[torch.float64, torch.float32, torch.bfloat16]
)
def test_tiling_changes_nothing_beyond_rounding(
    size: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch, *size, dtype)
    head = make_head(40, 31, 6, dtype, bias=True, ignored=True)
    cases.check_head("reference", head, torch.linspace(0.3, 2, 40, device=DEVICE))


def test_gradients_of_16_bits_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(40, 31, 6, torch.bfloat16, bias=True, ignored=True)
    wide = Head(*(leaf(x.float()) if x.is_floating_point() else x for x in (head.hidden, head.weight, head.labels)))
    wide = replace(wide, bias=leaf(head.bias.float()))
    small_tiles(monkeypatch, 7, 5)  # many tiles to add up
    incoming = {"g": upstream(40, seed=0), "e": upstream(40, seed=1)}
    ours, exact = (cases.evaluate("reference", x, **incoming)[2:] for x in (head, wide))
    for a, b in zip(ours, exact, strict=True):
        assert torch.equal(a, b.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("banned", [slice(0, 4), slice(4, 8), slice(8, 11)])
def test_a_tile_may_be_banned_whole(banned: slice, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(9, 11, 4, dtype, bias=True)
    bias = head.bias.detach().clone()
    bias[banned] = -torch.inf
    allowed = bias.isfinite().nonzero()[:, 0]
    small_tiles(monkeypatch, 3, 4, dtype)
    head = replace(head, bias=leaf(bias), labels=allowed[head.labels % len(allowed)])
    assert (cases.check_head("reference", head)[4][banned] == 0).all()


@pytest.mark.parametrize("far", [1e5, 1e9, 1e30])
def test_a_far_maximum_leaves_everything_finite(far: float, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 2, 2)
    logits = torch.tensor([[-far, 0.0, 1.0, 2.0, far, -far], [far, 0.0, 1.0, 2.0, -far, far]], device=DEVICE)
    head = Head(leaf(logits), torch.eye(6, device=DEVICE), torch.tensor([4, 0], device=DEVICE))
    ones = torch.ones(2, device=DEVICE)
    logp, entropy, grad = cases.evaluate("reference", head, g=ones, e=ones)
    assert logp.tolist() == pytest.approx([0.0, -math.log(2)])
    assert entropy.tolist() == pytest.approx([0.0, math.log(2)])
    assert grad.isfinite().all()
    if far < 1e15:  # beyond, fp64 has no room beside the maximum for the log of the sum
        torch.testing.assert_close(grad.cpu(), torch.tensor([[0.0] * 6, [0.5, 0, 0, 0, 0, -0.5]]))


def losses_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    cu = torch.tensor([0, 100, len(labels)])
    return linear_grpo_loss(hidden, weight, labels, torch.ones(2), cu, beta=0, backend="reference").loss


CALLS = {
    "linear_logprob": lambda h, w, y: sum(x.sum() for x in linear_logprob(h, w, y, backend="reference")),
    "linear_grpo_loss": losses_of,
    "dense": lambda h, w, y: sum(x.sum() for x in cases.dense(h, w, y)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_full_logits_are_never_made(call: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocab = 300, 512
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    labels = torch.randint(vocab, (rows,))
    monkeypatch.setitem(tiles.CHUNK_BYTES, "cpu", 64 * 1024)
    with PeakMemory(torch.device("cpu")) as peak:
        call(hidden, weight, labels).backward()
    if call is CALLS["dense"]:
        assert peak.bytes > rows * vocab * 4  # the instrument sees it
    else:  # a tile of logits and what is made of it, beside the gradients
        assert 64 * 1024 <= peak.bytes < 6 * 64 * 1024 < rows * vocab * 4


def test_no_copy_of_given_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.CHUNK_BYTES, "cpu", 64 * 1024)
    logits, index = torch.randn(200, 512), torch.randint(512, (200, 1))
    with PeakMemory(torch.device("cpu")) as peak:
        selective_log_softmax(logits, index, temperature=0.7, backend="reference")
    assert peak.bytes <= 64 * 1024


@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [
        (4096, (32768, 1024), torch.float32),
        (16384, (152064, 3584), torch.float32),
        (4096, (152064, 3584), torch.float64),
        (1, (152064, 3584), torch.float32),
        (0, (7, 3), torch.float32),
        (5, (1, 10**9), torch.float32),
    ],
)
def test_tiles_are_bounded(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, m = tiles.tile_sizes(rows, torch.empty(shape, device="meta", dtype=torch.bfloat16), dtype)
    assert 1 <= n <= max(1, rows)
    assert 1 <= m <= shape[0]
    assert n * m * dtype.itemsize <= 4 * 2**20
    assert m == 1 or m * shape[1] * dtype.itemsize <= 8 * 2**20


@pytest.mark.parametrize("layout", ["plain", "transposed", "strided", "expanded"])
def test_product(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(17, 40), torch.randn(9, 40)
    if layout == "transposed":
        a, b = a.T.contiguous().T, b.T.contiguous().T
    elif layout == "strided":
        a, b = a.repeat_interleave(3, 1)[:, ::3], b.repeat_interleave(2, 0)[::2]
    elif layout == "expanded":
        a, b = a[:1].expand(17, 40), b[:, :1].expand(9, 40)
    exact = a.double() @ b.double().T
    monkeypatch.setattr(tiles, "onednn", tiles.has_onednn)
    with torch.autocast("cpu", torch.bfloat16):
        assert_matches(tiles.product(a, b), exact)
        assert_matches(tiles.product(a.double(), b.double()), exact)
        monkeypatch.setattr(tiles, "onednn", lambda: False)
        assert_matches(tiles.product(a, b), exact)


def test_threads_change_nothing_beyond_rounding() -> None:
    head = make_head(600, 700, 16, bias=True, ignored=True)  # several tiles, split among threads
    incoming = {"g": upstream(600, seed=0), "e": upstream(600, seed=1)}
    results = for_threads(lambda: cases.evaluate("reference", head, **incoming), 1, 2, 2)
    for one, two, again in zip(*results, strict=True):
        assert_matches(one, two)
        assert torch.equal(two, again)


# Triton.


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_gradients_are_laid_out_as_compiled_code_expects(backend: str) -> None:
    """As the fake kernels say, also where an input is column-major, and of none that is not needed."""
    head = make_head(6, 9, 4, bias=True)
    hidden, weight = (leaf(cases.LAYOUTS["column-major"](x.detach())) for x in (head.hidden, head.weight))
    bias, needs, ones = head.bias.detach(), [True, True, False], torch.ones(6, device=DEVICE)
    completions = torch.ones(2, device=DEVICE), torch.tensor([0, 2, 6], device=DEVICE), *[None] * 6
    options = GrpoLossOptions("grpo", 0.0, None, None, 10.0, "token", None, None).packed()
    loss = hidden, weight, head.labels, *completions, bias, None, 1.0, None, 0.0, *options, needs, backend
    torch.library.opcheck(torch.ops.videor1.linear_grpo_loss, loss, test_utils="test_faketensor")
    head_inputs = hidden.detach(), weight.detach(), head.labels, bias, None, 1.0, None, 0.0
    gradient = ones, ones, *head_inputs, ones, ones.double(), needs, backend
    torch.library.opcheck(torch.ops.videor1.linear_logprob_backward, gradient, test_utils="test_faketensor")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [1, 8, 15, 16])
def test_descriptors_are_taken_only_where_they_can_address(dtype: torch.dtype, size: int) -> None:
    hidden, weight = (torch.randn(n, size, device=DEVICE).to(dtype) for n in (9, 70))
    major, minor = torch.cuda.get_device_capability() if CUDA else (9, 0)
    has_them = TILES[max(known for known in TILES if known <= 10 * major + minor)].descriptors
    assert tile_for(hidden, weight).descriptors == (size % 8 == 0 and has_them)
    for layout in ("shifted", "strided", "column-major"):
        if size > 1 or layout == "shifted":
            assert not tile_for(cases.LAYOUTS[layout](hidden), weight).descriptors
            assert not tile_for(hidden, cases.LAYOUTS[layout](weight)).descriptors
    assert not tile_for(hidden[:1].expand(9, size), weight).descriptors
    if size == 1:  # [9, 1] with strides (8, 8): aligned rows, no unit stride
        one = torch.randn(9, 8, device=DEVICE).to(dtype)[:, ::8]
        cases.check_head("triton", Head(leaf(one), leaf(weight), torch.arange(9, device=DEVICE)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(4, 64), (13, 300)])
def test_chunks(dtype: torch.dtype, rows: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.cut_small(monkeypatch)
    head = make_head(rows, vocab, 16, dtype, bias=True, ignored=True)
    counted = count_calls(monkeypatch, triton, "product")
    incoming = {"g": upstream(rows, seed=0), "e": upstream(rows, seed=1)}
    cases.check_head("triton", head, 0.7)
    kept = head.labels != -100
    live = int((kept & ((incoming["g"] != 0) | (incoming["e"] != 0))).sum())
    forward = -(-int(kept.sum()) // 4) if dtype == torch.float32 else 0  # 16 bits: one kernel
    assert counted.calls == forward + -(-live // 4)
    if rows > 4:
        cases.assert_same_bits(lambda: cases.evaluate("triton", head, 2.0, **incoming), autocast=False)


SHAPES = [
    Tile(16, 16, 16, num_warps=4, num_stages=1, group_n=1),
    Tile(16, 64, 32, num_warps=4, num_stages=2, group_n=3),
    Tile(64, 16, 16, num_warps=4, num_stages=1, group_n=2),
    Tile(32, 128, 64, num_warps=4, num_stages=2, group_n=16, flatten=True),
]


@pytest.mark.parametrize(
    ("tile", "rows", "vocab", "size", "bias"),
    [
        (SHAPES[0], 37, 33, 24, True),
        (SHAPES[1], 37, 130, 40, True),
        (SHAPES[2], 70, 50, 40, False),
        (SHAPES[3], 37, 130, 72, False),
        (SHAPES[3], 1, 5, 8, True),
        (SHAPES[1], 16, 64, 32, False),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_statistics(tile: Tile, rows: int, vocab: int, size: int, bias: bool, dtype: torch.dtype) -> None:
    """Of both kernels: the same tiles in the same order have the same bits, whatever addresses the operands."""
    head = make_head(rows, vocab, size, dtype, bias=bias)
    hidden, weight, offset = (None if x is None else x.detach() for x in (head.hidden, head.weight, head.bias))
    temperature = torch.linspace(0.5, 2, rows, device=DEVICE)
    z = hidden.double() @ weight.double().T
    z = (z if offset is None else z + offset.double()) / temperature.double()[:, None]
    scores = z.log_softmax(1)
    exact = scores.gather(1, head.labels[:, None])[:, 0], -(scores.exp() * scores).sum(1), z.logsumexp(1)
    results = []
    for descriptors in (False, True):
        with poisoned_memory():
            made = replace(tile, descriptors=descriptors)
            results.append(product_statistics(hidden, weight, head.labels, offset, 1 / temperature, made))
        for a, o in zip(results[-1], exact, strict=True):
            assert_matches(a, o)
    if not CUDA:
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.grid(
    step=[128, 4096], narrow=DTYPES, entropy=[False, True], entries=[1, 3]
)  # columns that a row kernel takes at once: a row of 270 in several steps or in one
def test_in_place_row_gradient(
    step: int, narrow: torch.dtype, entropy: bool, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the logits, moved and narrowed, it has the bits of one written elsewhere, and nothing else is touched."""
    monkeypatch.setattr(triton_rows, "BLOCK", step)
    rows, vocab, pitch = 9, 270, 320
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(rows + 1, pitch, generator=generator).to(DEVICE)
    logits = memory[:rows, :vocab]
    index = torch.randint(vocab, (rows, entries), generator=generator).to(DEVICE)
    index[0, 0], index[1, 0] = 0, vocab - 1
    bias = torch.randn(vocab, generator=generator).to(DEVICE)
    scale = torch.linspace(0.5, 2, rows, device=DEVICE)
    grad = upstream(rows, entries)
    grad_entropy = upstream(rows, seed=5) if entropy else None
    dead = [1, 4, 8]
    grad[dead] = 0.0
    if entropy:
        grad_entropy[dead] = 0.0
    _, statistics = row_statistics(logits, index, bias, scale, entropy=True)
    source = torch.tensor([0, 7, 2, 3, 6, 5], device=DEVICE)  # rows 1 and 4 hold the gradients of rows 7 and 6

    def into(given: Tensor, out: Tensor, source: Tensor | None = None) -> None:
        row_gradient(given, out, index, bias, scale, statistics, grad, grad_entropy=grad_entropy, source=source)

    apart = torch.full((rows + 2, vocab + 9), 7.0, dtype=narrow, device=DEVICE)
    want = apart[1 : rows + 1, 4 : 4 + vocab]
    into(logits, want)
    frame = apart.clone()
    frame[1 : rows + 1, 4 : 4 + vocab] = 7
    assert (frame == 7).all()
    assert (want[dead] == 0).all()

    z = leaf(((logits + bias) * scale[:, None]).double())
    scores = z.log_softmax(1)
    total = (scores.gather(1, index) * grad).sum()
    if entropy:
        total = total - (grad_entropy * (scores.exp() * scores).sum(1)).sum()
    assert_matches(want, torch.autograd.grad(total, z)[0] * scale[:, None])

    before, same_rows, moved = memory, memory.clone(), memory.clone()
    into(same_rows[:rows, :vocab], products.narrow_rows(same_rows, rows, vocab, narrow))
    assert torch.equal(products.narrow_rows(same_rows, rows, vocab, narrow), want)
    assert torch.equal(same_rows[rows], before[rows])
    assert torch.equal(same_rows[:, vocab:], before[:, vocab:])
    into(moved[:rows, :vocab], products.narrow_rows(moved, len(source), vocab, narrow), source)
    assert torch.equal(products.narrow_rows(moved, len(source), vocab, narrow), want[source])
    assert torch.equal(moved[len(source) :], before[len(source) :])


def test_a_row_without_gradient_becomes_zero_unread() -> None:
    logits = torch.full((2, 40), math.nan, device=DEVICE)
    index = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    ones, zeros = torch.ones(2, device=DEVICE), torch.zeros(2, 1, device=DEVICE)
    statistics = RowStatistics(ones, ones, ones)
    row_gradient(logits, logits, index, None, ones, statistics, zeros, grad_entropy=zeros[:, 0])
    assert (logits == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_both_ways_to_the_statistics_are_right(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes fp32 sums, which no logits of 16 bits lie between; a card says which is faster."""
    cases.cut_small(monkeypatch)
    head = make_head(13, 300, 16, dtype, bias=True)
    scale = torch.full((13,), 1 / 0.7, device=DEVICE)
    exact = cases.evaluate("dense", head.oracle(), 0.7)
    counted = count_calls(monkeypatch, triton, "product")
    for way, expected in (("fused", 0 if dtype == torch.float16 else 4), ("chunks", 4)):
        counted.calls = 0
        with torch.no_grad():
            logp, entropy, _ = triton.statistics(head.hidden, head.weight, head.labels, head.bias, scale, way)
        assert counted.calls == expected
        assert_matches(logp, exact[0])
        assert_matches(entropy, exact[1])
