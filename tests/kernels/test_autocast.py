"""Under autocast the linear head's operations multiply as ``F.linear`` does; the other operations do not notice it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import BOTH, LEAVES, dense, evaluate, make_linear, naive, run_linear
from torch import Tensor
from triton_cases import DEVICE, Head, make_head, upstream

from videor1_kernels import linear_grpo_loss, linear_logprob
from videor1_kernels.testing import assert_matches

# In the interpreter a product of bf16 is wrong, so fp16 stands for both there.
CASES = [("reference", torch.bfloat16), ("reference", torch.float16), ("triton", torch.float16)]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on the padding of interpreted kernels


def cast(head: Head, dtype: torch.dtype) -> Head:
    """The head as autocast takes it, as leaves."""
    made = {name: getattr(head, name) for name in LEAVES}
    return dataclasses.replace(
        head,
        **{n: None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad) for n, x in made.items()},
    )


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(DEVICE, dtype)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_log_probs_are_those_of_rounded_operands_and_gradients_are_not_rounded(
    backend: str, dtype: torch.dtype
) -> None:
    head = make_head(20, 130, 48, torch.float32, bias=True, ignored=True)
    incoming = {"g": upstream(20, seed=0), "e": upstream(20, seed=1)}
    with autocast(dtype):
        ours = evaluate(backend, head, 0.7, **incoming)
    rounded = cast(head, dtype)
    assert all(torch.equal(a, b) for a, b in zip(ours[:2], evaluate(backend, rounded, 0.7), strict=False))
    exact = evaluate("dense", rounded.oracle(), 0.7, **{n: x.double() for n, x in incoming.items()})
    for name, mine, theirs in zip(LEAVES, ours[2:], exact[2:], strict=True):
        assert mine.dtype == torch.float32
        # d_logits are fp16 in the kernels' products; the reference rounds nothing.
        assert_matches(mine, theirs, dtype if backend == "triton" else torch.float32, name)
        assert not torch.equal(mine, mine.to(dtype).float()), f"{name} went through {dtype}"


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_a_loss_is_that_of_rounded_operands_and_its_gradients_are_not_rounded(backend: str, dtype: torch.dtype) -> None:
    head, case = make_linear(torch.float32, (40, 1, 0, 25), bias=True, ignored=True)
    with autocast(dtype):
        out, grads = run_linear(backend, head, case, 3.0, **BOTH)
    rounded = cast(head, dtype)
    wanted, _ = run_linear(backend, rounded, case, 3.0, **BOTH)
    for name in ("loss", "logp", "entropy", "kl", "clip_fraction", "skipped"):
        assert torch.equal(getattr(out, name), getattr(wanted, name)), name
    exact = rounded.oracle()
    logp, _ = dense(exact.hidden, exact.weight, exact.labels, exact.bias)
    arguments: dict[str, Any] = {n: x.double() if x.is_floating_point() else x for n, x in case.items()}
    loss, *_ = naive(logp, **arguments, mask=exact.labels != -100, **BOTH)
    for name, mine, theirs in zip(LEAVES, grads, torch.autograd.grad(3 * loss, exact.leaves), strict=True):
        assert mine.dtype == torch.float32
        assert_matches(mine, theirs, dtype if backend == "triton" else torch.float32, name)
        assert not torch.equal(mine, mine.to(dtype).float()), f"{name} went through {dtype}"


@pytest.mark.parametrize(("hidden", "weight"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_the_product_is_that_of_a_linear_layer(hidden: torch.dtype, weight: torch.dtype) -> None:
    """torch's own layer rounds its logits to bf16: eight bits of logits up to 8, with their sum's error in the norm."""
    torch.manual_seed(0)
    x, w, labels = torch.randn(50, 64, dtype=hidden), torch.randn(40, 64, dtype=weight) / 8, torch.randint(40, (50,))
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(x, w)
        ours, _ = linear_logprob(x, w, labels)
    assert logits.dtype == torch.bfloat16
    theirs = logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * 8 * 2**-9)
    plain = (x.double() @ w.double().T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    rounded = (x.bfloat16().double() @ w.bfloat16().double().T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert (ours - rounded).abs().max() < 0.05 * (ours - plain).abs().max()


@pytest.mark.parametrize("wide", LEAVES)
def test_fp64_stays_fp64(wide: str) -> None:
    head = make_head(5, 11, 8, torch.float32, bias=True)
    head = dataclasses.replace(head, **{wide: getattr(head, wide).detach().double().requires_grad_()})
    with autocast(torch.bfloat16):
        again = evaluate("reference", head, g=upstream(5, seed=0))
    for a, b in zip(again, evaluate("reference", head, g=upstream(5, seed=0)), strict=True):
        assert torch.equal(a, b)
    assert again[0].dtype == torch.float64


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_compiled_graph_follows_autocast(backend: str) -> None:
    head, case = make_linear(torch.float32)

    def call(weight: Tensor) -> Tensor:
        with autocast(torch.float16):
            logp, _ = linear_logprob(head.hidden.detach(), weight, head.labels, backend=backend)
            loss = linear_grpo_loss(head.hidden.detach(), weight, head.labels, **case, backend=backend).loss
            return logp.sum() + loss

    torch.compiler.reset()
    eager, compiled = (
        torch.autograd.grad(f(head.weight), head.weight) for f in (call, torch.compile(call, backend="aot_eager"))
    )
    assert torch.equal(eager[0], compiled[0])
