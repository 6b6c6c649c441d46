"""prefix_decode_attention against a loop over rows and heads, in fp64."""

import pytest
import torch

from videor1_kernels import DecodeLayout, PrefixLayout, prefix_attention, prefix_decode_attention
from videor1_kernels.testing import assert_matches, assert_no_worse, poison_padding, poisoned_memory, rounding


def naive(q, prefix_k, prefix_v, suffix_k, suffix_v, suffix_lengths, cu_prefix, row_group, scale=None):
    repeat = q.shape[1] // prefix_k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        group = int(row_group[row])
        own = slice(int(cu_prefix[group]), int(cu_prefix[group + 1]))
        n = int(suffix_lengths[row])
        for head in range(q.shape[1]):
            keys = torch.cat([prefix_k[own, head // repeat], suffix_k[row, :n, head // repeat]])
            values = torch.cat([prefix_v[own, head // repeat], suffix_v[row, :n, head // repeat]])
            out[row, head] = (keys @ q[row, head] * scale).softmax(0) @ values
    return out


def make(prefixes, row_group, suffix_lengths, capacity, heads=(4, 2), dim=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    rows, total = len(row_group), sum(prefixes)
    tensors = (
        normal(rows, heads[0], dim),
        normal(total, heads[1], dim),
        normal(total, heads[1], dim),
        normal(rows, capacity, heads[1], dim),
        normal(rows, capacity, heads[1], dim),
    )
    index = {
        "suffix_lengths": torch.tensor(suffix_lengths, dtype=torch.int64),
        "cu_prefix": torch.tensor([0, *torch.tensor(prefixes).cumsum(0).tolist()], dtype=torch.int32),
        "row_group": torch.tensor(row_group, dtype=torch.int64),
    }
    return tensors, index


CASES = {
    "one row": ([3], [0], [1], 1),
    "rows in order": ([5, 2], [0, 0, 1, 1], [1, 4, 2, 3], 6),
    "rows scattered": ([5, 1, 9], [2, 0, 2, 1, 0, 2], [3, 1, 7, 7, 2, 5], 7),
    "a prefix nobody reads": ([4, 6, 2], [2, 0, 2], [1, 2, 3], 4),
    "spare capacity": ([4], [0, 0], [2, 3], 50),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("heads", "scale"), [((4, 2), None), ((3, 3), None), ((4, 1), 0.2)])
def test_equals_naive_fp64(name, heads, scale):
    tensors, index = make(*CASES[name], heads=heads)
    ours = prefix_decode_attention(*tensors, **index, scale=scale)
    assert_matches(ours, naive(*tensors, **index, scale=scale))
    layout = DecodeLayout(index["cu_prefix"], index["row_group"])
    again = prefix_decode_attention(*tensors, suffix_lengths=index["suffix_lengths"], layout=layout, scale=scale)
    assert torch.equal(ours, again)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_entries_past_the_suffix_never_leak(poison):
    (q, pk, pv, sk, sv), index = make(*CASES["rows scattered"])
    clean = prefix_decode_attention(q, pk, pv, sk, sv, **index)
    sk, sv = (poison_padding(x, index["suffix_lengths"], poison) for x in (sk, sv))
    assert sk.isfinite().logical_not().any()
    assert torch.equal(prefix_decode_attention(q, pk, pv, sk, sv, **index), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_against_the_oracle(dtype):
    tensors, index = make(*CASES["rows scattered"], dim=32, dtype=dtype)
    ours, plain = prefix_decode_attention(*tensors, **index), naive(*tensors, **index)
    oracle = naive(*(x.double() for x in tensors), **index)
    assert ours.dtype == dtype
    assert_matches(ours, oracle)
    assert_no_worse(ours, plain, oracle, terms=32 + 9 + 7)  # of a score; keys of the longest row


def test_large_scores_do_not_overflow():
    (q, pk, pv, sk, sv), index = make(*CASES["rows in order"], dtype=torch.float32)
    for far in (pk, sk):  # either part may hold the maximum, hundreds above the other
        keys = [x * 1000 if x is far else x for x in (pk, sk)]
        ours = prefix_decode_attention(q, keys[0], pv, keys[1], sv, **index)
        oracle = naive(*(x.double() for x in (q, keys[0], pv, keys[1], sv)), **index)
        # A score errs by its own size, and its probability by as much relative to itself.
        scores = max(x.abs().max().item() for x in keys) * q.abs().sum(-1).max().item() * q.shape[2] ** -0.5
        bound = rounding(q.shape[2], scores)
        torch.testing.assert_close(ours.double(), oracle, rtol=bound, atol=bound * oracle.abs().max().item())


def test_equals_the_last_position_of_prefix_attention():
    """Decode and training agree: the step that adds a completion's last token gives that token's packed output."""
    layout = PrefixLayout([5, 3], [[4, 2], [3]])
    torch.manual_seed(0)
    q = torch.randn(layout.total_tokens, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(layout.total_tokens, 2, 8, dtype=torch.float64) for _ in range(2))
    lengths = layout.cu_completions.diff()
    ends = layout.completion_index[layout.cu_completions[1:].long() - 1]
    suffix_k, suffix_v = (
        torch.nn.utils.rnn.pad_sequence(x[layout.completion_index].split(lengths.tolist()), batch_first=True)
        for x in (k, v)
    )
    out = prefix_decode_attention(
        q[ends],
        k[layout.prompt_index],
        v[layout.prompt_index],
        suffix_k,
        suffix_v,
        suffix_lengths=lengths,
        cu_prefix=torch.tensor([0, 5, 8]),
        row_group=torch.tensor([0, 0, 1]),
    )
    assert_matches(out, prefix_attention(q, k, v, layout)[ends])


def test_row_order_does_not_matter():
    (q, pk, pv, sk, sv), index = make(*CASES["rows scattered"])
    order = torch.tensor([5, 3, 0, 1, 4, 2])
    moved = index | {"suffix_lengths": index["suffix_lengths"][order], "row_group": index["row_group"][order]}
    out = prefix_decode_attention(q, pk, pv, sk, sv, **index)
    assert_matches(prefix_decode_attention(q[order], pk, pv, sk[order], sv[order], **moved), out[order])


def test_gradcheck():
    tensors, index = make([2, 1], [1, 0, 1], [1, 2, 2], 3, heads=(2, 1), dim=2)
    inputs = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: prefix_decode_attention(*x, **index), inputs)


def test_no_rows():
    tensors, index = make([3, 2], [], [], 4)
    assert prefix_decode_attention(*tensors, **index).shape == (0, 4, 8)


def test_same_bits_in_poisoned_memory_and_under_autocast():
    tensors, index = make(*CASES["rows scattered"], dtype=torch.float32)
    first = prefix_decode_attention(*tensors, **index)
    with poisoned_memory():
        assert torch.equal(prefix_decode_attention(*tensors, **index), first)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prefix_decode_attention(*tensors, **index), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suffix_lengths": torch.tensor([1, 0, 2, 3])}, "suffix_lengths: expected values from 1 to C = 6, got 0 to 3"),
        ({"suffix_lengths": torch.tensor([1, 7, 2, 3])}, "suffix_lengths: expected values from 1 to C = 6, got 1 to 7"),
        ({"suffix_lengths": torch.tensor([1, 2])}, r"suffix_lengths: expected shape \[4\], got \[2\]"),
        ({"row_group": torch.tensor([0, 0, 1, 2])}, r"row_group: expected values in \[0, 2\), got 1 outside"),
        ({"row_group": torch.tensor([0, 0, 1])}, r"row_group: expected shape \[4\], got \[3\]"),
        ({"cu_prefix": torch.tensor([0, 5, 5, 7])}, "cu_prefix: expected steps of 1 or more, got 5 then 5"),
        ({"cu_prefix": torch.tensor([0, 5, 8])}, r"prefix_k: expected shape \[8, 2, 8\], got \[7, 2, 8\]"),
        ({"cu_prefix": torch.tensor([1, 5, 7])}, "cu_prefix: expected the first entry 0 and the last 7, got 1 and 7"),
        ({"cu_prefix": None}, "prefixes: expected cu_prefix and row_group, or layout, got row_group"),
        ({"cu_prefix": None, "row_group": None}, "prefixes: .* got none of them"),
        ({"layout": DecodeLayout(torch.tensor([0, 7]), torch.zeros(4).long())}, "cu_prefix and row_group and layout"),
        ({"backend": "native"}, "q: expected a head dim that 16 divides for the native backend, got 8"),
    ],
)
def test_errors(change, message):
    tensors, index = make(*CASES["rows in order"])
    with pytest.raises(ValueError, match=f"prefix_decode_attention: .*{message}"):
        prefix_decode_attention(*tensors, **(index | change))


def scattered(tensors, index, prefix_starts, slots, gap=float("nan")):
    """The same keys and values placed anywhere in larger memory, what lies between them poisoned."""
    q, pk, pv, sk, sv = tensors
    lengths = index["cu_prefix"].diff().tolist()
    pool = max(start + length for start, length in zip(prefix_starts, lengths, strict=True)) + 2
    prefixes = [x.new_full((pool, *x.shape[1:]), gap) for x in (pk, pv)]
    suffixes = [x.new_full((max(slots) + 2, *x.shape[1:]), gap) for x in (sk, sv)]
    bounds = index["cu_prefix"].tolist()
    for new, old in zip(prefixes, (pk, pv), strict=True):
        for start, begin, length in zip(prefix_starts, bounds, lengths, strict=False):
            new[start : start + length] = old[begin : begin + length]
    for new, old in zip(suffixes, (sk, sv), strict=True):
        new[slots] = old
    layout = DecodeLayout(index["cu_prefix"], index["row_group"], torch.tensor(prefix_starts), torch.tensor(slots))
    return (q, *prefixes, *suffixes), layout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "starts", "slots"),
    [
        ("rows scattered", [12, 0, 2], [5, 1, 8, 0, 3, 4]),
        ("rows in order", [0, 5], [0, 1, 2, 3]),
        ("rows in order", [3, 0], [3, 2, 1, 0]),
        ("spare capacity", [1], [1, 0]),
        ("one row", [0], [2]),
    ],
)
def test_prefixes_and_suffixes_anywhere_in_memory(name, starts, slots, dtype):
    tensors, index = make(*CASES[name], dim=16, dtype=dtype)
    expected = naive(*(x.double() for x in tensors), **index)
    moved, layout = scattered(tensors, index, starts, slots)
    for heads_first in (False, True):  # as a cache on a CPU keeps them
        if heads_first:
            moved = (moved[0], *(x.movedim(-2, 0).contiguous().movedim(0, -2) for x in moved[1:]))
        out = prefix_decode_attention(*moved, suffix_lengths=index["suffix_lengths"], layout=layout)
        assert_matches(out, expected)


def test_memory_too_small_for_the_layout():
    tensors, index = make(*CASES["rows in order"])
    (q, pk, pv, sk, sv), layout = scattered(tensors, index, [0, 5], [0, 1, 2, 6])
    with pytest.raises(ValueError, match="prefix_k: expected at least the 7 tokens of the layout, got 6"):
        prefix_decode_attention(q, pk[:6], pv[:6], sk, sv, suffix_lengths=index["suffix_lengths"], layout=layout)
    with pytest.raises(ValueError, match="suffix_k: expected at least the 7 slots of the layout, got 6"):
        prefix_decode_attention(q, pk, pv, sk[:6], sv[:6], suffix_lengths=index["suffix_lengths"], layout=layout)
    for change, message in (
        ({"prefix_starts": torch.tensor([-1, 2])}, "prefix_starts"),
        ({"suffix_slots": torch.tensor([0, 1, -2, 3])}, "suffix_slots"),
    ):
        with pytest.raises(ValueError, match=f"{message}: expected 0 or more, got -"):
            DecodeLayout(index["cu_prefix"], index["row_group"], **change)
