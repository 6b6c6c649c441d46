"""LigerFusedLinearGRPOLoss: the numbers of the installed liger-kernel on the same inputs, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hosts import positional
from liger_kernel import chunked_loss
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Theirs
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from videor1_kernels import dispatch
from videor1_kernels.integrations.liger import LigerFusedLinearGRPOLoss as Ours
from videor1_kernels.integrations.liger import use
from videor1_kernels.testing import rounding

B, T, H, V = 4, 7, 16, 29
TERMS = H + V + B * T  # of a logit, a softmax, and the loss
LARGEST = 10.0  # of the logits
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")
Inputs = dict[str, Any]
Results = tuple[Tensor, Sequence[Tensor], dict[str, Tensor]]


def make_inputs(**changes: Any) -> Inputs:
    """Row 0 whole, row 1 with a hole, row 2 padded, row 3 without tokens; ratios on both sides of the clip range."""
    g = torch.Generator().manual_seed(3)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, 2:4] = 0
    mask[2, 3:] = 0
    mask[3] = 0
    inputs = {
        "_input": torch.randn(B, T, H, generator=g),
        "lin_weight": torch.randn(V, H, generator=g) * 0.5,
        "selected_token_ids": torch.randint(V, (B, T), generator=g),
        "attention_mask": mask,
        "advantages": torch.tensor([1.3, -0.8, 0.4, 0.6]),
        "bias": torch.randn(V, generator=g),
    }
    exact = (inputs["_input"] @ inputs["lin_weight"].T + inputs["bias"]).log_softmax(-1)
    exact = exact.gather(-1, inputs["selected_token_ids"][..., None])[..., 0]
    inputs["old_per_token_logps"] = exact + 0.4 * torch.randn(B, T, generator=g)
    inputs["ref_per_token_logps"] = exact + 0.7 * torch.randn(B, T, generator=g)
    return inputs | changes


def run(loss_class: Any, inputs: Inputs, frozen: Sequence[str] = (), **options: Any) -> Results:
    """Loss, metrics and gradients."""
    inputs = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    leaves = [n for n in ("_input", "lin_weight", "bias") if inputs[n] is not None and n not in frozen]
    for name in leaves:
        inputs[name].requires_grad_()
    loss, metrics = loss_class(compiled=False, **options)(**inputs)
    (loss * 1.7).backward()
    return loss, metrics, {name: inputs[name].grad for name in leaves}


def assert_same(inputs: Inputs, frozen: Sequence[str] = (), **options: Any) -> Results:
    loss, metrics, grads = run(Ours, inputs, frozen, **options)
    their_loss, their_metrics, their_grads = run(Theirs, inputs, frozen, **options)
    assert loss.dtype == their_loss.dtype == torch.float32
    assert loss.shape == ()
    assert not any(metric.requires_grad for metric in metrics)
    assert len(metrics) == len(their_metrics)
    for ours, theirs in zip((loss, *metrics), (their_loss, *their_metrics), strict=True):
        bound = rounding(TERMS, LARGEST)  # of a log-prob; what is exponential in it errs by as much relative to itself
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)
    for name, theirs in their_grads.items():
        # A ratio errs by its log-prob's rounding relative to itself; entries are sums whose terms cancel.
        bound = rounding(TERMS, LARGEST * theirs.abs().max().item())
        torch.testing.assert_close(grads[name], theirs, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
    return loss, metrics, grads


@pytest.mark.grid(
    loss_type=LOSS_TYPES,
    level=LEVELS,
    delta=[None, 1.3, 0.9],
    by_ratio=[False, True],
    ratio=[None, (B, T), (B, 1), (B,)],
    old=[True, False],
)
def test_same_numbers(
    loss_type: str, level: str, delta: float | None, by_ratio: bool, ratio: tuple[int, ...] | None, old: bool
) -> None:
    if loss_type in ("cispo", "sapo", "vespo"):
        level = "token"
    if level == "sequence" and ratio is not None:
        ratio, by_ratio = (B, 1), False
    inputs = make_inputs()
    if ratio is not None:
        inputs["vllm_is_ratio"] = torch.rand(ratio, generator=torch.Generator().manual_seed(1)) + 0.3
        if ratio == (B, T):  # TRL's is 1 where a token does not count, and VESPO multiplies them all
            inputs["vllm_is_ratio"][inputs["attention_mask"] == 0] = 1.0
    if not old:
        inputs["old_per_token_logps"] = None
    options = {"loss_type": loss_type, "importance_sampling_level": level, "delta": delta, "beta": 0.07}
    options |= {"use_bias_correction_kl": by_ratio, "max_completion_length": 11}
    _, (kl, clip_ratio), grads = assert_same(inputs, **options)
    assert kl > 0.01
    assert 0 <= clip_ratio < 1
    if loss_type != "luspo":  # whose mean is of all positions
        assert grads["_input"][1, 2:4].abs().max() == 0  # the hole
    assert grads["_input"][1, 4:].abs().max() > 0  # and what follows it


def test_sequence_level_clips_whole_completions() -> None:
    options = {"importance_sampling_level": "sequence", "epsilon_low": 0.001, "epsilon_high": 0.001}
    _, (_, clip_ratio), grads = assert_same(make_inputs(), loss_type="grpo", **options)
    assert clip_ratio > 0
    assert grads["_input"].abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({}, {"beta": 0.0, "use_ref_model": False}),
        ({}, {"beta": 0.0, "use_ref_model": False, "use_bias_correction_kl": True}),  # no KL term to weight
        ({}, {"use_ref_model": False, "use_bias_correction_kl": True}),
        ({}, {"temperature": 0.3}),
        ({}, {"temperature": 2.0, "importance_sampling_level": "sequence"}),
        ({}, {"epsilon_low": 0.05, "epsilon_high": 0.6}),
        ({}, {"use_ref_model": False, "beta": 0.5}),  # the KL term is 0, and is reported
        ({}, {"chunk_size": 3, "loss_type": "bnpo"}),
        ({}, {"sapo_temperature_pos": 3.0, "vespo_k_pos": 1.0}),  # of other loss types: no effect in either
        ({}, {"sapo_temperature_pos": 3.0, "sapo_temperature_neg": 0.5, "loss_type": "sapo"}),
        ({}, {"vespo_k_pos": 1.0, "vespo_lambda_neg": 1.5, "loss_type": "vespo"}),
        ({}, {"epsilon_high": 1.2, "loss_type": "cispo"}),
        ({}, {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0}),
        ({}, {"loss_type": "luspo", "importance_sampling_level": "sequence", "use_bias_correction_kl": True}),
        ({}, {"loss_type": "luspo", "use_ref_model": False, "temperature": 0.7}),
        ({}, {"loss_type": "luspo", "beta": 0.0, "delta": 1.3}),
        ({"bias": None}, {"frozen": ("lin_weight",)}),
        ({"ref_input": torch.ones(B, T, H), "ref_weight": torch.ones(V, H)}, {}),  # given log-probs win
        *(
            ({"num_items_in_batch": n}, {"loss_type": "dapo"})
            for n in (40, 40.0, torch.tensor(40), torch.tensor(40.0), 0)
        ),
        ({}, {"loss_type": "dapo"}),
    ],
)
@pytest.mark.filterwarnings("ignore:Both ref_per_token_logps and ref_input")  # Liger's
def test_same_numbers_with_options(changes: dict[str, Any], options: dict[str, Any]) -> None:
    assert_same(make_inputs(**changes), **options)


def test_a_warning_where_the_reference_comes_twice() -> None:
    inputs = make_inputs(ref_input=torch.ones(B, T, H), ref_weight=torch.ones(V, H))
    with pytest.warns(UserWarning, match="Both ref_per_token_logps and ref_input are provided"):
        run(Ours, inputs)


def test_on_policy_without_old_log_probs() -> None:
    for level in LEVELS:
        _, (_, clip_ratio), _ = assert_same(make_inputs(old_per_token_logps=None), importance_sampling_level=level)
        assert clip_ratio == 0


@pytest.mark.parametrize("num_items", [40, None])
def test_dapo_normaliser_of_several_processes(num_items: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    monkeypatch.setattr(dist, "all_reduce", lambda x, **_: x.mul_(3))  # the other process holds twice the tokens
    try:
        loss, _, _ = assert_same(make_inputs(num_items_in_batch=num_items), loss_type="dapo")
    finally:
        dist.destroy_process_group()
    tokens = 15  # of make_inputs
    alone, _, _ = run(Ours, make_inputs(num_items_in_batch=tokens), loss_type="dapo")
    torch.testing.assert_close(loss, alone * tokens / ((num_items or 3 * tokens) / 2))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_dtypes(dtype: torch.dtype) -> None:
    inputs = make_inputs()
    wanted = run(Ours, inputs)[0]
    assert torch.equal(run(Ours, inputs | {"attention_mask": inputs["attention_mask"].to(dtype)})[0], wanted)


def test_reference_from_its_hidden_states() -> None:
    g = torch.Generator().manual_seed(5)
    inputs = make_inputs(
        ref_per_token_logps=None,
        ref_input=torch.randn(B, T, H, generator=g),
        ref_weight=torch.randn(V, H, generator=g) * 0.5,
        ref_bias=torch.randn(V, generator=g),
    )
    _, (kl, _), _ = assert_same(inputs, temperature=0.8)
    assert kl > 0.1
    inputs["ref_weight"].requires_grad_()
    run(Ours, inputs)
    assert inputs["ref_weight"].grad is None


def test_kl_is_not_clamped() -> None:
    inputs = make_inputs()
    inputs["ref_per_token_logps"] = inputs["ref_per_token_logps"] + 14
    _, (kl, _), _ = assert_same(inputs)
    assert kl > 1e5  # a clamp at 10 nats would stop at 22,015


def test_nothing_counts() -> None:
    inputs = make_inputs(attention_mask=torch.zeros(B, T, dtype=torch.long))
    for loss_type in LOSS_TYPES:
        loss, _, grads = assert_same(inputs, loss_type=loss_type, max_completion_length=5)
        assert loss == 0
        assert all(grad.abs().max() == 0 for grad in grads.values())


def test_what_masked_positions_hold_does_not_matter() -> None:
    inputs = make_inputs()
    loss, _, grads = run(Ours, inputs)
    out = inputs["attention_mask"] == 0
    for name, poison in (
        ("_input", torch.nan),
        ("selected_token_ids", -100),
        ("old_per_token_logps", torch.inf),
        ("ref_per_token_logps", torch.nan),
    ):
        inputs[name][out] = poison
    poisoned, _, poisoned_grads = run(Ours, inputs)
    assert torch.equal(loss, poisoned)
    assert all(torch.equal(grad, poisoned_grads[name]) for name, grad in grads.items())


def test_autocast_runs_the_head_in_its_dtype() -> None:
    inputs = make_inputs()
    rounded = inputs | {n: inputs[n].bfloat16() for n in ("_input", "lin_weight", "bias")}
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, grads = run(Ours, inputs)
    wanted, _, _ = run(Ours, rounded)
    assert torch.equal(loss, wanted)
    assert not torch.equal(loss, run(Ours, inputs)[0])
    assert all(grad.dtype == torch.float32 for grad in grads.values())


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_arguments_are_those_of_the_installed_liger(method: str) -> None:
    assert positional(getattr(Ours, method)) == positional(getattr(Theirs, method))


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"loss_type": "luspos"}, {}, "loss_type.*did you mean 'luspo'"),
        (
            {"loss_type": "sapo", "importance_sampling_level": "sequence"},
            {},
            "Sequence-level importance sampling is not supported for loss_type 'sapo'.*'token'",
        ),
        ({"sapo_temperature_pos": 0.0}, {}, "sapo_temperature_pos: expected a finite number above 0"),
        ({"importance_sampling_level": "tokens"}, {}, "importance_sampling_level.*did you mean 'token'"),
        ({"delta": -4.0}, {}, r"delta: expected a finite number above 0, got -4\.0"),
        (
            {"use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
            {"vllm_is_ratio": torch.ones(B)},
            "use_bias_correction_kl: expected False at sequence level with a vllm_is_ratio",
        ),
        (
            {"importance_sampling_level": "sequence"},
            {"vllm_is_ratio": torch.ones(B, T)},
            "vllm_is_ratio: .*at sequence",
        ),
        ({"loss_type": "dr_grpo"}, {}, "max_completion_length"),
        ({"backend": "no-such-backend"}, {}, "no-such-backend"),
        ({}, {"vllm_is_ratio": torch.ones(B, T + 1)}, r"vllm_is_ratio: expected shape \[4, 7\], \[4, 1\] or \[4\]"),
        ({}, {"ref_per_token_logps": None}, "ref_per_token_logps: expected a tensor, or ref_input and ref_weight"),
        ({}, {"attention_mask": torch.full((B, T), 0.5)}, "attention_mask: expected 0 and 1 only"),
        ({}, {"attention_mask": torch.ones(B, T + 1)}, r"attention_mask: expected shape \[4, 7\], got \[4, 8\]"),
        ({}, {"old_per_token_logps": torch.ones(B)}, r"old_per_token_logps: expected shape \[4, 7\], got \[4\]"),
        ({}, {"_input": torch.ones(B * T, H)}, r"_input: expected shape \[B, T, H\], got \[28, 16\]"),
        ({}, {"advantages": torch.ones(B, T)}, "advantages"),
    ],
)
def test_what_is_refused(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ours(**options)(**make_inputs(**changes))


def test_use_puts_it_into_liger_and_back() -> None:
    with use(backend="reference"):
        loss = chunked_loss.LigerFusedLinearGRPOLoss(beta=0.1)
        assert isinstance(loss, Ours)
        assert (loss.backend, loss.beta) == ("reference", 0.1)
    assert chunked_loss.LigerFusedLinearGRPOLoss is Theirs


def test_backend_is_handed_on() -> None:
    Ours(backend="reference")(**make_inputs())
    assert dispatch.last_backend("linear_grpo_loss") == "reference"
