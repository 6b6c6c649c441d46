"""The verl integration against a dense formula; signatures as in verl 0.9.1, which need not be installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hosts import fake_host, positional, set_version
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from videor1_kernels.integrations import verl
from videor1_kernels.integrations.verl import FusedLinearForPPO, linear_cross_entropy
from videor1_kernels.testing import rounding

H, V = 16, 37
LARGEST = 30.0  # of the logits, at the lowest temperature


def make_inputs(*rows: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(*rows, H, generator=g), torch.randn(V, H, generator=g) * 0.5
    return hidden, weight, torch.randint(V, rows, generator=g)


def dense(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Negated cross entropy and entropy of softmax(hidden weight^T / temperature), shaped as ``labels``."""
    logits = hidden @ weight.T / temperature
    probs = logits.softmax(-1)
    entropy = logits.logsumexp(-1) - (probs * logits).sum(-1)
    return probs.gather(-1, labels[..., None])[..., 0].log(), entropy


def gradients(
    function: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, weight: Tensor, labels: Tensor, *args: Any
) -> list[Tensor]:
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logp, entropy = function(*leaves, labels, *args)
    g = torch.Generator().manual_seed(1)
    total = (logp * torch.randn(logp.numel(), generator=g).reshape(logp.shape)).sum()
    total = total + (entropy * torch.randn(entropy.numel(), generator=g).reshape(entropy.shape)).sum()
    return [logp, entropy, *torch.autograd.grad(total, leaves)]


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        # Log-probs and entropies err by the logits' rounding, gradients by as much relative to themselves.
        scale = LARGEST * (1.0 if i < 2 else other.abs().max().item())
        torch.testing.assert_close(mine, other, rtol=0, atol=rounding(H + V, scale))


@pytest.mark.grid(rows=[(11,), (1, 7), (3, 5)], temperature=[0.3, 1.0, 2.0])
def test_log_probs_are_flat_and_not_negated(rows: tuple[int, ...], temperature: float) -> None:
    inputs = make_inputs(*rows)
    logp, entropy, *grads = gradients(linear_cross_entropy, *inputs, temperature)
    want_logp, want_entropy, *want_grads = gradients(dense, *inputs, temperature)
    assert logp.shape == entropy.shape == (inputs[2].numel(),)
    assert logp.dtype == entropy.dtype == torch.float32
    assert logp.max() < 0
    assert_same([logp, entropy, *grads], [want_logp.flatten(), want_entropy.flatten(), *want_grads])


@pytest.mark.parametrize("reduction", ["sum", "mean", "Sum"])
def test_reduction_is_of_the_log_probs_alone(reduction: str) -> None:
    inputs = make_inputs(3, 5)

    def reduced(*args: Tensor) -> tuple[Tensor, Tensor]:
        logp, entropy = dense(*args)
        return logp.mean() if reduction == "mean" else logp.sum(), entropy.flatten()

    ours = gradients(linear_cross_entropy, *inputs, 1.0, reduction)
    assert ours[0].shape == ()
    assert_same(ours, gradients(reduced, *inputs))
    with pytest.raises(ValueError, match=r"reduction: expected one of 'none', 'sum', 'mean', got 'means'.*'mean'"):
        linear_cross_entropy(*inputs, 1.0, "means")


def test_a_temperature_per_row_int32_labels_and_ignored_ones() -> None:
    hidden, weight, labels = make_inputs(3, 5)
    temperature = torch.rand(3, 5, generator=torch.Generator().manual_seed(4)) + 0.5
    ours = linear_cross_entropy(hidden, weight, labels.int(), temperature)
    want = dense(hidden, weight, labels, temperature[..., None])
    assert_same(ours, [x.flatten() for x in want])
    labels[0, 2] = -100
    for result in linear_cross_entropy(hidden, weight, labels):
        assert (result == 0).nonzero().tolist() == [[2]]


def test_a_group_of_one_process_is_none() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        inputs, alone = make_inputs(4), dist.new_group([0])
        assert_same(linear_cross_entropy(*inputs, 1.0, "none", alone), linear_cross_entropy(*inputs))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rows", [(11,), (3, 5)])
def test_fused_linear_for_ppo(rows: tuple[int, ...]) -> None:
    inputs = make_inputs(*rows)
    ours = gradients(FusedLinearForPPO(chunk_size=4, impl_backend="liger"), *inputs, 0.7)
    assert ours[0].shape == ours[1].shape == rows
    assert_same(ours, gradients(dense, *inputs, 0.7))
    assert_same(FusedLinearForPPO()(inputs[0], inputs[1], inputs[2].int()), dense(*inputs))


def test_signatures() -> None:
    function = "hidden, weight, labels, temperature=1.0, reduction='none', dist_process_group=None"
    assert positional(linear_cross_entropy) == f"({function})"
    assert positional(FusedLinearForPPO) == "(chunk_size=512, impl_backend='torch')"
    assert positional(FusedLinearForPPO.forward) == "(self, hidden_states, vocab_weights, input_ids, temperature=1.0)"


class LinearCrossEntropy(torch.autograd.Function):
    """As verl declares its own."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):  # type: ignore[no-untyped-def]
        raise AssertionError("not called")


class TheirModule(torch.nn.Module):
    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()


@pytest.fixture
def fake_verl(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """verl's layout: where each is defined, and a module that has imported the function."""
    function, module, user = modules = fake_host(
        monkeypatch,
        "0.9.1",
        "verl.utils.kernel.linear_cross_entropy",
        "verl.utils.experimental.torch_functional",
        "verl.models.mcore.model_forward_fused",
    )
    function.linear_cross_entropy = user.linear_cross_entropy = LinearCrossEntropy.apply
    module.FusedLinearForPPO = TheirModule
    return modules


def test_use_puts_both_into_verl_and_back(fake_verl: list[Any]) -> None:
    function, module, user = fake_verl
    theirs = function.linear_cross_entropy
    inputs = make_inputs(4)
    with verl.use(backend="reference"):
        for place in (function, user):
            assert_same(place.linear_cross_entropy(*inputs, 1.0, "none"), linear_cross_entropy(*inputs))
        assert isinstance(module.FusedLinearForPPO(impl_backend="torch"), FusedLinearForPPO)
        assert module.FusedLinearForPPO(4).backend == "reference"
        with verl.use(backend="no-such-backend"), pytest.raises(ValueError, match="no-such-backend"):
            module.FusedLinearForPPO()(*inputs)
    assert function.linear_cross_entropy is user.linear_cross_entropy is theirs
    assert module.FusedLinearForPPO is TheirModule


def test_use_without_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verl", None)
    set_version(monkeypatch, "0.9.1")
    with pytest.raises(ImportError, match=r"verl 0\.9\.1 has no verl\.utils\.kernel\.linear_cross_entropy\."):
        verl.use()
