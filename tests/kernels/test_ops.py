"""The torch operators: torch.compile without a graph break, opcheck, determinism, and what the registry is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import videor1_kernels as vk
from videor1_kernels.group_advantage.ops import tgrpo_advantages_op
from videor1_kernels.grpo_loss import reference
from videor1_kernels.grpo_loss.ops import grpo_loss_op, linear_grpo_loss_op
from videor1_kernels.linear_logprob.ops import (
    linear_logprob_backward_op,
    linear_logprob_op,
    selective_backward_op,
    selective_op,
)
from videor1_kernels.prefix_attention.ops import prefix_attention_backward_op, prefix_attention_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
CU = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=DEVICE)
ADVANTAGES = torch.tensor([1.0, 2.0, -1.0], device=DEVICE)
# A call returns what is differentiated and what else it gives; with it come the inputs that have gradients.
Call = tuple[Callable[..., tuple[Tensor, tuple[Any, ...]]], list[Tensor]]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on the padding of interpreted kernels


def case() -> tuple[list[Tensor], Tensor]:
    """(hidden [9, 8], weight [21, 8], bias [21]), labels [9]."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in ((9, 8), (21, 8), (21,))]
    labels = torch.randint(21, (9,))
    labels[2] = -100
    return tensors, labels.to(DEVICE)


def linear(backend: str) -> Call:
    inputs, labels = case()

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        logp, entropy = vk.linear_logprob(hidden, weight, labels, bias=bias, temperature=0.7, backend=backend)
        return logp.sum() + 0.1 * entropy.square().sum(), (logp,)

    return call, inputs


def row_temperature(backend: str) -> Call:
    inputs, labels = case()
    temperature = torch.linspace(0.5, 2, 9, device=DEVICE)

    def call(hidden: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        logp, _ = vk.linear_logprob(hidden, weight, labels, temperature=temperature, backend=backend)
        return logp.sum(), (logp,)

    return call, inputs[:2]


def selective(backend: str) -> Call:
    torch.manual_seed(0)
    index = torch.randint(17, (2, 5, 3), device=DEVICE)

    def call(logits: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        logp = vk.selective_log_softmax(logits, index, temperature=1.3, backend=backend)
        return logp.square().sum(), (logp,)

    return call, [torch.randn(2, 5, 17, device=DEVICE, requires_grad=True)]


def loss(backend: str, level: str = "token") -> Call:
    other = -torch.rand(9, device=DEVICE)
    options = {"old_logp": other, "ref_logp": other, "clip_low": 0.2, "clip_high": 0.2, "backend": backend}

    def call(logp: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        out = vk.grpo_loss(logp, ADVANTAGES, CU, importance_level=level, **options)
        return out.loss, (out.logp, out.kl, out.clip_fraction, out.skipped_rows)

    return call, [(-torch.rand(9, device=DEVICE)).requires_grad_()]


def sequence(backend: str) -> Call:
    return loss(backend, "sequence")


def fused(backend: str) -> Call:
    inputs, labels = case()
    other = -torch.rand(9, device=DEVICE)
    options = {"old_logp": other, "ref_logp": other, "clip_low": 0.2, "temperature": 0.9, "backend": backend}

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        out = vk.linear_grpo_loss(hidden, weight, labels, ADVANTAGES, CU, bias=bias, **options)
        return 2 * out.loss, (out.logp, out.entropy, out.kl, out.clip_fraction, out.skipped_rows)

    return call, inputs


def attention(backend: str) -> Call:
    torch.manual_seed(0)
    layout = vk.PrefixLayout([5, 3], [[2, 4], [3]], DEVICE)
    dtype = torch.float16 if DEVICE == "cuda" and backend == "triton" else torch.float32

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        out = vk.prefix_attention(q, k, v, layout, backend=backend)
        return out.float().square().sum(), (out,)

    return call, [torch.randn(17, heads, 16).to(DEVICE, dtype).requires_grad_() for heads in (2, 1, 1)]


CALLS = [attention, linear, row_temperature, selective, loss, sequence, fused]


def results(call: Callable[..., tuple[Tensor, tuple[Any, ...]]], inputs: list[Tensor]) -> list[Any]:
    """The value, all else that is returned, and the gradients."""
    value, extra = call(*inputs)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in (value, *extra)]
    return [*detached, *torch.autograd.grad(value, inputs)]


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", CALLS)
def test_compiles_without_a_graph_break_to_the_same_bits(make: Callable[[str], Call], backend: str) -> None:
    call, inputs = make(backend)
    eager = results(call, inputs)
    assert_same(results(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs), eager)
    assert_same(results(call, inputs), eager)


@pytest.mark.slow
def test_compiles_with_the_default_compiler() -> None:
    """What users call: inductor, on the backend that ``auto`` takes here."""
    call, inputs = fused("auto")

    def wrapped(*x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        return call(*(v * 2 for v in x))[0].sin(), ()

    for a, b in zip(results(wrapped, inputs), results(torch.compile(wrapped, fullgraph=True), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_advantages_compile(backend: str) -> None:
    torch.manual_seed(0)
    accuracy, form = torch.rand(3, 4, device=DEVICE).round(), torch.ones(3, 4, device=DEVICE)
    lengths = torch.randint(300, 600, (3, 4), device=DEVICE)
    shuffled = torch.rand(3, 2, device=DEVICE).round()

    def call(accuracy: Tensor) -> tuple[Tensor, Tensor]:
        out = vk.tgrpo_advantages(accuracy, form, lengths, shuffled, backend=backend)
        return out.advantages + 1, out.p_shuffled

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(list(compiled(accuracy)), list(call(accuracy)))
    with pytest.raises(ValueError, match="accuracy: expected finite values, got 1 that are NaN or infinite"):
        compiled(accuracy.index_put((torch.tensor([0]), torch.tensor([0])), torch.tensor(torch.nan)))


def test_values_and_backends_are_checked_inside_a_compiled_graph() -> None:
    (hidden, weight, _), labels = case()

    def compiled(backend: str) -> Callable[[Tensor], Tensor]:
        def call(labels: Tensor) -> Tensor:
            return vk.linear_logprob(hidden, weight, labels, backend=backend)[0]

        return torch.compile(call, fullgraph=True, backend="aot_eager")

    call = compiled("auto")
    call(labels)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 21\)"):
        call(labels.masked_fill(labels == labels[0], 21))
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        compiled("trition")(labels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    (hidden, weight, bias), labels = case()
    temperatures = torch.linspace(0.5, 2, 9, device=DEVICE)
    lp, fixed = -torch.rand(9, device=DEVICE), weight.detach()
    options = ("grpo", 0.1, 0.2, 0.3, 10.0, "token", None, None)
    numbers = ("margin", 0.3, 0.8, 0.1, 0.2, 3.0, 6.0, "std", 1e-4, "reward")
    head = (hidden.detach(), fixed, labels, bias.detach(), None, 0.8)
    rewards, shuffled = torch.rand(2, 3, device=DEVICE), torch.rand(2, 2, device=DEVICE)
    logits, index = torch.randn(4, 7, device=DEVICE), torch.randint(7, (4, 2), device=DEVICE)
    logp, kept = selective_op(logits, index, None, 0.8, backend)
    qkv = [x.detach() for x in attention(backend)[1]]
    row = ([5, 3], [2, 1], [2, 4, 3], 0.3)
    checks: list[tuple[Any, tuple[Any, ...]]] = [
        (linear_logprob_op, (hidden, weight, labels, bias, None, 0.8)),
        (linear_logprob_op, (hidden, fixed, labels, None, temperatures, 1.0)),
        (linear_logprob_backward_op, (lp, None, *head, lp, lp.double(), [True, False, True])),
        (selective_op, (logits.clone().requires_grad_(), index, None, 0.8)),
        (selective_backward_op, (torch.ones_like(logp), logits, index, None, 0.8, kept)),
        (grpo_loss_op, (lp.clone().requires_grad_(), ADVANTAGES, CU, lp, lp, labels != -100, *options)),
        (
            linear_grpo_loss_op,
            (hidden, weight, labels, ADVANTAGES, CU, lp, lp, bias, None, 0.8, *options, [True, True, True]),
        ),
        (
            linear_grpo_loss_op,
            (hidden, fixed, labels, ADVANTAGES, CU, None, lp, None, temperatures, 1.0, *options, [True, False, False]),
        ),
        (tgrpo_advantages_op, (rewards, rewards, (9 * rewards).long(), shuffled, *numbers)),
        (prefix_attention_op, (*(x.clone().requires_grad_() for x in qkv), *row)),
        (prefix_attention_backward_op, (qkv[0], *qkv, *prefix_attention_op(*qkv, *row, backend), *row)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op, arguments in checks:
            assert set(opcheck(op, (*arguments, backend)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_and_a_second_derivative(backend: str) -> None:
    call, inputs = fused(backend)
    value, _ = call(*inputs)
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(3 * value, inputs), strict=True):
        torch.testing.assert_close(3 * a, b)
    call, inputs = linear(backend)
    (grad, *_) = torch.autograd.grad(call(*inputs)[0], inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


def test_no_gradient_work_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad, or with frozen inputs, linear_grpo_loss forms no gradient."""
    monkeypatch.setattr(reference.head, "backward", lambda *args: pytest.fail("a gradient was formed"))
    call, inputs = fused("reference")
    with torch.no_grad():
        call(*inputs)
    call(*(x.detach() for x in inputs))
    with pytest.raises(pytest.fail.Exception, match="a gradient was formed"):
        call(*inputs)
