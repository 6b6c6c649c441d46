"""sample_tokens on every backend against an enumeration of the truncated distribution in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from native_cases import check_turned_off
from sampling_cases import (
    ALMOST_ONE,
    EDGES,
    KINDS,
    SETTINGS,
    Sampler,
    check,
    hard_logits,
    oracle,
    set_tile,
    without_distribution,
)
from torch import Tensor
from triton_cases import CUDA, Operations, for_threads

from videor1_kernels import backends, extension, sample_tokens
from videor1_kernels.sampling import native
from videor1_kernels.testing import rounding

# Of NumPy, in the interpreter: -inf - top, and what is no number in a row that has no distribution.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero) encountered in (subtract|multiply|add|cast|log):RuntimeWarning"
)
Options = dict[str, Any]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ALIKE = [
    {"temperature": 0.4},
    {"temperature": 2.5},
    {"top_p": 0.95, "temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5, "top_p": 0.7},
]

needs_native = pytest.mark.skipif(backends("sample_tokens")["native"] is not None, reason="there is no C++ compiler")


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_native), "triton"])
def sample(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sampler:
    set_tile(monkeypatch)
    return Sampler(request.param)


def numbers(count: int, seed: int = 0) -> Tensor:
    """The numbers of interest, and ``count`` at random."""
    return torch.cat([torch.tensor(EDGES), torch.rand(count, generator=torch.Generator().manual_seed(seed))])


def even(count: int) -> Tensor:
    """Evenly spaced numbers in (0, 1): the share of them in an interval is its length, to within one."""
    return (torch.arange(count) + 0.5) / count


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.fits(lambda sample, options: CUDA or sample != "triton" or options not in ALIKE)  # one kernel
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_every_setting_on_hard_logits(sample: Sampler, options: Options) -> None:
    sizes = [(70, [69, 3, 40, 3])] if sample.interpreted else [(61, None), (8, [3]), (300, [299, 0, 150, 0])]
    places = torch.tensor([0.0, 0.37, ALMOST_ONE]) if sample.interpreted else numbers(8)
    each = 1 if sample.interpreted else len(places)  # numbers for each kind of logits
    for vocabulary, ids in sizes:
        hard, banned = hard_logits(vocabulary), None if ids is None else torch.tensor(ids)
        if ids and vocabulary // 2 in ids:  # then nothing that may be drawn has a probability
            tokens, _ = sample(hard.pop("one finite").expand(each, -1), places, banned, **options)
            assert not torch.isin(tokens, banned).any()
        logits = torch.stack(list(hard.values())).repeat_interleave(each, 0)
        uniform = places.repeat(len(logits))[: len(logits)]
        tokens, logp = sample(logits, uniform, banned, **options)
        assert check(logits, uniform, tokens, logp, banned=banned, **options) <= 2 * each
        same, same_logp = sample_tokens(logits, uniform, banned=banned, backend="reference", **options)
        for row, u, token, other in zip(logits, uniform.tolist(), tokens.tolist(), same.tolist(), strict=True):
            if token != other:  # only where rounding may decide
                want = oracle(row, banned=banned, **options)
                assert want.token(u) is None or want.doubtful.any()
        torch.testing.assert_close(logp[tokens == same], same_logp[tokens == same], rtol=2e-6, atol=3e-6)


@pytest.mark.grid(dtype=DTYPES, options=KINDS, number=[torch.float32, torch.float64], ids=[None, [0, 76]])
def test_dtypes(
    sample: Sampler,
    dtype: torch.dtype,
    options: Options,
    number: torch.dtype,
    ids: list[int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Triton at the size of tile that is shipped."""
    monkeypatch.undo()
    generator = torch.Generator().manual_seed(1)
    rows, banned = 3 if sample.interpreted else 24, None if ids is None else torch.tensor(ids)
    logits = (3 * torch.randn(rows, 77, generator=generator)).to(dtype)
    uniform = torch.rand(rows, generator=generator).to(number)
    if sample.backend != "reference" and dtype == torch.float64:
        why = {"triton": "its kernels compute in fp32", "native": "it takes fp32, and an input is torch.float64"}
        with pytest.raises(ValueError, match=f"backend '{sample.backend}' cannot run .* {why[sample.backend]}"):
            sample(logits, uniform, banned, **options)
        return
    tokens, logp = sample(logits, uniform, banned, **options)
    assert check(logits, uniform, tokens, logp, banned=banned, **options) <= 1
    if sample.backend == "reference":
        exact = torch.stack([oracle(row, **options).logp for row in logits]).gather(1, tokens[:, None])[:, 0]
        largest = logits.abs().max().item() / (options.get("temperature") or 1.0)
        torch.testing.assert_close(logp.double(), exact, rtol=0, atol=rounding(77, 2 * largest, dtype))


@pytest.mark.parametrize(
    ("options", "ends", "ids"),
    [
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
    ],
)
def test_by_hand(sample: Sampler, options: Options, ends: list[float], ids: list[int] | None) -> None:
    """Of probabilities .1 .4 .2 .3: what stays, and where its cumulative sums in order of id are."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    banned = None if ids is None else torch.tensor(ids)
    want = oracle(logits, banned=banned, **options)
    torch.testing.assert_close(want.ends, torch.tensor(ends).double(), atol=1e-7, rtol=0)
    uniform = even(6 if sample.interpreted else 96)
    tokens, logp = sample(logits.expand(len(uniform), -1), uniform, banned, **options)
    assert tokens.tolist() == [next(i for i, end in enumerate(ends) if end > u) for u in uniform.tolist()]
    p = logits.exp()[tokens]
    exact = (p**2 / 0.3 if options.get("temperature") == 0.5 else p).log()
    torch.testing.assert_close(logp, exact, rtol=0, atol=rounding(4, 5.0))


@pytest.mark.fits(lambda sample, count: CUDA or sample != "triton" or count in (10, 100))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 16, 100, 152064])
def test_equal_tokens(sample: Sampler, count: int) -> None:
    """k of them, or the least number that reaches top_p exactly, and those of the lowest ids."""
    logits = torch.full((2, count + 3), -2.5)
    banned = torch.tensor([0, 2, count + 2])
    ids = [token for token in range(count + 3) if token not in (0, 2, count + 2)]
    for tenths in (3, 9) if sample.interpreted else range(1, 10):
        kept = max(-(-count * tenths // 10), 1)
        for options, number in (
            ({"top_p": tenths / 10}, kept),
            ({"top_k": kept}, kept),
            ({"top_k": kept, "top_p": 0.5}, -(-kept // 2)),
        ):
            tokens, _ = sample(logits, torch.tensor([0.0, ALMOST_ONE]), banned, **options)
            assert tokens.tolist() == [1, ids[number - 1]], options
    for dtype in DTYPES[sample.backend != "reference" :]:
        tokens, logp = sample(logits[:1].to(dtype), torch.zeros(1), banned, temperature=0)
        assert tokens.tolist() == [1]
        torch.testing.assert_close(logp, torch.full_like(logp, -math.log(count + 3)))


@pytest.mark.fits(lambda sample, dtype: sample == "reference" or dtype != torch.float64)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_only_rounding_keeps_from_top_p_reaches_it(sample: Sampler, dtype: torch.dtype) -> None:
    few = [(7, 25), (15, 29), (29, 35), (28, 41)] if dtype == torch.float32 else []
    every = [(kept, count) for count in (25, 41, 49, 83) for kept in range(1, count)]
    for kept, count in few if sample.backend == "triton" else every:
        token, _ = sample(torch.zeros(1, count, dtype=dtype), torch.tensor([ALMOST_ONE]), top_p=kept / count)
        assert token.item() == kept - 1


def test_without_truncation_the_reference_sorts_nothing() -> None:
    logits, uniform, banned = torch.randn(4, 50), torch.rand(4), torch.tensor([1])
    sorting = {"sort", "argsort", "topk", "msort", "kthvalue"}
    for options in ({}, {"temperature": 0.5}, {"temperature": 0}, {"top_k": 50}, {"top_k": 99}):
        with Operations() as operations:
            sample_tokens(logits, uniform, banned=banned, backend="reference", **options)
        assert not sorting & set(operations.names), operations.names
        assert len(operations.names) < 45
    with Operations() as operations:
        sample_tokens(logits, uniform, top_k=49, backend="reference")
    assert sorting & set(operations.names)


@pytest.mark.fits(
    lambda sample, vocabulary, dtype, **_: (
        sample == "reference"
        or (sample == "native" and dtype != torch.float64)
        or (dtype, vocabulary) == (torch.float32, 33)
    )
)
@pytest.mark.grid(vocabulary=[1, 7, 33, 300, 1001], dtype=DTYPES, options=SETTINGS[:6] + KINDS[2:])
def test_rows_do_not_know_of_each_other(sample: Sampler, vocabulary: int, dtype: torch.dtype, options: Options) -> None:
    rows = 3 if sample.interpreted else 9
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    uniform = torch.rand(rows, generator=generator)
    banned = torch.tensor([vocabulary - 1]) if vocabulary > 1 else None
    tokens, logp = sample(logits, uniform, banned, **options)
    alone = [sample(logits[i : i + 1], uniform[i : i + 1], banned, **options) for i in range(rows)]
    assert_same((torch.cat([token for token, _ in alone]), torch.cat([value for _, value in alone])), (tokens, logp))
    assert_same(sample(logits.flip(0), uniform.flip(0), banned, **options), (tokens.flip(0), logp.flip(0)))


@pytest.mark.parametrize("options", KINDS[::4], ids=str)
def test_layouts(sample: Sampler, options: Options) -> None:
    logits, uniform = torch.randn(3, 70), torch.rand(3)
    want = sample(logits, uniform, torch.tensor([5, 9]), **options)
    wide = torch.cat([logits, logits], 1)[:, :70]
    for other in (torch.stack([logits, logits], -1)[..., 0], wide, logits.T.contiguous().T.requires_grad_()):
        got = sample(other, torch.stack([uniform, uniform], -1)[:, 0], torch.tensor([5, 0, 9])[::2], **options)
        assert_same(got, want)
        assert not got[1].requires_grad
    assert torch.equal(logits, wide)  # the inputs are as they were


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_rows_with_no_distribution(sample: Sampler, options: Options) -> None:
    """NaN, +inf, or nothing finite: some id that is not banned, and NaN for its log-prob; other rows as ever."""
    generator = torch.Generator().manual_seed(0)
    good = torch.randn(2, 50, generator=generator)
    bad, banned = without_distribution(generator)
    uniform = torch.tensor([0.3, 0.6, 0.0, ALMOST_ONE, 0.3, 0.7, 0.5])
    tokens, logp = sample(torch.cat([good, bad]), uniform, banned, **options)
    assert not torch.isin(tokens, banned).any()
    assert ((tokens >= 0) & (tokens < 50)).all()
    assert logp[2:].isnan().all()
    assert_same((tokens[:2], logp[:2]), sample(good, uniform[:2], banned, **options))
    assert tokens[4] == 9  # infinitely likelier than any other
    finite = bad[4:].clone()
    finite[0, 0] = 0.0
    assert tokens[6] == sample(finite, uniform[6:], banned, **options)[0]
    same = sample_tokens(torch.cat([good, bad]), uniform, banned=banned, backend="reference", **options)
    assert torch.equal(tokens, same[0])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.3}, {"top_p": 0.8}, {"top_k": 2}], ids=str)
def test_a_banned_token_may_outweigh_all_others(sample: Sampler, options: Options) -> None:
    uniform = even(4 if sample.interpreted else 64)
    logits = torch.tensor([[500.0, 1.0, 3.0, 2.0, 1e30, -torch.inf]]).expand(len(uniform), -1)
    for ids in ([0, 4], [4]):
        tokens, logp = sample(logits, uniform, torch.tensor(ids), **options)
        want = oracle(logits[0], banned=torch.tensor(ids), **options)
        assert all(want.accepts(token, u) for token, u in zip(tokens.tolist(), uniform.tolist(), strict=True))
        assert (logp == -torch.tensor(1e30) / options.get("temperature", 1.0)).all()
    logits = logits[:, :4]
    tokens, logp = sample(logits, uniform, torch.tensor([0]), **options)
    assert check(logits, uniform, tokens, logp, banned=torch.tensor([0]), **options) == 0
    if not options and not sample.interpreted:
        assert set(tokens.tolist()) == {1, 2, 3}


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_all_but_one_banned(sample: Sampler, options: Options) -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]]).expand(2, -1)
    tokens, logp = sample(logits, torch.tensor([0.0, ALMOST_ONE]), torch.tensor([0, 1, 2, 2, 0]), **options)
    assert tokens.tolist() == [3, 3]
    want = oracle(logits[0], temperature=options.get("temperature", 1.0)).logp[3].float()
    torch.testing.assert_close(logp, want.expand(2))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_numbers_outside_draw_what_may_be_drawn(sample: Sampler, options: Options) -> None:
    """The nearest end; NaN and infinities draw some token that may be drawn."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    banned = torch.tensor([0, 39])
    values = [-1.0, 1.0, 1 - 2.0**-53, 1.5, math.nan, -math.inf, math.inf]
    uniform = torch.tensor(
        values[:-1] if sample.interpreted else values, dtype=torch.float64
    )  # NumPy has no int for inf
    tokens, _ = sample(logits.expand(len(uniform), -1), uniform, banned, **options)
    kept = oracle(logits[0], banned=banned, **options).probabilities.nonzero()[:, 0].tolist()
    assert tokens[:4].tolist() == [kept[0], kept[-1], kept[-1], kept[-1]]
    assert set(tokens.tolist()) <= set(kept)
    if sample.backend == "triton":
        assert tokens[4] == kept[0]


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-6, 1e6, 1e300])
def test_extreme_temperatures(sample: Sampler, temperature: float) -> None:
    uniform = even(200 if not sample.interpreted else 3 if temperature < 1 else 19)
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)).clone()
    banned = torch.tensor([4])
    tokens, logp = sample(logits.expand(len(uniform), -1), uniform, banned, temperature=temperature)
    assert check(logits.expand(len(uniform), -1), uniform, tokens, logp, temperature=temperature, banned=banned) == 0
    likeliest = oracle(logits[0], temperature=0, banned=banned).probabilities.argmax()
    assert (tokens == likeliest).all() if temperature < 1 else tokens.unique().numel() == 19
    logits[:, 5] = -torch.inf
    for options in ({"top_k": 7}, {"top_p": 0.55}):
        options |= {"temperature": temperature, "banned": banned}
        rows, few = logits.expand(3, -1), torch.tensor([0.01, 0.51, 0.97])
        assert check(rows, few, *sample(rows, few, **options), **options) <= 3


@pytest.mark.fits(lambda sample, options: CUDA or sample != "triton" or "top_p" in options)
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 50, "temperature": 0.8}, {"top_p": 0.9}, {"top_k": 2000, "top_p": 0.95}], ids=str
)
def test_a_whole_vocabulary(sample: Sampler, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # at the size of tile that is shipped
    generator = torch.Generator().manual_seed(0)
    banned = torch.arange(151643, 151668)
    uniform = torch.tensor([0.43]) if sample.interpreted else numbers(4)
    for scale in [1 if "top_p" in options else 5] if sample.interpreted else [1, 5]:  # flat and peaked
        rows = scale * torch.randn(152064, generator=generator).expand(len(uniform), -1)
        assert check(rows, uniform, *sample(rows, uniform, banned, **options), banned=banned, **options) == 0


def test_no_rows_and_one_token(sample: Sampler) -> None:
    tokens, logp = sample(torch.zeros(0, 5), torch.zeros(0), top_p=0.5, top_k=2)
    assert tokens.shape == logp.shape == (0,)
    for options in SETTINGS:
        tokens, logp = sample(torch.randn(1, 1), torch.rand(1), **options)
        assert tokens.tolist() == logp.tolist() == [0]


def test_no_gradient_and_no_autocast(sample: Sampler) -> None:
    logits, half = torch.randn(1, 9), torch.full((1,), 0.5)
    plain = sample(logits, half, top_p=0.9)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert_same(sample(logits, half, torch.tensor([], dtype=torch.int64), top_p=0.9), plain)


@needs_native
@pytest.mark.parametrize("options", [*KINDS, {"top_k": 5, "top_p": 0.7}], ids=str)
def test_native_draws_alike_for_any_threads_and_vectors(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "GRAIN", 1)
    logits, uniform = 3 * torch.randn(13, 333, generator=torch.Generator().manual_seed(0)), even(13)
    banned = torch.tensor([7, 332])

    def draw() -> tuple[Tensor, Tensor]:
        return sample_tokens(logits, uniform, banned=banned, backend="native", **options)

    results = for_threads(draw, 1, 2, 3)
    monkeypatch.setattr(extension, "torch_parallel_for", lambda: None)
    for result in (*results, draw()):
        assert_same(result, results[0])
    for bits in (128, 256, 512):
        monkeypatch.setattr(native, "vector_bits", lambda bits=bits: bits)
        tokens, logp = draw()
        assert torch.equal(tokens, results[0][0])
        torch.testing.assert_close(logp, results[0][1], rtol=1e-6, atol=1e-6)


@needs_native
def test_native_turned_off_says_so_and_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_turned_off(
        "sample_tokens",
        native,
        lambda backend: sample_tokens(torch.zeros(2, 4), torch.zeros(2), backend=backend),
        monkeypatch,
        caplog,
    )
