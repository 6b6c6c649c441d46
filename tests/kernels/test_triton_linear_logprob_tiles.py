"""linear_logprob on Triton, however its operands lie in memory and its work is cut into tiles, chunks and steps."""

import math

import pytest
import torch
from triton_cases import CUDA, DEVICE, DTYPES, HALF, QUIET, Counter, Head, assert_all_match, leaf, make_head, upstream
from triton_logprob_cases import LAYOUTS, NAMES, check, evaluate, strided

from videor1_kernels import linear_logprob
from videor1_kernels.linear_logprob import products, triton, triton_rows
from videor1_kernels.linear_logprob.triton_forward import TILES, Tile, product_statistics, tile_for
from videor1_kernels.linear_logprob.triton_rows import RowStatistics, row_gradient, row_statistics
from videor1_kernels.testing import assert_matches, poisoned_memory

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", ["hidden", "weight"])
def test_layouts_of_the_operands(dtype, layout, operand):
    head = make_head(9, 70, 16, dtype)
    moved = LAYOUTS[layout](getattr(head, operand).detach())
    assert torch.equal(moved, getattr(head, operand))
    changed = Head(**{"hidden": head.hidden, "weight": head.weight, "labels": head.labels, operand: leaf(moved)})
    check(changed)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_gradients_have_the_strides_that_compiled_code_expects(backend):
    """Those of the fake kernels, also where an input is column-major."""
    head = make_head(6, 9, 4)
    hidden, weight = (leaf(LAYOUTS["column-major"](x.detach())) for x in (head.hidden, head.weight))
    cu = torch.tensor([0, 2, 6], device=DEVICE)
    loss = (
        hidden,
        weight,
        head.labels,
        torch.ones(2, device=DEVICE),
        cu,
        None,
        None,
        None,
        None,
        1.0,
        "grpo",
        0.0,
        None,
        None,
        10.0,
        "token",
        None,
        None,
        [True, True, False],
        backend,
    )
    torch.library.opcheck(torch.ops.videor1.linear_grpo_loss, loss, test_utils="test_faketensor")
    ones = torch.ones(6, device=DEVICE)
    gradient = (
        ones,
        ones,
        hidden.detach(),
        weight.detach(),
        head.labels,
        None,
        None,
        1.0,
        ones,
        ones.double(),
        [True, True, False],
        backend,
    )
    torch.library.opcheck(torch.ops.videor1.linear_logprob_backward, gradient, test_utils="test_faketensor")


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_labels_and_bias(dtype):
    head = make_head(9, 70, 16, dtype, bias=True)
    check(Head(head.hidden, head.weight, strided(head.labels), leaf(strided(head.bias.detach()))))
    ignored = strided(head.labels)
    ignored[3] = -100
    check(Head(head.hidden, head.weight, ignored, leaf(strided(head.bias.detach()))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_rows_and_expanded_gradients(dtype):
    head = make_head(9, 70, 16, dtype)
    row = leaf(head.hidden[:1])
    check(Head(leaf(head.hidden[:1].detach().expand(9, 16)), head.weight, head.labels))
    logp, _ = linear_logprob(row.expand(9, 16), head.weight, head.labels, backend="triton")
    logp.sum().backward()
    exact = row.detach().double().requires_grad_()
    linear_logprob(exact.expand(9, 16), head.weight.double(), head.labels)[0].sum().backward()
    assert_matches(row.grad, exact.grad)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [1, 8, 15, 16])
def test_descriptors_are_taken_only_where_they_can_address(dtype, size):
    hidden, weight = (torch.randn(n, size, device=DEVICE).to(dtype) for n in (9, 70))
    whole = size % 8 == 0
    major, minor = torch.cuda.get_device_capability() if CUDA else (9, 0)
    has_them = TILES[max(known for known in TILES if known <= 10 * major + minor)].descriptors
    assert tile_for(hidden, weight).descriptors == (whole and has_them)
    for layout in ("shifted", "strided", "column-major"):
        moved = LAYOUTS[layout](hidden)
        if size > 1 or layout == "shifted":
            assert not tile_for(moved, weight).descriptors
            assert not tile_for(hidden, LAYOUTS[layout](weight)).descriptors
    assert not tile_for(hidden[:1].expand(9, size), weight).descriptors
    one = torch.randn(9, 8, device=DEVICE).to(dtype)[:, ::8]  # [9, 1] with strides (8, 8): aligned rows, no unit stride
    check(Head(leaf(one), leaf(weight[:, :1]), torch.arange(9, device=DEVICE)))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 rows at most, and row kernels that take a row in several steps."""
    monkeypatch.setattr(products, "MIN_CHUNK_ROWS", 4)
    monkeypatch.setattr(products, "CHUNK_BYTES", 1)
    monkeypatch.setattr(triton_rows, "BLOCK", 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(4, 64), (13, 300)])
def test_chunks(dtype, rows, vocab, small_chunks, monkeypatch):
    head = make_head(rows, vocab, 16, dtype, bias=True, ignored=True)
    counted = Counter(triton.product)
    monkeypatch.setattr(triton, "product", counted)
    g, e = upstream(rows, seed=0), upstream(rows, seed=1)
    ours = check(head, 0.7)
    live = int(((head.labels != -100) & ((g != 0) | (e != 0))).sum())
    forward = -(-int((head.labels != -100).sum()) // 4) if dtype == torch.float32 else 0  # 16 bits: one kernel
    assert counted.calls == forward + -(-live // 4)
    monkeypatch.undo()
    whole = evaluate(head, temperature=0.7, g=g, e=e)
    assert_all_match(ours, whole, NAMES, [None] * 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_the_rows_changes_nothing(dtype):
    head = make_head(33, 90, 16, dtype, ignored=True)
    g, e = upstream(33, seed=0), upstream(33, seed=1)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ours = evaluate(Head(leaf(head.hidden[order]), head.weight, head.labels[order]), g=g[order], e=e[order])
    as_given = evaluate(head, g=g, e=e)
    for i, (a, b) in enumerate(zip(ours, as_given, strict=True)):
        assert_matches(a, b[order] if i < 3 else b, name=NAMES[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_from_poisoned_memory(dtype, small_chunks):
    head = make_head(13, 200, 20, dtype, bias=True, ignored=True)
    g, e = upstream(13, seed=0), upstream(13, seed=1)
    first = evaluate(head, temperature=2.0, g=g, e=e)
    with poisoned_memory():
        second = evaluate(head, temperature=2.0, g=g, e=e)
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert a.isfinite().all(), name
        assert torch.equal(a, b), name


SHAPES = [
    Tile(16, 16, 16, num_warps=4, num_stages=1, group_n=1),
    Tile(16, 64, 32, num_warps=4, num_stages=2, group_n=3),
    Tile(64, 16, 16, num_warps=4, num_stages=1, group_n=2),
    Tile(32, 128, 64, num_warps=4, num_stages=2, group_n=16, flatten=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("descriptors", [True, False])
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
def test_product_statistics(dtype, descriptors, tile, rows, vocab, size, bias):
    head = make_head(rows, vocab, size, dtype, bias=bias)
    hidden, weight, offset = (None if x is None else x.detach() for x in (head.hidden, head.weight, head.bias))
    temperature = torch.linspace(0.5, 2, rows, device=DEVICE)
    tile = Tile(**{**vars(tile), "descriptors": descriptors})
    with poisoned_memory():
        logp, entropy, lse = product_statistics(hidden, weight, head.labels, offset, 1 / temperature, tile)
    z = hidden.double() @ weight.double().T
    z = (z if offset is None else z + offset.double()) / temperature.double()[:, None]
    scores = z.log_softmax(1)
    assert_matches(logp, scores.gather(1, head.labels[:, None])[:, 0])
    assert_matches(entropy, -(scores.exp() * scores).sum(1))
    assert_matches(lse, z.logsumexp(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_product_kernels_agree(dtype):
    """The same tiles in the same order of operations: the same bits, whatever addresses the operands."""
    head = make_head(37, 130, 40, dtype)
    results = [
        product_statistics(
            head.hidden.detach(),
            head.weight.detach(),
            head.labels,
            None,
            torch.ones(37, device=DEVICE),
            Tile(32, 64, 32, num_warps=4, num_stages=1, group_n=2, descriptors=descriptors),
        )
        for descriptors in (False, True)
    ]
    for a, b in zip(*results, strict=True):
        assert_matches(a, b.double()) if CUDA else torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture(params=[128, 4096])
def step(request, monkeypatch):
    """Columns that a row kernel takes at once: a row of 270 in several steps or in one."""
    monkeypatch.setattr(triton_rows, "BLOCK", request.param)


@pytest.mark.parametrize("narrow", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("entries", [1, 3])
def test_in_place_row_gradient(step, narrow, entropy, entries):
    """Over the logits, moved and narrowed, it has the bits of one written elsewhere, and nothing else is touched."""
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

    def into(given, out, source=None):
        row_gradient(given, out, index, bias, scale, statistics, grad, grad_entropy=grad_entropy, source=source)

    apart = torch.full((rows + 2, vocab + 9), 7.0, dtype=narrow, device=DEVICE)
    into(logits, apart[1 : rows + 1, 4 : 4 + vocab])
    want = apart[1 : rows + 1, 4 : 4 + vocab]
    assert (apart[[0, -1]] == 7).all()
    assert (apart[:, :4] == 7).all()
    assert (apart[:, 4 + vocab :] == 7).all()
    assert (want[dead] == 0).all()

    z = ((logits + bias) * scale[:, None]).double()
    scores, p = z.log_softmax(1), z.softmax(1)
    exact = -grad.double().sum(1, keepdim=True) * p
    exact.scatter_add_(1, index, grad.double())
    if entropy:
        mean = -(p * scores).sum(1, keepdim=True)
        exact -= grad_entropy.double()[:, None] * p * (scores + mean)
    assert_matches(want, exact * scale.double()[:, None])

    before = memory.clone()
    same_rows = memory.clone()
    into(same_rows[:rows, :vocab], products.narrow_rows(same_rows, rows, vocab, narrow))
    assert torch.equal(products.narrow_rows(same_rows, rows, vocab, narrow), want)
    assert torch.equal(same_rows[rows], before[rows])
    assert torch.equal(same_rows[:, vocab:], before[:, vocab:])
    moved = memory.clone()
    into(moved[:rows, :vocab], products.narrow_rows(moved, len(source), vocab, narrow), source)
    assert torch.equal(products.narrow_rows(moved, len(source), vocab, narrow), want[source])
    assert torch.equal(moved[len(source) :], before[len(source) :])


def test_a_row_without_gradient_becomes_zero_unread():
    logits = torch.full((2, 40), math.nan, device=DEVICE)
    index = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    ones, zeros = torch.ones(2, device=DEVICE), torch.zeros(2, 1, device=DEVICE)
    statistics = RowStatistics(ones, ones, ones)
    row_gradient(logits, logits, index, None, ones, statistics, zeros, grad_entropy=zeros[:, 0])
    assert (logits == 0).all()
