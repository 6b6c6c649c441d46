"""tgrpo_advantages on Triton against the reference, in fp64 and in the inputs' own dtype."""

import itertools
import math

import pytest
import torch
from triton_cases import DEVICE, Launches, shared_error

from videor1_kernels import last_backend, tgrpo_advantages
from videor1_kernels.group_advantage import triton
from videor1_kernels.testing import assert_matches, poisoned_memory

# 0 / 0 in groups of equal rewards with eps 0, whose quotient is not used, and what becomes of an infinite accuracy.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in (divide|subtract):RuntimeWarning")

NAMES = ("advantages", "rewards", "temporal", "p", "p_shuffled")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # no product of matrices: the interpreter is right in bf16 too
OPTIONS = [
    {"rule": rule, "normalize": normalize, "apply": apply}
    for rule, normalize, apply in itertools.product(
        ("margin", "threshold", "reference"), ("std", "none"), ("reward", "advantage")
    )
]


def make(prompts, size, others, dtype=torch.float32, seed=0, *, binary=False):
    """Accuracies of quarters, right in every dtype; among the shuffled, missing ones and whole rows of them."""
    generator = torch.Generator().manual_seed(seed)

    def quarters(*shape):
        values = torch.randint(5, shape, generator=generator) / 4
        return ((values > 0.5).float() if binary else values).to(DEVICE, dtype)

    accuracy, format = quarters(prompts, size), (quarters(prompts, size) > 0.3).to(dtype)
    lengths = torch.randint(200, 700, (prompts, size), generator=generator)
    lengths.view(-1)[::3] = 320
    lengths.view(-1)[1::3] = 512
    shuffled = quarters(prompts, others)
    shuffled.masked_fill_(torch.rand(prompts, others, generator=generator).to(DEVICE) < 0.3, math.nan)
    shuffled[1::3] = math.nan
    return accuracy, format, lengths.to(DEVICE), shuffled


def call(inputs, backend="triton", **options):
    out = tgrpo_advantages(*inputs, **options, backend=backend)
    assert last_backend("tgrpo_advantages") == backend
    return [getattr(out, name) for name in NAMES]


def check(inputs, fp64=True, **options):
    """Against the reference in the inputs' dtypes and, unless their rounding is the question, in fp64."""
    with poisoned_memory():
        ours = call(inputs, **options)
    exact = call([x.double() if x is not None and x.is_floating_point() else x for x in inputs], "reference", **options)
    same = call(inputs, "reference", **options)
    for name, a, o, b in zip(NAMES, ours, exact, same, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == o.shape
        for other in (o, b) if fp64 else (b,):
            assert torch.equal(a.isnan(), other.isnan()), name
            assert_matches(a.nan_to_num(), other.nan_to_num(), torch.float32, name)
            whole = (a == 0, other == 0) if a.dim() == 1 else ((a == 0).all(1), (other == 0).all(1))
            assert torch.equal(*whole), name
    for a, b in zip(ours, call(inputs, **options), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    return ours


@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: "-".join(x.values()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rule_equals_the_reference(options, dtype):
    ours = check(make(37, 8, 4, dtype), **options)
    assert (ours[2] > 0).any()
    assert (ours[2] == 0).any()
    assert (ours[0] != 0).any()
    assert ours[4].isnan().any()
    check(make(13, 5, 3, dtype, seed=1, binary=True), **options, alpha=0.7, mu=0.5, length_bonus=-0.1, eps=0.0)


@pytest.mark.parametrize(
    ("prompts", "size", "others"),
    [(1, 1, 1), (3, 1, 4), (5, 2, 1), (130, 4, 4), (65, 8, 0), (3, 33, 70), (2, 520, 3), (2, 3, 600), (0, 4, 4)],
)
def test_shapes(prompts, size, others):
    """Groups of one, groups wider than a program's share, more prompts than a program takes, none."""
    inputs = make(prompts, size, others)
    ours = check(inputs)
    check((*inputs[:3], None))
    if size == 1:
        assert (ours[0] == 0).all()


def test_equal_groups_are_exactly_zero():
    """Whatever the rounding of their sums: 0.1 + 1.2 and 0.3 + 1.0, and a mean that is not one of the rewards."""
    thirds = torch.full((4, 7), 1 / 3, device=DEVICE)
    tenths = torch.arange(1, 8, dtype=torch.float64, device=DEVICE)[None] / 10
    rest, tenths = (1.3 - tenths).float(), tenths.float()
    lengths = torch.zeros(4, 7, dtype=torch.int64, device=DEVICE)
    assert (check((thirds, thirds / 7, lengths, None))[0] == 0).all()
    for options in OPTIONS:
        equal = check((tenths, rest, lengths[:1], None), False, correct_above=1.0, **options)
        assert equal[1].unique().numel() > 1
        assert (equal[0] == 0).all()
        different = check((tenths, 1.00001 * rest, lengths[:1], None), False, correct_above=1.0, **options)
        assert (different[0] != 0).any()
    # All correct: the bonus, the same for all, moves no advantage, and applied to the advantage it is all of it.
    ones = torch.ones(2, 6, device=DEVICE)
    for shuffled in (torch.zeros(2, 3, device=DEVICE), torch.tensor([[0.5, math.nan], [0.0, 1.0]], device=DEVICE)):
        inputs = (ones, torch.zeros_like(ones), lengths[:2, :6], shuffled)
        assert (check(inputs)[0] == 0).all()
        ours = check(inputs, apply="advantage")
        assert torch.equal(ours[0], ours[2][:, None].expand(2, 6))
        assert (ours[2] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bar_of_correctness_is_not_exceeded_by_itself(dtype):
    """0.1 in any dtype is not above 0.1, 0.2 is."""
    accuracy = torch.tensor([[0.1, 0.2, 0.0, 1.0]], device=DEVICE).to(dtype)
    inputs = (accuracy, torch.zeros_like(accuracy), torch.full((1, 4), 400, device=DEVICE), torch.zeros_like(accuracy))
    ours, same = (call(inputs, backend, rule="reference") for backend in ("triton", "reference"))
    for a, b in zip(ours, same, strict=True):
        assert_matches(a, b)
    extra = ours[1] - accuracy.float()
    torch.testing.assert_close(extra, torch.tensor([[0, 0.5, 0, 0.5]], device=DEVICE))
    for name in ("correct_above", "mu"):
        check(make(9, 4, 4, dtype), rule="threshold", **{name: 0.5})


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.float32, torch.float64, torch.float16, torch.bfloat16]
)
def test_dtypes_of_the_lengths(dtype):
    accuracy, format, lengths, shuffled = make(17, 8, 4)
    lengths = torch.tensor([319, 320, 321, 511, 512, 513, 0, 4096], device=DEVICE).expand(17, 8)
    check((accuracy, format, lengths.to(dtype), shuffled))
    check((accuracy, format, lengths.to(dtype), shuffled), length_range=(319.5, math.inf))
    check((accuracy, format, lengths.to(dtype), shuffled), length_range=(-math.inf, 320))


def test_mixed_dtypes_and_layouts():
    accuracy, format, lengths, shuffled = make(9, 6, 4)

    def strided(values):
        return torch.stack([values, torch.full_like(values, 9)], -1)[..., 0]

    want = check((accuracy, format, lengths, shuffled))
    for inputs in (
        (accuracy.half(), format.bfloat16(), lengths.int(), shuffled.half()),
        (strided(accuracy), strided(format), strided(lengths), strided(shuffled)),
        tuple(x.T.contiguous().T for x in (accuracy, format, lengths, shuffled)),
    ):
        for a, b in zip(check(inputs), want, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
    check((accuracy, format[:1].expand(9, 6), lengths[:, :1].expand(9, 6), shuffled[:1].expand(9, 4)))


def test_equal_means_of_groups_of_different_sizes_are_equal():
    """p = p~ must not pass for p > p~ by rounding: three tenths and seven tenths have one mean."""
    for value, size, others in itertools.product((0.1, 0.7, 1 / 3), (3, 7, 8), (6, 11)):
        accuracy = torch.full((1, size), value, device=DEVICE)
        zeros = torch.zeros(1, size, dtype=torch.int64, device=DEVICE)
        shuffled = torch.full((1, others), value, device=DEVICE)
        shuffled[0, ::3] = math.nan
        ours = call((accuracy, accuracy, zeros, shuffled))
        assert ours[2].item() == 0
        assert ours[3].item() == ours[4].item()


def test_order_of_the_prompts_changes_nothing():
    inputs = make(130, 6, 5)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ours = call([x[order] for x in inputs])
    for a, b in zip(ours, call(inputs), strict=True):
        assert torch.equal(a.nan_to_num(), b[order].nan_to_num())


def test_one_launch(monkeypatch):
    launches = Launches(triton.advantage_kernel)
    monkeypatch.setattr(triton, "advantage_kernel", launches)
    call(make(300, 8, 8))
    assert len(launches.grids) == 1


def test_no_gradient_and_no_other_dtype():
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in make(3, 4, 2)]
    assert not any(x.requires_grad for x in call(inputs))
    plainly = call(make(9, 4, 2))
    for default in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(default)
        try:
            again = call(inputs=make_in_float32(9, 4, 2))
        finally:
            torch.set_default_dtype(torch.float32)
        for a, b in zip(plainly, again, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
    with torch.autocast(DEVICE, torch.bfloat16):
        for a, b in zip(plainly, call(make(9, 4, 2)), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def make_in_float32(*shape):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    inputs = make(*shape)
    torch.set_default_dtype(default)
    return inputs


GOOD = {
    "accuracy": torch.zeros(2, 3),
    "format": torch.zeros(2, 3),
    "lengths": torch.zeros(2, 3),
    "shuffled_accuracy": torch.zeros(2, 2),
}


def with_value(shape, value):
    values = torch.zeros(shape)
    values[-1, -1] = value
    return values


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": with_value((2, 3), math.nan)},
        {"accuracy": with_value((2, 3), math.inf)},
        {"accuracy": with_value((2, 3), -math.inf)},
        {"format": with_value((2, 3), math.nan)},
        {"format": with_value((2, 3), math.inf)},
        {"shuffled_accuracy": with_value((2, 2), math.inf)},
        {"shuffled_accuracy": with_value((2, 2), -math.inf)},
        {"accuracy": torch.zeros(3)},
        {"accuracy": torch.zeros(2, 0)},
        {"accuracy": torch.zeros(2, 3).long()},
        {"format": torch.zeros(2, 4)},
        {"format": torch.zeros(2, 3, device="meta")},
        {"lengths": torch.zeros(3, 2)},
        {"lengths": torch.zeros(2, 3) > 0},
        {"shuffled_accuracy": torch.zeros(3, 2)},
        {"shuffled_accuracy": torch.zeros(2)},
        {"rule": "margins"},
        {"normalize": "mean"},
        {"apply": "rewards"},
        {"alpha": -1.0},
        {"alpha": math.nan},
        {"mu": -1.0},
        {"eps": -1.0},
        {"correct_above": math.inf},
        {"length_bonus": math.nan},
        {"length_range": (5, 4)},
        {"length_range": (1, 2, 3)},
    ],
    ids=str,
)
def test_errors_are_the_references(change):
    assert next(iter(change)) in shared_error(tgrpo_advantages, GOOD | change)


def test_fp64_is_refused():
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run .* its kernels compute in fp32"):
        tgrpo_advantages(*(x.double() for x in GOOD.values()), backend="triton")
