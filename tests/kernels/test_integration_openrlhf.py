"""The OpenRLHF integration against a dense formula; signature as in OpenRLHF 0.11.2, which need not be installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosts import fake_host, positional
from torch import Tensor

from videor1_kernels.integrations import openrlhf
from videor1_kernels.integrations.openrlhf import log_probs_from_logits
from videor1_kernels.testing import rounding

V = 31


def make_inputs(rows: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return (3 * torch.randn(*rows, V, generator=g)).to(dtype), torch.randint(V, rows, generator=g)


def dense(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    scaled = logits.float() / temperature
    return scaled.gather(-1, labels[..., None])[..., 0] - scaled.logsumexp(-1)


@pytest.mark.grid(
    dtype=[torch.float32, torch.bfloat16, torch.float16], rows=[(7,), (2, 5)], temperature=[0.3, 1.0, 2.0]
)
def test_same_numbers(dtype: torch.dtype, rows: tuple[int, ...], temperature: float) -> None:
    logits, labels = make_inputs(rows, dtype)
    results = []
    for function in (log_probs_from_logits, dense):
        leaf = logits.clone().requires_grad_()
        logp = function(leaf, labels, temperature)
        (grad,) = torch.autograd.grad((logp * torch.linspace(-1, 2, logp.numel()).reshape(rows)).sum(), leaf)
        assert torch.equal(leaf, logits)  # left as they are
        results.append((logp, grad))
    (ours, our_grad), (theirs, their_grad) = results
    assert ours.shape == rows
    assert (ours.dtype, our_grad.dtype) == (torch.float32, dtype)
    largest = logits.abs().max().item() / temperature
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding(V, largest))
    stored = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps  # one rounding of the stored gradient
    torch.testing.assert_close(our_grad, their_grad, rtol=stored, atol=2 / temperature * rounding(V, largest))


def test_labels_are_tokens_one_a_row() -> None:
    logits, labels = make_inputs((2, 5))
    for wrong in (labels[:, :4], labels[..., None]):
        with pytest.raises(ValueError, match=r"shape \[2, 5\]"):
            log_probs_from_logits(logits, wrong)
    labels[0, 3] = -100
    with pytest.raises(ValueError, match=r"values in \[0, 31\), got 1 outside, the first of them -100"):
        log_probs_from_logits(logits, labels)


def test_use_puts_it_into_openrlhf_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Any:
        raise AssertionError("not called")

    assert positional(log_probs_from_logits) == "(logits, labels, temperature=1.0)"
    utils, actor = modules = fake_host(monkeypatch, "0.11.2", "openrlhf.models.utils", "openrlhf.models.actor")
    utils.log_probs_from_logits = actor.log_probs_from_logits = theirs
    logits, labels = make_inputs((2, 5))
    with openrlhf.use(backend="reference"):
        for module in modules:
            assert torch.equal(module.log_probs_from_logits(logits, labels), log_probs_from_logits(logits, labels))
    assert utils.log_probs_from_logits is actor.log_probs_from_logits is theirs
    with openrlhf.use(backend="no-such-backend"), pytest.raises(ValueError, match="no-such-backend"):
        actor.log_probs_from_logits(logits, labels)
    utils.log_probs_from_logits = lambda logits, labels, scale: None
    with pytest.raises(ImportError, match=r"of openrlhf 0\.11\.2 takes \(logits, labels, scale\), expected"):
        openrlhf.use()
