"""prefix_decode_attention on Triton against a loop over rows and heads in fp64."""

import itertools
import random

import pytest
import torch
from test_prefix_decode_attention import naive
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import CUDA, DEVICE, HALF, Counter, Launches, error_of

from videor1_kernels import DecodeLayout, chosen_backend, last_backend, prefix_decode_attention
from videor1_kernels.prefix_attention import triton_decode
from videor1_kernels.prefix_attention.triton import Block
from videor1_kernels.testing import assert_matches, assert_no_worse, poisoned_memory

DTYPES = HALF if CUDA else [torch.float32, *HALF]  # in fp32 this kernel runs in the interpreter only
DTYPE = DTYPES[0]
OP = "prefix_decode_attention"

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on the padding of interpreted kernels


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks, and several parts of a prefix and of a suffix, at lengths that the interpreter gets through."""
    monkeypatch.setattr(triton_decode, "INTERPRETED", Block(16, 16, 4, 1))
    monkeypatch.setattr(triton_decode, "INTERPRETED_PROGRAMS", 24)


class Case:
    """Rows that share prefixes, in memory that holds NaN wherever the operation must not read.

    groups: (prefix length, rows) each; ``scattered``: the rows in a mixed order, prefixes apart from each other, and
    suffixes in slots of their own with free slots between.
    """

    def __init__(self, groups, lengths, capacity, heads=(4, 2), dim=16, dtype=DTYPE, *, scattered=False, seed=0):
        order = random.Random(seed)
        torch.manual_seed(seed)
        self.row_group = [group for group, (_, rows) in enumerate(groups) for _ in range(rows)]
        rows, tokens = len(self.row_group), [length for length, _ in groups]
        assert len(lengths) == rows
        if scattered:
            order.shuffle(self.row_group)
        gap = 3 if scattered else 0
        self.starts = [sum(tokens[:i]) + gap * (i + 1) for i in range(len(tokens))]
        self.prefix = [slice(start, start + length) for start, length in zip(self.starts, tokens, strict=True)]
        self.slots = order.sample(range(2 * rows + 1), rows) if scattered else list(range(rows))
        slots = 2 * rows + 1 if scattered else rows
        self.cu = torch.tensor([0, *tokens], dtype=torch.int32, device=DEVICE).cumsum(0)
        self.q = torch.randn(rows, heads[0], dim).to(DEVICE, dtype)
        pool = sum(tokens) + gap * (len(tokens) + 1)
        self.pk, self.pv = (torch.full((pool, heads[1], dim), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
        for group in sorted(set(self.row_group)):
            for x in (self.pk, self.pv):
                x[self.prefix[group]] = torch.randn(tokens[group], heads[1], dim).to(DEVICE, dtype)
        self.clean = [torch.randn(slots, capacity, heads[1], dim).to(DEVICE, dtype) for _ in range(2)]
        self.layout = DecodeLayout(
            self.cu,
            torch.tensor(self.row_group, dtype=torch.int64, device=DEVICE),
            torch.tensor(self.starts, device=DEVICE) if scattered else None,
            torch.tensor(self.slots, device=DEVICE) if scattered else None,
        )
        self.set_lengths(lengths)

    def set_lengths(self, lengths):
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device=DEVICE)
        self.sk, self.sv = (torch.full_like(x, torch.nan) for x in self.clean)
        for slot, length in zip(self.slots, lengths, strict=True):
            for x, clean in zip((self.sk, self.sv), self.clean, strict=True):
                x[slot, :length] = clean[slot, :length]

    def __call__(self, **options):
        options = {"suffix_lengths": self.lengths, "layout": self.layout, "backend": "triton"} | options
        out = prefix_decode_attention(self.q, self.pk, self.pv, self.sk, self.sv, **options)
        assert last_backend(OP) == options["backend"]
        return out

    def exact(self, dtype=torch.float64, scale=None):
        """The loop, on the prefixes and suffixes taken out of their memory."""
        tokens = [torch.cat([x[own] for own in self.prefix]).to("cpu", dtype) for x in (self.pk, self.pv)]
        suffixes = [x[self.slots].to("cpu", dtype) for x in (self.sk, self.sv)]
        q, lengths, group = self.q.to("cpu", dtype), self.lengths.tolist(), self.row_group
        return naive(q, *tokens, *suffixes, lengths, self.cu.tolist(), group, scale).to(DEVICE)


def ragged(rows, capacity, seed=1):
    return [random.Random(seed + i).randint(1, capacity) for i in range(rows)]


CASES = {
    "one row": ([(1, 1)], [1], 1),
    "one group": ([(37, 3)], [5, 1, 20], 20),
    "ragged groups": ([(37, 3), (1, 1), (16, 2)], ragged(6, 40), 40),
    "a row more than a tile": ([(33, 9), (17, 8)], ragged(17, 18), 18),
    "three tiles of a prefix": ([(20, 20)], ragged(20, 7), 7, (1, 1)),
    "ends on the borders of blocks and parts": ([(64, 2), (32, 1), (16, 1), (48, 2)], [16, 32, 64, 48, 1, 80], 80),
    "a prefix nobody reads": ([(9, 1), (20, 0), (5, 2)], [3, 2, 4], 4),
    "much spare capacity": ([(20, 2)], [2, 19], 300),
    "long": ([(300, 2), (290, 1)], [300, 1, 257], 300),
}


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_naive_fp64(name, scattered):
    case = Case(*CASES[name], scattered=scattered)
    out = case()
    assert out.dtype == DTYPE
    assert_matches(out, case.exact())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    case = Case(*CASES["ragged groups"], dtype=dtype, scattered=True)
    assert_matches(case(), case.exact())


@pytest.mark.parametrize(
    ("heads", "dim"), [((4, 4), 16), ((7, 1), 20), ((6, 2), 64), ((3, 1), 80), ((2, 1), 128), ((20, 1), 3), ((1, 1), 1)]
)
def test_heads_and_head_dims(heads, dim):
    """Of 20 query heads a key head, a row takes two blocks of 16; of 3, four rows share one."""
    case = Case([(20, 5), (17, 1)], [20, 1, 17, 16, 9, 3], 20, heads, dim, scattered=True)
    assert_matches(case(), case.exact())


@pytest.mark.parametrize(("name", "least"), [("long", 8), ("ragged groups", 5), ("a row more than a tile", 2)])
def test_the_cases_are_split(monkeypatch, name, least):
    """Else the tests above would merge little: with ``least`` parts of a row."""
    case = Case(*CASES[name])
    monkeypatch.setattr(triton_decode, "prefix_decode", Launches())
    case()
    ((_, _, splits, _),) = triton_decode._workspaces[case.layout]
    assert splits >= least


def test_more_parts_than_are_merged_at_a_time(monkeypatch):
    monkeypatch.setattr(triton_decode, "INTERPRETED_PROGRAMS", 400)
    case = Case([(300, 2)], [300, 250], 300, (2, 1))
    case.pk = case.pk * 3  # parts of very different weight
    assert_matches(case(), case.exact())
    ((_, _, splits, _),) = triton_decode._workspaces[case.layout]
    assert splits > 2 * triton_decode.MERGED_SPLITS


def test_splits():
    """On 132 multiprocessors: 12 rows of a 7B model fill them about twice, 192 rows need no parts."""
    assert triton_decode.splits_for(12, 4, 2 * 1224, 768, 264, 32) == (7, 5)
    assert 4 * (2 * 7 + 12 * 5) == 296
    assert triton_decode.splits_for(192, 4, 32 * 1224, 768, 264, 32) == (1, 1)
    assert triton_decode.splits_for(1, 1, 1, 1, 264, 32) == (1, 1)
    assert triton_decode.splits_for(1, 4, 10**6, 10**6, 264, 32) == (32, 32)


def test_scale_and_large_scores():
    for larger in ("pk", "sk", "q"):  # either part may hold the maximum, far above the other
        case = Case(*CASES["ragged groups"])
        setattr(case, larger, getattr(case, larger) * 80)
        assert_matches(case(), case.exact())
    assert_matches(case(scale=0.7), case.exact(scale=0.7))


@pytest.mark.parametrize("dtype", HALF)
def test_no_worse_than_plain_torch_at_its_dtype(dtype):
    case = Case(*CASES["long"], dim=32, dtype=dtype)
    terms = 32 + 300 + 300  # of a score, and keys of the longest row
    assert_no_worse(case(), case.exact(dtype), case.exact(), terms=terms)


@pytest.mark.parametrize("other", [7.0, torch.inf])
def test_nothing_past_a_length_is_read(other):
    """The memory of every case holds NaN there; here it changes to other values, and the result to no other bit."""
    case = Case(*CASES["ragged groups"], scattered=True)
    clean = case()
    for x in (case.pk, case.pv, case.sk, case.sv):
        x[x.isnan()] = other
    assert torch.equal(case(), clean)


def test_same_bits_again_in_poisoned_memory_and_under_autocast():
    case = Case(*CASES["ragged groups"], scattered=True)
    first = case()
    assert torch.equal(case(), first)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(case(), first)
    with poisoned_memory():
        case = Case(*CASES["ragged groups"], scattered=True)  # of a workspace of its own
        assert torch.equal(case(), first)


def test_one_workspace_serves_all_lengths():
    """What a call left behind is nothing to the next: neither parts that it no longer has, nor counters."""
    groups, _, capacity = CASES["long"]
    case = Case(groups, [300, 299, 300], capacity)
    for lengths in ([300, 299, 300], [1, 2, 3], [17, 300, 16], [300, 299, 300]):
        case.set_lengths(lengths)
        assert_matches(case(), case.exact())
        (space,) = triton_decode._workspaces[case.layout].values()
        assert not space.arrived.any()


def test_a_workspace_lives_as_long_as_its_layout():
    case = Case(*CASES["one group"])
    case()
    count = len(triton_decode._workspaces)
    del case
    assert len(triton_decode._workspaces) == count - 1


def test_a_row_depends_on_its_own_keys_alone():
    """The same bits for a row in another order, beside other suffixes, and beside rows of another prefix."""
    case = Case(*CASES["ragged groups"], scattered=True)
    out = case()
    order = [4, 2, 5, 0, 3, 1]
    layout = DecodeLayout(
        case.cu,
        torch.tensor(case.row_group, device=DEVICE)[order],
        torch.tensor(case.starts, device=DEVICE),
        torch.tensor(case.slots, device=DEVICE)[order],
    )
    q, lengths = case.q[order], case.lengths[order]
    moved = prefix_decode_attention(
        q, case.pk, case.pv, case.sk, case.sv, suffix_lengths=lengths, layout=layout, backend="triton"
    )
    assert torch.equal(moved, out[order])
    lengths = case.lengths.tolist()
    case.set_lengths([*lengths[:3], 40, 40, 40])
    assert torch.equal(case()[:3], out[:3])


def test_a_layout_that_was_copied_into():
    """As CUDA graphs use it: indices that the kernel reads are another batch's, everything else stays."""
    case = Case(*CASES["ragged groups"], scattered=True)
    held = Case([(5, 6), (9, 0)], [1] * 6, 1, scattered=True).layout.clone()
    want = case()
    held.copy_(case.layout)
    assert torch.equal(case(layout=held), want)


def test_lengths_out_of_range_stay_inside():
    case = Case(*CASES["one group"])
    case.set_lengths([1, 20, 20])
    clean = case()
    case.lengths = torch.tensor([0, 21, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    assert torch.equal(case(), clean)
    case.lengths = torch.tensor([-5, 10**12, 20], device=DEVICE)
    assert torch.equal(case(), clean)


def test_views():
    """Caches as a model may keep them: heads before tokens, a layer of several, values of every other place."""
    case = Case(*CASES["ragged groups"], scattered=True)
    out = case()

    def heads_first(x):
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)

    def layer(x):
        return torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0]

    def spread(x):
        return x.repeat_interleave(2, -1)[..., ::2]

    def unaligned(x):
        return torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape)

    before = [case.q, case.pk, case.pv, case.sk, case.sv]
    for view in (heads_first, layer, spread, unaligned):
        case.q, case.pk, case.pv, case.sk, case.sv = (view(x) for x in before)
        assert_matches(case(), out.double())
    case.lengths = torch.stack([case.lengths, case.lengths * 0], 1)[:, 0]
    assert_matches(case(), out.double())


def test_int32_and_int64_lengths():
    case = Case(*CASES["ragged groups"])
    assert torch.equal(case(), case(suffix_lengths=case.lengths.int()))


def test_no_rows():
    case = Case([(3, 0), (2, 0)], [], 4)
    assert case().shape == (0, 4, 16)


class Operations(TorchDispatchMode):
    """Names of the torch operations in the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_one_launch_and_nothing_else(monkeypatch):
    """Past the first call of a layout, a call allocates its result and launches once: no other operation of torch's, so
    no kernel, copy or wait. Its grid does not depend on the lengths."""
    case = Case(*CASES["ragged groups"], scattered=True)
    case()
    launches = Launches()
    monkeypatch.setattr(triton_decode, "prefix_decode", launches)
    for lengths in (case.lengths, torch.ones_like(case.lengths)):
        with Operations() as operations:
            case(suffix_lengths=lengths)
        assert operations.names == ["aten.new_empty.default"]
    assert len(launches.grids) == 2
    assert launches.grids[0] == launches.grids[1]


def shuffle_programs(monkeypatch, seed):
    """The interpreter runs programs one after the other: in another order, others are the last to arrive."""
    from triton.runtime.interpreter import interpreter_builder

    place, orders = interpreter_builder.set_grid_idx, {}

    def moved(*index):
        dims = tuple(interpreter_builder.grid_dim)
        if dims not in orders:
            programs = list(itertools.product(*map(range, dims)))
            orders[dims] = dict(zip(programs, random.Random(seed).sample(programs, len(programs)), strict=True))
        place(*orders[dims][index])

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", moved)


@pytest.mark.parametrize("seed", range(4))
def test_same_bits_whatever_the_order_of_arrival(monkeypatch, seed):
    case = Case([(37, 9), (50, 2)], ragged(11, 60), 60, (3, 1), scattered=True)
    want = case()
    for _ in range(50 if CUDA else 1):  # a card has an order of its own each time
        if not CUDA:
            shuffle_programs(monkeypatch, seed)
            monkeypatch.setattr(triton_decode, "_merge", merge := Counter(triton_decode._merge))
        assert torch.equal(case(), want)
        assert CUDA or merge.calls == 11  # of each row and key head once: when all its parts are there
    (space,) = triton_decode._workspaces[case.layout].values()
    assert not space.arrived.any()


if CUDA:

    def test_a_graph_serves_other_lengths():
        groups, lengths, capacity = CASES["long"]
        case = Case(groups, lengths, capacity, scattered=True)
        case()
        fixed = case.sk, case.sv, case.lengths
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = case()
        for changed in ([1, 2, 3], [300, 299, 1], lengths):
            case.set_lengths(changed)
            for x, new in zip(fixed, (case.sk, case.sv, case.lengths), strict=True):
                x.copy_(new)
            out.fill_(torch.nan)
            graph.replay()
            assert_matches(out, case.exact())


def test_what_the_kernel_does_not_take():
    case = Case([(3, 2)], [1, 2], 2, dim=144)
    message = error_of(case)
    assert "q: expected a head dim of at most 128 for the triton backend, got 144" in message
    case(backend="reference")
    case = Case([(3, 2)], [1, 2], 2)
    case.q.requires_grad_()
    assert "expected none that requires a gradient for the triton backend (torch.no_grad), got one" in error_of(case)
    with torch.no_grad():
        case()
    case = Case([(3, 2)], [0, 0], 0)
    assert "suffix_k: expected room for the new token, C of 1 or more, got 0" in error_of(case)


def test_auto_takes_the_reference_where_a_gradient_is_wanted_or_the_head_is_large():
    for case in (Case([(3, 2)], [1, 2], 2), Case([(3, 2)], [1, 2], 2, dim=144)):
        inputs = case.q, *(x.nan_to_num() for x in (case.pk, case.pv, case.sk, case.sv))
        options = {"suffix_lengths": case.lengths, "layout": case.layout}
        prefix_decode_attention(inputs[0].requires_grad_(), *inputs[1:], **options).sum().backward()
        assert last_backend(OP) == "reference"
        assert case.q.grad.isfinite().all()
        with torch.no_grad():
            prefix_decode_attention(*inputs, **options)
        expected = "reference" if CUDA and case.q.shape[2] > 128 else chosen_backend(OP, DEVICE, dtype=DTYPE)
        assert last_backend(OP) == expected
        assert (expected == "triton") == (CUDA and case.q.shape[2] <= 128)


def test_fp32_on_a_card_takes_the_reference():
    assert chosen_backend(OP, "cuda", dtype=torch.float32) == "reference"
    assert chosen_backend(OP, "cuda", dtype=torch.bfloat16) == "triton"
    message = error_of(lambda: chosen_backend(OP, "cuda", "triton", torch.float32))
    assert "its kernels take bf16 and fp16 inputs, and an input is fp32" in message


def test_mixed_dtypes_are_fp32():
    case = Case([(17, 2)], [3, 5], 5, dtype=torch.float16)
    case.sk = case.sk.float()
    if CUDA:
        assert "an input is fp32" in error_of(case)
    else:
        assert_matches(case(), case.exact())
    assert_matches(case(backend="reference"), case.exact())
