"""sample_tokens against an enumeration of the truncated distribution in fp64."""

import math

import pytest
import torch
from sampling_cases import ALMOST_ONE, EDGES, SETTINGS, check, chi_square_p, hard_logits, oracle, without_distribution
from torch.utils._python_dispatch import TorchDispatchMode

from videor1_kernels import last_backend, sample_tokens
from videor1_kernels.testing import poisoned_memory, rounding

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def rows_of(name, vocabulary, seed=0, dtype=torch.float32):
    """A row for each of the numbers of interest and for some at random: (logits [R, V], uniform [R])."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.cat([torch.tensor(EDGES), torch.rand(24, generator=generator)])
    return hard_logits(vocabulary, seed)[name].to(dtype).expand(len(uniform), -1), uniform


def grid(count):
    """Evenly spaced numbers in (0, 1): the share of them in an interval is its length, to within one."""
    return (torch.arange(count) + 0.5) / count


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("name", hard_logits(8))
def test_tokens_and_log_probs(name, options):
    checked = 0
    for vocabulary, banned in ((61, None), (8, torch.tensor([3])), (300, torch.tensor([299, 0, 150, 0]))):
        logits, uniform = rows_of(name, vocabulary)
        with poisoned_memory():
            tokens, logp = sample_tokens(logits, uniform, banned=banned, **options)
        assert last_backend("sample_tokens") == "reference"
        if name == "one finite" and banned is not None and vocabulary // 2 in banned:
            assert not torch.isin(tokens, banned).any()  # nothing that may be drawn has a probability
            continue
        checked += len(logits) - check(logits, uniform, tokens, logp, banned=banned, **options)
    assert checked >= 56


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_dtypes(dtype, options):
    generator = torch.Generator().manual_seed(1)
    logits, uniform = (3 * torch.randn(40, 77, generator=generator)).to(dtype), torch.rand(40, generator=generator)
    for numbers in (uniform, uniform.double()):
        tokens, logp = sample_tokens(logits, numbers, **options)
        assert logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert check(logits, numbers, tokens, logp, **options) <= 2
    exact = torch.stack([oracle(row, **options).logp for row in logits]).gather(1, tokens[:, None])[:, 0]
    largest = logits.abs().max().item() / (options.get("temperature") or 1.0)
    torch.testing.assert_close(logp.double(), exact, rtol=0, atol=rounding(77, 2 * largest, dtype))


def test_an_oracle_by_hand():
    """Of probabilities .1 .4 .2 .3: what stays, and where its cumulative sums in order of id are."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    cases = [
        ({}, [0.1, 0.5, 0.7, 1.0], None),
        ({"top_k": 2}, [0, 4 / 7, 4 / 7, 1], None),
        ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 4 / 7, 1], None),  # 4/9 + 3/9 of the three is enough
        ({"top_p": 0.65}, [0, 4 / 7, 4 / 7, 1], None),
        ({"top_p": 0.75}, [0, 4 / 9, 6 / 9, 1], None),
        ({"top_p": 0.39}, [0, 1, 1, 1], None),
        ({"temperature": 0.5}, [1 / 30, 17 / 30, 21 / 30, 1], None),  # squares
        ({"temperature": 0}, [0, 1, 1, 1], None),
        ({"temperature": 0}, [0, 0, 0, 1], [1]),
        ({}, [1 / 6, 1 / 6, 3 / 6, 1], [1]),
        ({"top_k": 2}, [0, 0, 2 / 5, 1], [1]),
        ({"top_p": 0.45}, [0, 0, 0, 1], [1]),
    ]
    for options, ends, banned in cases:
        ids = None if banned is None else torch.tensor(banned)
        torch.testing.assert_close(
            oracle(logits, banned=ids, **options).ends, torch.tensor(ends).double(), atol=1e-7, rtol=0
        )
        for uniform in grid(96).tolist():
            token, logp = sample_tokens(logits[None], torch.tensor([uniform]), banned=ids, **options)
            assert token.item() == next(i for i, end in enumerate(ends) if end > uniform)
            p = logits.exp()[token.item()].item()
            if options.get("temperature") == 0.5:
                p = p**2 / 0.3
            assert logp.item() == pytest.approx(math.log(p), abs=rounding(4, 5.0))


def test_order_of_ids_not_of_likelihood():
    logits = torch.tensor([[0.0, 1.0, 5.0, 2.0]]).expand(4, -1)
    probabilities = logits[0].softmax(0)
    ends = probabilities.cumsum(0)
    tokens, _ = sample_tokens(logits, ends - probabilities / 2)
    assert tokens.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 16, 100, 152064])
def test_equal_tokens(count):
    """k of them, or the least number that reaches top_p exactly, and those of the lowest ids."""
    logits = torch.full((1, count + 3), 1.5)
    banned = torch.tensor([0, 2, count + 2])
    ids = [token for token in range(count + 3) if token not in banned.tolist()]
    for tenths in range(1, 10):
        kept = max(-(-count * tenths // 10), 1)
        for options, number in (
            ({"top_p": tenths / 10}, kept),
            ({"top_k": kept}, kept),
            ({"top_k": kept, "top_p": 0.5}, -(-kept // 2)),
        ):
            uniform = torch.tensor([0.0, ALMOST_ONE])
            tokens, _ = sample_tokens(logits.expand(2, -1), uniform, banned=banned, **options)
            assert tokens.tolist() == [1, ids[number - 1]], options
    for dtype in DTYPES:
        tokens, logp = sample_tokens(logits.to(dtype), torch.zeros(1), banned=banned, temperature=0)
        assert tokens.tolist() == [1]
        torch.testing.assert_close(logp, torch.full_like(logp, -math.log(count + 3)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_only_rounding_keeps_from_top_p_reaches_it(dtype):
    for count in (25, 41, 49, 83):
        for kept in range(1, count):
            token, _ = sample_tokens(torch.zeros(1, count, dtype=dtype), torch.tensor([ALMOST_ONE]), top_p=kept / count)
            assert token.item() == kept - 1


def test_without_truncation_nothing_is_sorted():
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    logits, uniform, banned = torch.randn(4, 50), torch.rand(4), torch.tensor([1])
    sorting = {"sort", "argsort", "topk", "msort", "kthvalue"}
    for options in ({}, {"temperature": 0.5}, {"temperature": 0}, {"top_k": 50}, {"top_k": 99}):
        names = []
        with Operations():
            sample_tokens(logits, uniform, banned=banned, **options)
        assert not sorting & set(names), names
        assert len(names) < 45
    names = []
    with Operations():
        sample_tokens(logits, uniform, top_k=49)
    assert sorting & set(names)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 6},
        {"top_p": 0.8},
        {"top_k": 12, "top_p": 0.9},
        {"temperature": 1.8},
        {"temperature": 0.6, "top_p": 0.95},
    ],
    ids=str,
)
@pytest.mark.parametrize("banned", [None, torch.tensor([2, 30, 5])], ids=["", "banned"])
def test_draws_follow_the_distribution(options, banned):
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(40, generator=generator)
    want = oracle(logits, banned=banned, **options)
    counts = torch.zeros(40, dtype=torch.int64)
    for _ in range(10):
        uniform = torch.rand(20_000, generator=generator)
        tokens, _ = sample_tokens(logits.expand(len(uniform), -1), uniform, banned=banned, **options)
        counts += tokens.bincount(minlength=40)
    assert counts.sum() == 200_000
    assert chi_square_p(counts, want.probabilities) > 1e-4
    other = oracle(logits, banned=banned, **(options | {"temperature": options.get("temperature", 1.0) * 1.05}))
    if other.probabilities.count_nonzero() == want.probabilities.count_nonzero():
        assert chi_square_p(counts, other.probabilities) < 1e-4  # so much would be seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 33, 300, 1001])
def test_rows_do_not_know_of_each_other(vocabulary, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(37, vocabulary, generator=generator)).to(dtype)
    uniform = torch.rand(37, generator=generator)
    banned = torch.tensor([vocabulary - 1]) if vocabulary > 1 else None
    order = torch.randperm(37, generator=generator)
    for options in SETTINGS:
        tokens, logp = sample_tokens(logits, uniform, banned=banned, **options)
        alone = [sample_tokens(logits[i : i + 1], uniform[i : i + 1], banned=banned, **options) for i in range(37)]
        assert torch.equal(tokens, torch.cat([token for token, _ in alone]))
        assert torch.equal(logp, torch.cat([value for _, value in alone]))
        moved = sample_tokens(logits[order], uniform[order], banned=banned, **options)
        assert torch.equal(tokens[order], moved[0])
        assert torch.equal(logp[order], moved[1])


def test_layouts():
    logits, uniform = torch.randn(9, 70), torch.rand(9)
    banned = torch.tensor([5, 9])
    strided = torch.stack([logits, torch.zeros_like(logits)], -1)[..., 0]
    wide = torch.cat([logits, logits], 1)[:, :70]
    for options in SETTINGS:
        want = sample_tokens(logits, uniform, banned=banned, **options)
        for other in (strided, wide, logits.T.contiguous().T):
            got = sample_tokens(
                other, torch.stack([uniform, uniform], -1)[:, 0], banned=torch.tensor([5, 0, 9])[::2], **options
            )
            assert torch.equal(want[0], got[0])
            assert torch.equal(want[1], got[1])
        assert torch.equal(logits, wide)  # the inputs are as they were


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_rows_with_no_distribution(options):
    """NaN, +inf, or nothing finite: some id that is not banned, and NaN for its log-prob; other rows as ever."""
    generator = torch.Generator().manual_seed(0)
    good = torch.randn(4, 50, generator=generator)
    bad, banned = without_distribution(generator)
    uniform = torch.rand(9, generator=generator)
    uniform[4:8] = torch.tensor([0.0, ALMOST_ONE, 0.3, 0.7])
    tokens, logp = sample_tokens(torch.cat([good, bad]), uniform, banned=banned, **options)
    assert not torch.isin(tokens, banned).any()
    assert ((tokens >= 0) & (tokens < 50)).all()
    assert logp[4:].isnan().all()
    alone = sample_tokens(good, uniform[:4], banned=banned, **options)
    assert torch.equal(tokens[:4], alone[0])
    assert torch.equal(logp[:4], alone[1])
    assert tokens[6] == 9  # infinitely likelier than any other
    finite = bad[4:].clone()
    finite[0, 0] = 0.0
    assert tokens[8] == sample_tokens(finite, uniform[8:], banned=banned, **options)[0]


def test_a_banned_token_may_outweigh_all_others():
    logits = torch.tensor([[500.0, 1.0, 3.0, 2.0, 1e30, -torch.inf]]).expand(64, -1)
    uniform = grid(64)
    for options in ({}, {"temperature": 0.3}, {"top_p": 0.8}, {"top_k": 2}):
        for banned, crest in (([0, 4], 1e30), ([4], 1e30)):
            tokens, logp = sample_tokens(logits, uniform, banned=torch.tensor(banned), **options)
            want = oracle(logits[0], banned=torch.tensor(banned), **options)
            assert all(want.accepts(token, u) for token, u in zip(tokens.tolist(), uniform.tolist(), strict=True))
            assert (logp == -torch.tensor(crest) / options.get("temperature", 1.0)).all()
    logits = logits[:, :4]
    tokens, logp = sample_tokens(logits, uniform, banned=torch.tensor([0]))
    assert check(logits, uniform, tokens, logp, banned=torch.tensor([0])) == 0
    assert set(tokens.tolist()) == {1, 2, 3}


@pytest.mark.parametrize("uniform", [-1.0, 1.0, 1.5, math.nan, math.inf, -math.inf, 1 - 2.0**-53])
def test_numbers_outside_draw_what_may_be_drawn(uniform):
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    banned = torch.tensor([0, 29])
    for options in SETTINGS:
        token, _ = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), banned=banned, **options)
        kept = oracle(logits[0], banned=banned, **options).probabilities.nonzero()[:, 0]
        assert token.item() == (kept[-1] if uniform > 0.5 and uniform < math.inf else kept[0]) or not math.isfinite(
            uniform
        )
        assert token in kept


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-6, 1e6, 1e300])
def test_extreme_temperatures(temperature):
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)).expand(200, -1)
    banned = torch.tensor([4])
    tokens, logp = sample_tokens(logits, grid(200), temperature=temperature, banned=banned)
    if temperature < 1:
        assert (tokens == oracle(logits[0], temperature=0, banned=banned).probabilities.argmax()).all()
    else:
        assert check(logits, grid(200), tokens, logp, temperature=temperature, banned=banned) == 0
        assert (tokens.bincount(minlength=20)[banned] == 0).all()
        assert tokens.unique().numel() == 19


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 50}, {"top_k": 2000, "top_p": 0.95}], ids=str)
def test_a_whole_vocabulary(options):
    generator = torch.Generator().manual_seed(0)
    banned = torch.arange(151643, 151668)
    flat, peaked = torch.randn(152064, generator=generator), 5 * torch.randn(152064, generator=generator)
    for logits in (flat, peaked):
        uniform = torch.cat([torch.tensor(EDGES), torch.rand(4, generator=generator)])
        rows = logits.expand(len(uniform), -1)
        tokens, logp = sample_tokens(rows, uniform, banned=banned, **options)
        assert check(rows, uniform, tokens, logp, banned=banned, **options) == 0


def test_no_rows_one_token_no_gradient():
    tokens, logp = sample_tokens(torch.zeros(0, 5), torch.zeros(0), top_p=0.5, top_k=2)
    assert tokens.shape == logp.shape == (0,)
    for options in SETTINGS:
        tokens, logp = sample_tokens(torch.randn(3, 1), torch.rand(3), **options)
        assert tokens.tolist() == logp.tolist() == [0, 0, 0]
    logits = torch.randn(3, 9, requires_grad=True)
    plain = sample_tokens(logits.detach(), torch.full((3,), 0.5), top_p=0.9)
    assert not sample_tokens(logits, torch.full((3,), 0.5), top_p=0.9)[1].requires_grad
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        got = sample_tokens(logits, torch.full((3,), 0.5), top_p=0.9, banned=torch.tensor([], dtype=torch.int64))
    assert torch.equal(got[0], plain[0])
    assert torch.equal(got[1], plain[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4)}, r"logits: expected shape \[R, V\], got \[4\]"),
        ({"logits": torch.zeros(2, 0)}, r"logits: expected at least one token, got \[2, 0\]"),
        ({"logits": torch.zeros(2, 4).long()}, "logits: expected dtype float64, float32, bfloat16 or float16, got"),
        ({"uniform": torch.zeros(3)}, r"uniform: expected shape \[2\], got \[3\]"),
        ({"uniform": torch.zeros(2, 1)}, r"uniform: expected shape \[2\], got \[2, 1\]"),
        ({"uniform": torch.zeros(2).half()}, "uniform: expected dtype float32 or float64, got torch.float16"),
        ({"uniform": torch.zeros(2, device="meta")}, "uniform: expected device cpu"),
        ({"banned": torch.zeros(1)}, "banned: expected dtype int64, got torch.float32"),
        ({"banned": torch.tensor(3)}, r"banned: expected shape \[K\], got \[\]"),
        ({"banned": torch.tensor([1, 4])}, r"banned: expected values in \[0, 4\), got 1 outside, the first of them 4"),
        ({"banned": torch.tensor([-1])}, r"banned: expected values in \[0, 4\), got 1 outside, the first of them -1"),
        ({"banned": torch.tensor([3, 1, 0, 2])}, "banned: expected at least one token that is not banned, got all 4"),
        ({"banned": torch.arange(12) % 4}, "banned: expected at least one token that is not banned, got all 4"),
        ({"temperature": -0.5}, "temperature: expected a finite number of 0 or more, got -0.5"),
        ({"temperature": math.nan}, "temperature: expected a finite number of 0 or more, got nan"),
        ({"top_p": 0}, "top_p: expected a finite number above 0, got 0"),
        ({"top_p": 1.01}, "top_p: expected a number of at most 1, got 1.01"),
        ({"top_k": -1}, "top_k: expected an int of 0 or more, got -1"),
        ({"top_k": 2.0}, "top_k: expected an int of 0 or more, got 2.0"),
        ({"top_k": True}, "top_k: expected an int of 0 or more, got True"),
        ({"backend": "native"}, "backend 'native' cannot run on cpu"),
    ],
)
def test_errors(change, message):
    arguments = {"logits": torch.zeros(2, 4), "uniform": torch.zeros(2)} | change
    with pytest.raises(ValueError, match=f"sample_tokens: {message}"):
        sample_tokens(arguments.pop("logits"), arguments.pop("uniform"), **arguments)


def test_not_a_tensor():
    with pytest.raises(TypeError, match=r"sample_tokens: uniform: expected a torch.Tensor, got float"):
        sample_tokens(torch.zeros(1, 4), 0.5)
    with pytest.raises(TypeError, match=r"sample_tokens: banned: expected a torch.Tensor, got list"):
        sample_tokens(torch.zeros(1, 4), torch.zeros(1), banned=[1])
    duplicates = torch.tensor([1, 1, 1, 1])
    assert sample_tokens(torch.zeros(1, 4), torch.tensor([0.4]), banned=duplicates)[0].item() == 2
