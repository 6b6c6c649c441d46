"""The registry of backends, and the public surface."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

import videor1_kernels
from videor1_kernels import checks, dispatch

OPERATIONS = (
    "linear_logprob",
    "selective_log_softmax",
    "linear_grpo_loss",
    "grpo_loss",
    "tgrpo_advantages",
    "prefix_attention",
    "prefix_decode_attention",
    "frames_to_patches",
    "add_rms_norm",
    "rotary_append",
    "silu_mul",
    "sigmoid_mul",
    "gated_rms_norm",
    "prefix_gated_delta",
    "prefix_causal_conv",
    "gated_delta_step",
    "causal_conv_step",
)


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch) -> str:
    """An operation with a fast backend that needs CUDA and a reference."""
    monkeypatch.setattr(dispatch, "_registry", dict(dispatch._registry))
    monkeypatch.setattr(dispatch, "_last", {})

    def unavailable(device: torch.device, dtype: torch.dtype | None) -> str | None:
        return None if device.type == "cuda" else "it needs CUDA"

    dispatch.register("toy", "triton", lambda: "fast", unavailable=unavailable)
    dispatch.register("toy", "reference", lambda: "slow")
    return "toy"


def test_auto_takes_the_first_that_can_run(operation: str) -> None:
    assert dispatch.chosen_backend(operation, "cpu") == "reference"
    assert dispatch.chosen_backend(operation, "cuda") == "triton"
    assert dispatch.resolve(operation, "auto", "cuda")() == "fast"
    assert dispatch.resolve(operation, "auto", "cpu")() == "slow"
    assert dispatch.resolve(operation, "reference", "cuda")() == "slow"


def test_an_explicit_backend_never_falls_back(operation: str) -> None:
    with pytest.raises(ValueError, match="toy: backend 'triton' cannot run on cpu: it needs CUDA; usable here: 'auto'"):
        dispatch.resolve(operation, "triton", "cpu")
    with pytest.raises(ValueError, match="on cpu: this version of videor1_kernels has no native implementation"):
        dispatch.resolve(operation, "native", "cpu")
    with pytest.raises(ValueError, match=r"toy: backend: expected one of .* got 'tritn' \(did you mean 'triton'\?\)"):
        dispatch.resolve(operation, "tritn", "cuda")


def test_auto_is_an_error_where_all_that_it_may_take_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_registry", dict(dispatch._registry))
    dispatch.register("toy", "fla", lambda: "fast", unavailable=lambda device, dtype: "it is not installed")
    dispatch.register("toy", "reference", lambda: "slow", only_explicit=lambda device, dtype: dtype == torch.float16)
    assert dispatch.chosen_backend("toy", "cuda", dtype=torch.float32) == "reference"
    with pytest.raises(
        ValueError, match=r"toy: backend 'auto' cannot run on cuda: it is not installed; usable here: 'reference'$"
    ):
        dispatch.resolve("toy", "auto", "cuda", torch.float16)
    assert dispatch.resolve("toy", "reference", "cuda", torch.float16)() == "slow"


def test_what_ran_can_be_asked(operation: str) -> None:
    assert dispatch.last_backend(operation) is None
    dispatch.resolve(operation, "auto", "cuda")
    assert dispatch.last_backend(operation) == "triton"
    with pytest.raises(ValueError, match="cannot run"):
        dispatch.resolve(operation, "triton", "cpu")
    assert dispatch.last_backend(operation) == "triton"
    assert dispatch.backends(operation, "cpu") == {"triton": "it needs CUDA", "reference": None}
    with pytest.raises(ValueError, match=r"expected the name of an operation \(.*linear_logprob.*\), got 'linear'"):
        dispatch.chosen_backend("linear")


def test_register_refuses_doubles_and_unknown_names(operation: str) -> None:
    with pytest.raises(ValueError, match="toy has a 'reference' backend already"):
        dispatch.register("toy", "reference", lambda: None)
    with pytest.raises(
        ValueError, match="backend: expected one of 'reference', 'triton', 'native', 'fla', got 'cutlass'"
    ):
        dispatch.register("toy", "cutlass", lambda: None)


@pytest.mark.parametrize("name", OPERATIONS)
def test_public_functions(name: str) -> None:
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
        (
            "linear_logprob",
            "hidden, weight, labels, *, bias=None, temperature=1.0, softcap=None, vocab_shard=None, backend='auto'",
        ),
        ("selective_log_softmax", "logits, index, *, temperature=1.0, backend='auto'"),
        (
            "linear_grpo_loss",
            "hidden, weight, labels, advantages, cu_seqlens, *, old_logp=None, ref_logp=None, rollout_logp=None, "
            "token_weight=None, importance_weight=None, completion_mask=None, bias=None, loss_type='grpo', beta=0.04, "
            "clip_low=None, clip_high=None, delta=None, clip_dual=None, sapo_temperature_pos=1.0, "
            "sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, "
            "use_bias_correction_kl=False, entropy_coef=0.0, kl_clamp=10.0, importance_level='token', "
            "importance_correction='none', correction_mode='truncate', correction_min=None, correction_max=2.0, "
            "temperature=1.0, softcap=None, vocab_shard=None, max_completion_length=None, num_tokens=None, "
            "backend='auto'",
        ),
        (
            "tgrpo_advantages",
            "accuracy, format, lengths, shuffled_accuracy=None, *, rule='margin', alpha=0.3, mu=0.8, "
            "correct_above=0.1, length_bonus=0.2, length_range=(320, 512), normalize='std', eps=0.0001, "
            "apply='reward', baseline='mean', batch_std=None, p_mask=None, backend='auto'",
        ),
        ("prefix_attention", "q, k, v, layout, *, scale=None, backend='auto'"),
    ],
)
def test_signatures_of_the_contract(name: str, signature: str) -> None:
    bare = inspect.signature(getattr(videor1_kernels, name))
    bare = bare.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in bare.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    assert str(bare) == f"({signature})"


def test_a_call_is_remembered() -> None:
    videor1_kernels.selective_log_softmax(torch.zeros(1, 2), torch.zeros(1).long(), backend="reference")
    assert videor1_kernels.last_backend("selective_log_softmax") == "reference"


def test_import_needs_neither_transformers_nor_the_trainer() -> None:
    code = (
        "import sys, videor1_kernels; "
        "bad = {'transformers', 'videor1', 'triton', 'av'} & set(sys.modules); "
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("op", ["prefix_attention", "prefix_decode_attention"])
def test_attention_on_a_card_is_triton_s_in_16_bits_alone(op: str) -> None:
    assert dispatch.chosen_backend(op, "cuda", dtype=torch.float32) == "reference"
    assert dispatch.chosen_backend(op, "cuda", dtype=torch.bfloat16) == "triton"
    with pytest.raises(ValueError, match="its kernels take bf16 and fp16 inputs, and an input is fp32"):
        dispatch.chosen_backend(op, "cuda", "triton", torch.float32)


def test_triton_on_the_cpu_only_through_its_interpreter_and_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.chosen_backend("linear_logprob", "cpu") == "reference"
    assert dispatch.chosen_backend("linear_logprob", "cpu", "triton") == "triton"
    assert dispatch.chosen_backend("linear_logprob", "cuda") == "triton"
    assert dispatch.chosen_backend("grpo_loss", "cuda", dtype=torch.float64) == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run on cpu: it needs CUDA tensors"):
        dispatch.chosen_backend("linear_logprob", "cpu", "triton")


def test_compute_dtype() -> None:
    low, single, double = (torch.zeros(1, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    assert checks.compute_dtype(low) == checks.compute_dtype(low, None, single) == torch.float32
    assert checks.compute_dtype(low, double) == torch.float64
