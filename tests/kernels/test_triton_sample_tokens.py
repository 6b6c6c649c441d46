"""sample_tokens on Triton against its fp64 oracle and the reference: every path through the kernel, at small tiles."""

import math

import pytest
import torch
from sampling_cases import ALMOST_ONE, EDGES, SETTINGS, check, chi_square_p, hard_logits, oracle, without_distribution
from triton_cases import CUDA, DEVICE, Counter, Launches, shared_error

from videor1_kernels import last_backend, sample_tokens
from videor1_kernels.sampling import triton, triton_list
from videor1_kernels.testing import poisoned_memory

# -inf - top, and what is no number in a row that has no distribution.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero) encountered in (subtract|multiply|add|cast|log):RuntimeWarning"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # no product of matrices: the interpreter is right in bf16 too
TILES = {"shipped": (64, 32), "small": (4, 8)}  # 2048 candidates are listed, or 32: then bounds are bisected first
OPTIONS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {},
    {"temperature": 0.0},
    {"top_p": 0.8},
    {"top_k": 20, "top_p": 0.9},
    {"top_k": 45, "temperature": 2.0},
    {"top_p": 0.97, "temperature": 1.5},
]


@pytest.fixture
def tile(monkeypatch):
    """Set the size of a tile."""

    def use(name):
        if not CUDA:  # small ones are no layout for 16 warps
            monkeypatch.setattr(triton, "SEGMENTS", TILES[name][0])
            monkeypatch.setattr(triton, "COLUMNS", TILES[name][1])

    return use


def call(logits, uniform, banned=None, **options):
    banned = None if banned is None else banned.to(DEVICE)
    tokens, logp = sample_tokens(logits.to(DEVICE), uniform.to(DEVICE), banned=banned, backend="triton", **options)
    assert last_backend("sample_tokens") == "triton"
    assert logp.dtype == torch.float32
    return tokens.cpu(), logp.cpu()


def compare(logits, uniform, banned=None, *, repeat=True, **options):
    """With the oracle, and with the reference where no rounding can decide; repeated, it is the same to the bit."""
    with poisoned_memory():
        tokens, logp = call(logits, uniform, banned, **options)
    skipped = check(logits, uniform, tokens, logp, banned=banned, **options)
    same, same_logp = sample_tokens(logits, uniform, banned=banned, backend="reference", **options)
    torch.testing.assert_close(logp[tokens == same], same_logp[tokens == same], rtol=2e-6, atol=3e-6)
    for row, u, token, other in zip(logits, uniform.tolist(), tokens.tolist(), same.tolist(), strict=True):
        want = oracle(row, banned=banned, **options)
        assert token == other or want.token(u) is None or want.doubtful.any()
    if repeat:
        again = call(logits, uniform, banned, **options)
        assert torch.equal(tokens, again[0])
        assert torch.equal(logp, again[1])
    return len(logits) - skipped


def numbers(count, seed=0):
    return torch.cat([torch.tensor(EDGES), torch.rand(count, generator=torch.Generator().manual_seed(seed))])


@pytest.mark.parametrize("options", OPTIONS[2:7], ids=str)
@pytest.mark.parametrize("name", hard_logits(8))
def test_hard_logits(name, options, tile):
    """More candidates than a list of 32 holds, so that bounds are bisected over the row: with ties at them too."""
    tile("small")
    uniform = torch.tensor([0.0, 0.37, ALMOST_ONE])
    logits = hard_logits(110)[name].expand(len(uniform), -1)
    banned = torch.tensor([109, 3, 64, 3])
    assert compare(logits, uniform, banned, repeat=False, **options) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dtypes_and_rows(options, dtype, tile):
    tile("shipped")
    generator = torch.Generator().manual_seed(2)
    logits = (3 * torch.randn(6, 200, generator=generator)).to(dtype)
    uniform = torch.rand(6, generator=generator)
    assert compare(logits, uniform, **options) >= 5
    banned = torch.tensor([0, 199])
    tokens, logp = call(logits, uniform.double(), banned, **options)
    assert check(logits, uniform.double(), tokens, logp, banned=banned, **options) <= 1


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_every_setting(options, tile):
    for name, vocabulary in (("shipped", 61), ("small", 61), ("small", 33)):
        tile(name)
        uniform = numbers(0, seed=vocabulary)[1:]
        logits = hard_logits(vocabulary, seed=3)["ties"].expand(len(uniform), -1)
        compare(logits, uniform, torch.tensor([1, 32]), **options)


@pytest.mark.parametrize("vocabulary", [1, 2, 8, 31, 32, 33, 64, 97, 2048, 2049, 4100])
def test_sizes(vocabulary, tile):
    """Below, at and above a tile's run, a tile and a row of segments."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 2 * torch.randn(2, vocabulary, generator=generator)
    uniform = torch.rand(2, generator=generator)
    banned = None if vocabulary == 1 else torch.tensor([vocabulary - 1])
    for name in ["shipped"] if vocabulary > 2000 else TILES:
        tile(name)
        for options in ({}, {"temperature": 0}, {"top_k": 17, "top_p": 0.9}, {"top_p": 0.95}):
            assert compare(logits, uniform, banned, **options) == 2
    assert call(torch.zeros(0, vocabulary), torch.zeros(0), top_p=0.5)[0].shape == (0,)


@pytest.mark.parametrize("name", TILES)
def test_equal_tokens(name, tile):
    """k of them, or the least number that reaches top_p exactly, and those of the lowest ids."""
    tile(name)
    for count in (10, 100):
        logits = torch.full((2, count + 2), -2.5)
        banned = torch.tensor([0, count])
        ids = [token for token in range(count + 2) if token not in (0, count)]
        uniform = torch.tensor([0.0, ALMOST_ONE])
        for tenths in (1, 3, 7, 9):
            kept = count * tenths // 10
            for options, number in (
                ({"top_p": tenths / 10}, kept),
                ({"top_k": kept}, kept),
                ({"top_k": kept, "top_p": 0.5}, -(-kept // 2)),
            ):
                assert call(logits, uniform, banned, **options)[0].tolist() == [1, ids[number - 1]], options
    for kept, count in ((7, 25), (15, 29), (29, 35), (28, 41)):  # sums that only rounding keeps from top_p
        assert call(torch.zeros(1, count), torch.tensor([ALMOST_ONE]), top_p=kept / count)[0].item() == kept - 1


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.8}, {"top_k": 12, "top_p": 0.9}], ids=str)
def test_draws_follow_the_distribution(options, tile):
    """The interpreter makes a few draws, each of them known beforehand; a GPU 200000."""
    tile("small")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, generator=generator)
    banned = torch.tensor([2, 30, 5])
    uniform = torch.rand(200_000 if CUDA else 60, generator=generator)
    want = oracle(logits, banned=banned, temperature=1.3, **options)
    tokens, _ = call(logits.expand(len(uniform), -1), uniform, banned, temperature=1.3, **options)
    assert chi_square_p(tokens.bincount(minlength=40), want.probabilities) > 1e-4
    for token, u in zip(tokens[:60].tolist(), uniform[:60].tolist(), strict=True):
        assert token == want.token(u) or want.token(u) is None


def test_the_tile_changes_nothing(tile):
    """Sums are of integers: whatever their order, the same bits."""
    logits = 2 * torch.randn(3, 131, generator=torch.Generator().manual_seed(0))
    uniform = torch.tensor([0.2, 0.7, 0.9999])
    for options in OPTIONS:
        results = []
        for name in TILES:
            tile(name)
            results.append(call(logits, uniform, torch.tensor([130, 5]), **options))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


def test_rows_do_not_know_of_each_other(tile):
    tile("small")
    logits = 3 * torch.randn(4, 70, generator=torch.Generator().manual_seed(0))
    uniform = torch.tensor([0.1, 0.3, 0.5, 0.95])
    for options in OPTIONS:
        tokens, logp = call(logits, uniform, **options)
        alone = call(logits[3:4], uniform[3:4], **options)
        moved = call(logits.flip(0), uniform.flip(0), **options)
        assert tokens[3] == alone[0][0]
        assert logp[3] == alone[1][0]
        assert torch.equal(tokens, moved[0].flip(0))
        assert torch.equal(logp, moved[1].flip(0))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_with_no_distribution(options, tile):
    tile("small")
    good = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    bad, banned = without_distribution(torch.Generator().manual_seed(1))
    logits, uniform = torch.cat([good, bad]), torch.tensor([0.3, 0.6, 0.0, ALMOST_ONE, 0.3, 0.7, 0.5])
    with poisoned_memory():
        tokens, logp = call(logits, uniform, banned, **options)
    assert logp[2:].isnan().all()
    assert torch.equal(tokens, sample_tokens(logits, uniform, banned=banned, **options)[0])
    alone = call(good, uniform[:2], banned, **options)
    assert torch.equal(tokens[:2], alone[0])
    assert torch.equal(logp[:2], alone[1])


def test_a_banned_token_may_outweigh_all_others(tile):
    tile("small")
    logits = torch.tensor([[500.0, 1.0, 3.0, 2.0, 1e30, -torch.inf]]).expand(4, -1)
    uniform = torch.tensor([0.05, 0.5, 0.8, 0.99])
    for options in ({}, {"temperature": 0.3}, {"top_p": 0.8}, {"top_k": 2}):
        assert compare(logits[:, :4], uniform, torch.tensor([0]), **options) == 4
        tokens, logp = call(logits, uniform, torch.tensor([0, 4]), **options)
        want = oracle(logits[0], banned=torch.tensor([0, 4]), **options)
        assert all(want.accepts(token, u) for token, u in zip(tokens.tolist(), uniform.tolist(), strict=True))
        assert (logp == torch.tensor(-1e30 / options.get("temperature", 1.0))).all()


def test_many_banned_tokens(tile):
    """In more tiles than a word has bits."""
    tile("small")
    logits = torch.randn(1, 2100, generator=torch.Generator().manual_seed(0))
    late = torch.arange(512, 1600, 528)  # in tiles 64 and 65 of segments of 528 tokens
    logits[0, late + 3], logits[0, late + 11] = 9.0, 8.0
    banned = logits[0].sort(descending=True).indices[:40]
    for options in ({}, {"top_k": 20}):
        tokens, logp = call(logits, torch.tensor([0.6]), banned, **options)
        assert check(logits, torch.tensor([0.6]), tokens, logp, banned=banned, **options) == 0


def test_all_but_one_banned(tile):
    tile("small")
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]]).expand(2, -1)
    for options in OPTIONS:
        tokens, logp = call(logits, torch.tensor([0.0, ALMOST_ONE]), torch.tensor([0, 1, 2, 2, 0]), **options)
        assert tokens.tolist() == [3, 3]
        want = oracle(logits[0], temperature=options.get("temperature", 1.0)).logp[3].float()
        torch.testing.assert_close(logp, want.expand(2))


@pytest.mark.parametrize("uniform", [-1.0, 1.0, math.nan, 1 - 2.0**-53])
def test_numbers_outside_draw_what_may_be_drawn(uniform, tile):
    tile("small")
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    banned = torch.tensor([0, 39])
    for options in OPTIONS:
        token, _ = call(logits, torch.tensor([uniform], dtype=torch.float64), banned, **options)
        kept = oracle(logits[0], banned=banned, **options).probabilities.nonzero()[:, 0]
        assert token.item() == (kept[-1] if uniform > 0.5 else kept[0])


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e6, 1e300])
def test_extreme_temperatures(temperature, tile):
    tile("small")
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).expand(3, -1).clone()
    logits[:, 5] = -torch.inf
    for options in ({}, {"top_k": 7}, {"top_p": 0.55}):
        compare(logits, torch.tensor([0.01, 0.51, 0.97]), torch.tensor([4]), temperature=temperature, **options)


@pytest.mark.parametrize("options", [{}, {"top_k": 50, "temperature": 0.8}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("scale", [1, 5], ids=["flat", "peaked"])
def test_a_whole_vocabulary(scale, options):
    logits = scale * torch.randn(1, 152064, generator=torch.Generator().manual_seed(0))
    assert compare(logits, torch.tensor([0.43]), torch.arange(151643, 151668), **options) == 1


def passes(monkeypatch, logits, **options):
    """How often tiles of a row are read: (in full passes, bisections of bounds)."""
    counters = [Counter(getattr(triton_list, name)) for name in ("count_above", "candidates", "segment_sums")]
    for name, counter in zip(("count_above", "candidates", "segment_sums"), counters, strict=True):
        monkeypatch.setattr(triton_list, name, counter)
    call(logits[None], torch.tensor([0.4]), **options)
    bisections, listings, sums = (counter.calls for counter in counters)
    return 2 + bisections + listings + sums, bisections


if not CUDA:  # calls inside a kernel can be counted where it is interpreted

    def test_passes(monkeypatch, tile):
        """As many as the docstring says."""
        tile("shipped")
        peaked = 6 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
        for options, want in (
            ({}, 2),
            ({"temperature": 0}, 2),
            ({"top_k": 5000}, 2),
            ({"top_k": 50}, 3),
            ({"top_p": 0.95}, 3),
            ({"top_k": 50, "top_p": 0.9}, 3),
            ({"temperature": 0, "top_k": 50, "top_p": 0.9}, 2),
        ):
            assert passes(monkeypatch, peaked, **options) == (want, 0), options
        tile("small")
        for logits in (torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.zeros(1000)):
            for options in ({"top_k": 300}, {"top_p": 0.7}):
                full, bisections = passes(monkeypatch, logits, **options)
                assert bisections <= 12
                assert full <= bisections + 6
        alike = 1 + torch.arange(1000) * 2.0**-23  # too near for halves of the interval of logits to part them
        assert passes(monkeypatch, alike, top_k=300)[1] <= 44


def test_one_launch(monkeypatch):
    launches = Launches(triton.sample_kernel)
    monkeypatch.setattr(triton, "sample_kernel", launches)
    for options in OPTIONS:
        call(torch.randn(3, 40), torch.rand(3), torch.tensor([4]), **options)
    assert launches.grids == [(3,)] * len(OPTIONS)


def test_layouts_and_no_gradient(tile):
    tile("small")
    logits, uniform = torch.randn(4, 70), torch.rand(4)
    for options in OPTIONS[::3]:
        want = call(logits, uniform, torch.tensor([5, 9]), **options)
        wide = torch.cat([logits, logits], 1)[:, :70]
        for other in (torch.stack([logits, logits], -1)[..., 0], wide, logits.T.contiguous().T.requires_grad_()):
            got = call(other, torch.stack([uniform, uniform], -1)[:, 0], torch.tensor([5, 0, 9])[::2], **options)
            assert torch.equal(want[0], got[0])
            assert torch.equal(want[1], got[1])
            assert not got[1].requires_grad


GOOD = {"logits": torch.zeros(2, 4), "uniform": torch.zeros(2), "banned": torch.tensor([1])}


@pytest.mark.parametrize(
    "change",
    [
        {"logits": torch.zeros(4)},
        {"logits": torch.zeros(2, 0)},
        {"logits": torch.zeros(2, 4).long()},
        {"uniform": torch.zeros(3)},
        {"uniform": torch.zeros(2).half()},
        {"uniform": torch.zeros(2, device="meta")},
        {"banned": torch.tensor([4])},
        {"banned": torch.tensor([-1])},
        {"banned": torch.arange(4)},
        {"banned": torch.tensor(1)},
        {"banned": torch.zeros(1)},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"top_k": 1.5},
    ],
    ids=str,
)
def test_errors_are_the_references(change):
    assert next(iter(change)) in shared_error(sample_tokens, GOOD | change)


def test_fp64_is_refused():
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run .* its kernels compute in fp32"):
        sample_tokens(torch.zeros(1, 3).double(), torch.zeros(1), backend="triton")
