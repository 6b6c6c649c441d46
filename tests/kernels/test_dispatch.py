"""The registry, the public surface, and the testing tools themselves (a tool that cannot fail proves nothing)."""

import inspect
import subprocess
import sys

import pytest
import torch

import videor1_kernels
from videor1_kernels import checks, dispatch
from videor1_kernels.testing import (
    TOLERANCES,
    LargestTensor,
    assert_matches,
    assert_no_worse,
    oracle_inputs,
    poison_padding,
    poisoned_memory,
    rounding,
)

OPERATIONS = (
    "linear_logprob",
    "selective_log_softmax",
    "linear_grpo_loss",
    "grpo_loss",
    "tgrpo_advantages",
    "prefix_attention",
    "prefix_decode_attention",
    "frames_to_patches",
)


@pytest.fixture
def operation(monkeypatch):
    """An operation with a fast backend that needs CUDA and a reference."""
    monkeypatch.setattr(dispatch, "_registry", dict(dispatch._registry))
    monkeypatch.setattr(dispatch, "_last", {})

    def unavailable(device, dtype):
        return None if device.type == "cuda" else "it needs CUDA"

    dispatch.register("toy", "triton", lambda: "fast", unavailable=unavailable)
    dispatch.register("toy", "reference", lambda: "slow")
    return "toy"


def test_auto_takes_the_first_that_can_run(operation):
    assert dispatch.chosen_backend(operation, "cpu") == "reference"
    assert dispatch.chosen_backend(operation, "cuda") == "triton"
    assert dispatch.resolve(operation, "auto", "cuda")() == "fast"
    assert dispatch.resolve(operation, "auto", "cpu")() == "slow"
    assert dispatch.resolve(operation, "reference", "cuda")() == "slow"


def test_an_explicit_backend_never_falls_back(operation):
    with pytest.raises(ValueError, match="toy: backend 'triton' cannot run on cpu: it needs CUDA; usable here: 'auto'"):
        dispatch.resolve(operation, "triton", "cpu")
    with pytest.raises(ValueError, match="on cpu: this version of videor1_kernels has no native implementation"):
        dispatch.resolve(operation, "native", "cpu")
    with pytest.raises(ValueError, match=r"toy: backend: expected one of .* got 'tritn' \(did you mean 'triton'\?\)"):
        dispatch.resolve(operation, "tritn", "cuda")


def test_what_ran_can_be_asked(operation):
    assert dispatch.last_backend(operation) is None
    dispatch.resolve(operation, "auto", "cuda")
    assert dispatch.last_backend(operation) == "triton"
    with pytest.raises(ValueError, match="cannot run"):
        dispatch.resolve(operation, "triton", "cpu")
    assert dispatch.last_backend(operation) == "triton"
    assert dispatch.backends(operation, "cpu") == {"triton": "it needs CUDA", "reference": None}
    with pytest.raises(ValueError, match=r"expected the name of an operation \(.*linear_logprob.*\), got 'linear'"):
        dispatch.chosen_backend("linear")


def test_register_refuses_doubles_and_unknown_names(operation):
    with pytest.raises(ValueError, match="toy has a 'reference' backend already"):
        dispatch.register("toy", "reference", lambda: None)
    with pytest.raises(ValueError, match="backend: expected one of 'reference', 'triton', 'native', got 'cutlass'"):
        dispatch.register("toy", "cutlass", lambda: None)


@pytest.mark.parametrize("name", OPERATIONS)
def test_public_functions(name):
    function = getattr(videor1_kernels, name)
    parameters = inspect.signature(function).parameters
    assert parameters["backend"].default == "auto"
    assert parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    assert function.__doc__
    assert "reference" in videor1_kernels.backends(name)
    assert videor1_kernels.chosen_backend(name) in videor1_kernels.backends(name)


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("linear_logprob", "hidden, weight, labels, *, bias=None, temperature=1.0, backend='auto'"),
        ("selective_log_softmax", "logits, index, *, temperature=1.0, backend='auto'"),
        (
            "linear_grpo_loss",
            "hidden, weight, labels, advantages, cu_seqlens, *, old_logp=None, ref_logp=None, bias=None, "
            "loss_type='grpo', beta=0.04, clip_low=None, clip_high=None, kl_clamp=10.0, importance_level='token', "
            "temperature=1.0, max_completion_length=None, num_tokens=None, backend='auto'",
        ),
        (
            "tgrpo_advantages",
            "accuracy, format, lengths, shuffled_accuracy=None, *, rule='margin', alpha=0.3, mu=0.8, "
            "correct_above=0.1, length_bonus=0.2, length_range=(320, 512), normalize='std', eps=0.0001, "
            "apply='reward', backend='auto'",
        ),
        ("prefix_attention", "q, k, v, layout, *, scale=None, backend='auto'"),
    ],
)
def test_signatures_of_the_contract(name, signature):
    bare = inspect.signature(getattr(videor1_kernels, name))
    bare = bare.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in bare.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    assert str(bare) == f"({signature})"


def test_a_call_is_remembered():
    videor1_kernels.selective_log_softmax(torch.zeros(1, 2), torch.zeros(1).long(), backend="reference")
    assert videor1_kernels.last_backend("selective_log_softmax") == "reference"


def test_import_needs_neither_transformers_nor_the_trainer():
    code = (
        "import sys, videor1_kernels; "
        "bad = {'transformers', 'videor1', 'triton', 'av'} & set(sys.modules); "
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_compute_dtype():
    low, single, double = (torch.zeros(1, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    assert checks.compute_dtype(low) == checks.compute_dtype(low, None, single) == torch.float32
    assert checks.compute_dtype(low, double) == torch.float64


@pytest.mark.parametrize("value", [True, "1", None, float("inf"), float("nan"), -1])
def test_check_number_refuses(value):
    with pytest.raises(ValueError, match="op: x: expected a finite number above 0, got"):
        checks.check_number("op", "x", value, above=0)


def test_assert_matches_can_fail():
    one = torch.ones(3)
    for dtype, bound in TOLERANCES.items():
        assert_matches(one.to(dtype), one.double() * (1 + bound.rtol / 2))
        with pytest.raises(AssertionError, match="thing"):
            assert_matches(one.to(dtype), one.double() * (1 + 2 * bound.rtol + 2 * bound.atol), name="thing")


def test_assert_no_worse_can_fail():
    oracle = torch.linspace(1, 2, 9, dtype=torch.float64)
    baseline = (oracle + 1e-3).float()
    assert_no_worse((oracle - 1e-3).float(), baseline, oracle, terms=1)
    with pytest.raises(AssertionError, match="plain torch"):
        assert_no_worse((oracle + 2e-3).float(), baseline, oracle, terms=1)
    with pytest.raises(AssertionError, match="shape"):
        assert_no_worse(baseline[:1], baseline, oracle, terms=1)


def test_assert_no_worse_allows_the_rounding_of_its_terms_and_no_more():
    oracle = torch.linspace(1, 2, 9, dtype=torch.float64)
    lucky = oracle  # a baseline without any error
    eps = torch.finfo(torch.float32).eps
    for terms, scale, allowed in ((1, None, 6), (100, None, 42), (100, 10.0, 210)):  # eps (scale + 2 sqrt(terms) scale)
        assert_no_worse(oracle.float() + 0.9 * allowed * eps, lucky, oracle, terms=terms, scale=scale)
        with pytest.raises(AssertionError, match="limit"):
            assert_no_worse(oracle.float() + 1.1 * allowed * eps, lucky, oracle, terms=terms, scale=scale)
    half, half_eps = torch.bfloat16, torch.finfo(torch.bfloat16).eps  # a sum in fp32, rounded once when it is stored
    assert_no_worse((oracle + half_eps).to(half), lucky, oracle, terms=100)
    with pytest.raises(AssertionError, match="limit"):
        assert_no_worse((oracle + 4 * half_eps).to(half), lucky, oracle, terms=100)


def test_rounding_bounds_what_the_order_of_a_sum_changes():
    """Sums of the same numbers, forwards and backwards, one by one: within the bound, and not by far."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1000, 200, generator=generator) - 0.5
    one, other = (torch.zeros(200) for _ in range(2))
    largest = 0.0
    for forwards, backwards in zip(x, x.flip(0), strict=True):
        one += forwards
        other += backwards
        largest = max(largest, one.abs().max().item(), other.abs().max().item())
    apart = (one - other).abs().max().item()
    assert 0.02 * rounding(1000, largest) < apart < rounding(1000, largest)


def test_oracle_inputs():
    x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    index = torch.ones(2, dtype=torch.int64)
    exact, same, none = oracle_inputs(x, index, None)
    assert exact.dtype == torch.float64
    assert exact.requires_grad
    assert exact.is_leaf
    assert same is index
    assert none is None


def test_poison():
    values = torch.zeros(2, 3, 2)
    poisoned = poison_padding(values, torch.tensor([1, 3]))
    assert poisoned.isnan().any(-1).tolist() == [[False, True, True], [False, False, False]]
    assert not values.isnan().any()
    with poisoned_memory():
        assert torch.empty(4).isnan().all()
        assert torch.empty_like(values).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_largest_tensor_sees_the_backward_pass():
    x = torch.ones(10, requires_grad=True)
    with LargestTensor() as forward:
        y = (x * 2).sum()
    assert forward.numel == 10
    with LargestTensor() as backward:
        y.backward()
    assert backward.numel == 10
    with LargestTensor() as outer:
        torch.outer(torch.ones(7), torch.ones(11))
    assert outer.numel == 77


def test_triton_on_the_cpu_only_through_its_interpreter_and_only_when_asked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.chosen_backend("linear_logprob", "cpu") == "reference"
    assert dispatch.chosen_backend("linear_logprob", "cpu", "triton") == "triton"
    assert dispatch.chosen_backend("linear_logprob", "cuda") == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run on cpu: it needs CUDA tensors"):
        dispatch.chosen_backend("linear_logprob", "cpu", "triton")


def test_fp64_never_reaches_triton():
    assert dispatch.chosen_backend("grpo_loss", "cuda", dtype=torch.float64) == "reference"
    x = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="an input is fp64"):
        videor1_kernels.grpo_loss(x, x[:1], torch.tensor([0, 2]), beta=0, backend="triton")
