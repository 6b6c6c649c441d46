"""The verl integration against a dense formula; signatures as in verl 0.9.1, which need not be installed."""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from videor1_kernels.integrations import verl
from videor1_kernels.integrations.verl import FusedLinearForPPO, linear_cross_entropy
from videor1_kernels.testing import rounding

H, V = 16, 37
LARGEST = 30.0  # of the logits, at the lowest temperature


def make_inputs(*rows):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(*rows, H, generator=g), torch.randn(V, H, generator=g) * 0.5
    return hidden, weight, torch.randint(V, rows, generator=g)


def dense(hidden, weight, labels, temperature=1.0):
    """Negated cross entropy and entropy of softmax(hidden weight^T / temperature), shaped as ``labels``."""
    logits = hidden @ weight.T / temperature
    probs = logits.softmax(-1)
    entropy = logits.logsumexp(-1) - (probs * logits).sum(-1)
    return probs.gather(-1, labels[..., None])[..., 0].log(), entropy


def gradients(function, hidden, weight, labels, *args):
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logp, entropy = function(*leaves, labels, *args)
    g = torch.Generator().manual_seed(1)
    total = (logp * torch.randn(logp.numel(), generator=g).reshape(logp.shape)).sum()
    total = total + (entropy * torch.randn(entropy.numel(), generator=g).reshape(entropy.shape)).sum()
    return logp, entropy, *torch.autograd.grad(total, leaves)


def assert_same(ours, theirs):
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        # Log-probs and entropies err by the logits' rounding, gradients by as much relative to themselves.
        scale = LARGEST * (1.0 if i < 2 else other.abs().max().item())
        torch.testing.assert_close(mine, other, rtol=0, atol=rounding(H + V, scale))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("rows", [(11,), (1, 7), (3, 5)])
def test_log_probs_are_flat_and_not_negated(rows, temperature):
    inputs = make_inputs(*rows)
    logp, entropy, *grads = gradients(linear_cross_entropy, *inputs, temperature)
    want_logp, want_entropy, *want_grads = gradients(dense, *inputs, temperature)
    assert logp.shape == entropy.shape == (inputs[2].numel(),)
    assert logp.dtype == entropy.dtype == torch.float32
    assert logp.max() < 0
    assert_same([logp, entropy, *grads], [want_logp.flatten(), want_entropy.flatten(), *want_grads])


@pytest.mark.parametrize("reduction", ["sum", "mean", "Sum"])
def test_reduction_is_of_the_log_probs_alone(reduction):
    inputs = make_inputs(3, 5)

    def reduced(hidden, weight, labels):
        logp, entropy = dense(hidden, weight, labels)
        return logp.mean() if reduction == "mean" else logp.sum(), entropy.flatten()

    ours = gradients(linear_cross_entropy, *inputs, 1.0, reduction)
    assert ours[0].shape == ()
    assert_same(ours, gradients(reduced, *inputs))


def test_a_temperature_per_row_and_int32_labels():
    hidden, weight, labels = make_inputs(3, 5)
    temperature = torch.rand(3, 5, generator=torch.Generator().manual_seed(4)) + 0.5
    ours = linear_cross_entropy(hidden, weight, labels.int(), temperature)
    want = dense(hidden, weight, labels, temperature[..., None])
    assert_same(ours, [x.flatten() for x in want])


def test_ignored_labels_are_zero():
    hidden, weight, labels = make_inputs(6)
    labels[2] = -100
    logp, entropy = linear_cross_entropy(hidden, weight, labels)
    assert (logp == 0).tolist() == (entropy == 0).tolist() == [False, False, True, False, False, False]


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match=r"reduction: expected one of 'none', 'sum', 'mean', got 'means'.*'mean'"):
        linear_cross_entropy(*make_inputs(4), 1.0, "means")


def test_a_group_of_several_processes_is_refused():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        inputs = make_inputs(4)
        with pytest.raises(ValueError, match=r"dist_process_group: expected None or one process.*got 2 processes"):
            linear_cross_entropy(*inputs, 1.0, "none", dist.group.WORLD)
        alone = dist.new_group([0])
        assert_same(linear_cross_entropy(*inputs, 1.0, "none", alone), linear_cross_entropy(*inputs))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rows", [(11,), (3, 5)])
def test_fused_linear_for_ppo(rows):
    inputs = make_inputs(*rows)
    ours = gradients(FusedLinearForPPO(chunk_size=4, impl_backend="liger"), *inputs, 0.7)
    assert ours[0].shape == ours[1].shape == rows
    assert_same(ours, gradients(dense, *inputs, 0.7))
    assert_same(FusedLinearForPPO()(inputs[0], inputs[1], inputs[2].int()), dense(*inputs))


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (linear_cross_entropy, "hidden, weight, labels, temperature=1.0, reduction='none', dist_process_group=None"),
        (FusedLinearForPPO, "chunk_size=512, impl_backend='torch'"),
        (FusedLinearForPPO().forward, "hidden_states, vocab_weights, input_ids, temperature=1.0"),
    ],
)
def test_signatures(function, signature):
    parameters = [
        p.replace(annotation=p.empty)
        for p in inspect.signature(function).parameters.values()
        if p.kind != p.KEYWORD_ONLY
    ]
    assert str(inspect.Signature(parameters)) == f"({signature})"


class LinearCrossEntropy(torch.autograd.Function):
    """As verl declares its own."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
        raise AssertionError("not called")


class TheirModule(torch.nn.Module):
    def __init__(self, chunk_size=512, impl_backend="torch"):
        super().__init__()


@pytest.fixture
def fake_verl(monkeypatch):
    """verl's layout with what it defines where."""
    function = "verl.utils.kernel.linear_cross_entropy"
    module = "verl.utils.experimental.torch_functional"
    user = "verl.models.mcore.model_forward_fused"
    modules = {}
    for leaf in (function, module, user):
        parts = leaf.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            modules[name] = modules.get(name) or types.ModuleType(name)
            modules[name].__path__ = []
            monkeypatch.setitem(sys.modules, name, modules[name])
    modules[function].linear_cross_entropy = modules[user].linear_cross_entropy = LinearCrossEntropy.apply
    modules[module].FusedLinearForPPO = TheirModule
    monkeypatch.setattr("videor1_kernels.integrations.host.metadata.version", lambda name: "0.9.1")
    return modules[function], modules[module], modules[user]


def test_use_puts_both_into_verl_and_back(fake_verl):
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


def test_use_names_a_version_that_takes_other_parameters(fake_verl):
    function, module, _ = fake_verl
    module.FusedLinearForPPO = type("Other", (torch.nn.Module,), {"__init__": lambda self, tile: None})
    with pytest.raises(ImportError, match=r"FusedLinearForPPO of verl 0\.9\.1 takes \(tile\), expected \(chunk_size"):
        verl.use()
    assert function.linear_cross_entropy.__self__ is LinearCrossEntropy


def test_use_without_verl(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    monkeypatch.setattr("videor1_kernels.integrations.host.metadata.version", lambda name: "0.9.1")
    with pytest.raises(ImportError, match=r"verl 0\.9\.1 has no verl\.utils\.kernel\.linear_cross_entropy\."):
        verl.use()
