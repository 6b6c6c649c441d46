"""The OpenRLHF integration against a dense formula; signature as in OpenRLHF 0.11.2, which need not be installed."""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch

from videor1_kernels.integrations import openrlhf
from videor1_kernels.integrations.openrlhf import log_probs_from_logits
from videor1_kernels.testing import rounding

V = 31


def make_inputs(rows, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return (3 * torch.randn(*rows, V, generator=g)).to(dtype), torch.randint(V, rows, generator=g)


def dense(logits, labels, temperature=1.0):
    scaled = logits.float() / temperature
    return scaled.gather(-1, labels[..., None])[..., 0] - scaled.logsumexp(-1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("rows", [(7,), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_numbers(dtype, rows, temperature):
    logits, labels = make_inputs(rows, dtype)
    results = []
    for function in (log_probs_from_logits, dense):
        leaf = logits.clone().requires_grad_()
        logp = function(leaf, labels, temperature)
        (grad,) = torch.autograd.grad((logp * torch.linspace(-1, 2, logp.numel()).reshape(rows)).sum(), leaf)
        results.append((logp, grad))
    (ours, our_grad), (theirs, their_grad) = results
    assert ours.shape == rows
    assert ours.dtype == torch.float32
    assert our_grad.dtype == dtype
    largest = logits.abs().max().item() / temperature
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding(V, largest))
    stored = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps  # one rounding of the stored gradient
    torch.testing.assert_close(our_grad, their_grad, rtol=stored, atol=2 / temperature * rounding(V, largest))


def test_logits_are_left_as_they_are():
    logits, labels = make_inputs((2, 5))
    before = logits.clone()
    log_probs_from_logits(logits, labels, temperature=0.5)
    assert torch.equal(logits, before)


def test_labels_must_be_tokens():
    logits, labels = make_inputs((2, 5))
    labels[0, 3] = -100
    with pytest.raises(ValueError, match=r"values in \[0, 31\), got 1 outside, the first of them -100"):
        log_probs_from_logits(logits, labels)


def test_labels_of_another_shape_are_refused():
    logits, labels = make_inputs((2, 5))
    for wrong in (labels[:, :4], labels[..., None]):
        with pytest.raises(ValueError, match=r"shape \[2, 5\]"):
            log_probs_from_logits(logits, wrong)


def test_signature():
    parameters = [
        p.replace(annotation=p.empty)
        for p in inspect.signature(log_probs_from_logits).parameters.values()
        if p.kind != p.KEYWORD_ONLY
    ]
    assert str(inspect.Signature(parameters)) == "(logits, labels, temperature=1.0)"


def test_use_puts_it_into_openrlhf_and_back(monkeypatch):
    def theirs(logits, labels, temperature=1.0):
        raise AssertionError("not called")

    modules = {
        name: types.ModuleType(name)
        for name in ("openrlhf", "openrlhf.models", "openrlhf.models.utils", "openrlhf.models.actor")
    }
    for name, module in modules.items():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    utils, actor = modules["openrlhf.models.utils"], modules["openrlhf.models.actor"]
    utils.log_probs_from_logits = actor.log_probs_from_logits = theirs
    monkeypatch.setattr("videor1_kernels.integrations.host.metadata.version", lambda name: "0.11.2")
    logits, labels = make_inputs((2, 5))
    with openrlhf.use(backend="reference"):
        for module in (utils, actor):
            assert torch.equal(module.log_probs_from_logits(logits, labels), log_probs_from_logits(logits, labels))
    assert utils.log_probs_from_logits is actor.log_probs_from_logits is theirs
    with openrlhf.use(backend="no-such-backend"), pytest.raises(ValueError, match="no-such-backend"):
        actor.log_probs_from_logits(logits, labels)
    utils.log_probs_from_logits = lambda logits, labels, scale: None
    with pytest.raises(ImportError, match=r"of openrlhf 0\.11\.2 takes \(logits, labels, scale\), expected"):
        openrlhf.use()
