"""The torch operators: torch.compile without a graph break, opcheck, determinism, and what the registry is told."""

import warnings

import pytest
import torch
from torch.library import opcheck

import videor1_kernels as vk
from videor1_kernels.group_advantage.ops import tgrpo_advantages_op
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

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on the padding of interpreted kernels


def case(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    hidden, weight, bias = torch.randn(9, 8), torch.randn(21, 8), torch.randn(21)
    labels = torch.randint(21, (9,))
    labels[2] = -100
    return [x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight, bias)], labels.to(DEVICE)


def linear(backend):
    (hidden, weight, bias), labels = case()

    def call(hidden, weight, bias):
        logp, entropy = vk.linear_logprob(hidden, weight, labels, bias=bias, temperature=0.7, backend=backend)
        return logp.sum() + 0.1 * entropy.square().sum(), logp

    return call, (hidden, weight, bias)


def linear_row_temperature(backend):
    (hidden, weight, _), labels = case()
    temperature = torch.linspace(0.5, 2, 9, device=DEVICE)

    def call(hidden, weight):
        logp, _ = vk.linear_logprob(hidden, weight, labels, temperature=temperature, backend=backend)
        return logp.sum(), logp

    return call, (hidden, weight)


def selective(backend):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 17, device=DEVICE, requires_grad=True)
    index = torch.randint(17, (2, 5, 3), device=DEVICE)

    def call(logits):
        logp = vk.selective_log_softmax(logits, index, temperature=1.3, backend=backend)
        return logp.square().sum(), logp

    return call, (logits,)


def loss(backend, level="token"):
    logp = -torch.rand(9, device=DEVICE)
    logp.requires_grad_()
    other = -torch.rand(9, device=DEVICE)
    advantages = torch.tensor([1.0, 2.0, -1.0], device=DEVICE)

    def call(logp):
        out = vk.grpo_loss(
            logp,
            advantages,
            CU,
            old_logp=other,
            ref_logp=other,
            clip_low=0.2,
            clip_high=0.2,
            importance_level=level,
            backend=backend,
        )
        return out.loss, (out.logp, out.kl, out.clip_fraction, out.skipped_rows)

    return call, (logp,)


def fused(backend):
    (hidden, weight, bias), labels = case()
    other = -torch.rand(9, device=DEVICE)
    advantages = torch.tensor([1.0, 2.0, -1.0], device=DEVICE)

    options = {"old_logp": other, "ref_logp": other, "clip_low": 0.2, "temperature": 0.9, "backend": backend}

    def call(hidden, weight, bias):
        out = vk.linear_grpo_loss(hidden, weight, labels, advantages, CU, bias=bias, **options)
        return 2 * out.loss, (out.logp, out.entropy, out.kl, out.clip_fraction, out.skipped_rows)

    return call, (hidden, weight, bias)


def attention(backend):
    torch.manual_seed(0)
    layout = vk.PrefixLayout([5, 3], [[2, 4], [3]], DEVICE)
    dtype = torch.float16 if DEVICE == "cuda" and backend == "triton" else torch.float32
    inputs = [torch.randn(17, heads, 16).to(DEVICE, dtype).requires_grad_() for heads in (2, 1, 1)]

    def call(q, k, v):
        out = vk.prefix_attention(q, k, v, layout, backend=backend)
        return out.float().square().sum(), out

    return call, inputs


CALLS = {
    "prefix_attention": attention,
    "linear_logprob": linear,
    "row_temperature": linear_row_temperature,
    "selective_log_softmax": selective,
    "grpo_loss": loss,
    "sequence": lambda backend: loss(backend, "sequence"),
    "linear_grpo_loss": fused,
}


def flat(outputs):
    value, extra = outputs
    return [
        value.detach(),
        *(x.detach() if isinstance(x, torch.Tensor) else x for x in (extra if isinstance(extra, tuple) else (extra,))),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_graph_break(name, backend):
    call, inputs = CALLS[name](backend)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager, graph = call(*inputs), compiled(*inputs)
    for a, b in zip(flat(eager), flat(graph), strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    for a, b in zip(torch.autograd.grad(eager[0], inputs), torch.autograd.grad(graph[0], inputs), strict=True):
        assert torch.equal(a, b)


def test_compiles_with_the_default_compiler():
    """What users call: inductor, on the backend that ``auto`` takes here."""
    call, inputs = fused("auto")
    compiled = torch.compile(lambda *x: call(*(v * 2 for v in x))[0].sin(), fullgraph=True)
    eager = call(*(x * 2 for x in inputs))[0].sin()
    graph = compiled(*inputs)
    torch.testing.assert_close(eager, graph)
    for a, b in zip(torch.autograd.grad(eager, inputs), torch.autograd.grad(graph, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_advantages_compile(backend):
    torch.manual_seed(0)
    accuracy, form = torch.rand(3, 4, device=DEVICE).round(), torch.ones(3, 4, device=DEVICE)
    lengths = torch.randint(300, 600, (3, 4), device=DEVICE)
    shuffled = torch.rand(3, 2, device=DEVICE).round()

    def call(accuracy):
        out = vk.tgrpo_advantages(accuracy, form, lengths, shuffled, backend=backend)
        return out.advantages + 1, out.p_shuffled

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(call(accuracy), compiled(accuracy), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="accuracy: expected finite values, got 1 that are NaN or infinite"):
        compiled(accuracy.index_put((torch.tensor([0]), torch.tensor([0])), torch.tensor(torch.nan)))


def test_values_are_checked_inside_a_compiled_graph():
    (hidden, weight, _), labels = case()
    compiled = torch.compile(lambda y: vk.linear_logprob(hidden, weight, y)[0], fullgraph=True, backend="aot_eager")
    compiled(labels)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 21\)"):
        compiled(labels.masked_fill(labels == labels[0], 21))


def test_an_unknown_backend_is_refused_while_compiling():
    (hidden, weight, _), labels = case()
    compiled = torch.compile(
        lambda y: vk.linear_logprob(hidden, weight, y, backend="trition")[0], fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        compiled(labels)


OPTIONS = ("grpo", 0.1, 0.2, 0.3, 10.0, "token", None, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    (hidden, weight, bias), labels = case()
    temperatures = torch.linspace(0.5, 2, 9, device=DEVICE)
    advantages, lp = torch.tensor([1.0, 0.0, -1.0], device=DEVICE), -torch.rand(9, device=DEVICE)
    checks = [
        (linear_logprob_op, (hidden, weight, labels, bias, None, 0.8, backend)),
        (linear_logprob_op, (hidden, weight.detach(), labels, None, temperatures, 1.0, backend)),
        (
            linear_logprob_backward_op,
            (
                lp,
                None,
                hidden.detach(),
                weight.detach(),
                labels,
                bias.detach(),
                None,
                0.8,
                lp,
                lp.double(),
                [True, False, True],
                backend,
            ),
        ),
        (
            selective_op,
            (
                torch.randn(4, 7, device=DEVICE, requires_grad=True),
                torch.randint(7, (4, 2), device=DEVICE),
                None,
                0.8,
                backend,
            ),
        ),
        (grpo_loss_op, (lp.clone().requires_grad_(), advantages, CU, lp, lp, labels != -100, *OPTIONS, backend)),
        (
            linear_grpo_loss_op,
            (hidden, weight, labels, advantages, CU, lp, lp, bias, None, 0.8, *OPTIONS, [True, True, True], backend),
        ),
        (
            linear_grpo_loss_op,
            (
                hidden,
                weight.detach(),
                labels,
                advantages,
                CU,
                None,
                lp,
                None,
                temperatures,
                1.0,
                *OPTIONS,
                [True, False, False],
                backend,
            ),
        ),
        (
            tgrpo_advantages_op,
            (
                torch.rand(2, 3, device=DEVICE),
                torch.rand(2, 3, device=DEVICE),
                torch.randint(9, (2, 3), device=DEVICE),
                torch.rand(2, 2, device=DEVICE),
                "margin",
                0.3,
                0.8,
                0.1,
                0.2,
                3.0,
                6.0,
                "std",
                1e-4,
                "reward",
                backend,
            ),
        ),
    ]
    _, (q, k, v) = attention(backend)
    numbers = ([5, 3], [2, 1], [2, 4, 3], 0.3, backend)
    checks.append((prefix_attention_op, (q, k, v, *numbers)))
    plain = [x.detach() for x in (q, k, v)]
    checks.append((prefix_attention_backward_op, (plain[0], *plain, *prefix_attention_op(*plain, *numbers), *numbers)))
    logits, index = torch.randn(4, 7, device=DEVICE), torch.randint(7, (4, 2), device=DEVICE)
    logp, kept = selective_op(logits, index, None, 0.8, backend)
    checks.append((selective_backward_op, (torch.ones_like(logp), logits, index, None, 0.8, kept, backend)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op, arguments in checks:
            assert set(opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_same_bits_every_time(name, backend):
    call, inputs = CALLS[name](backend)

    def once():
        outputs = call(*inputs)
        return [*flat(outputs), *torch.autograd.grad(outputs[0], inputs)]

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_and_a_second_derivative(backend):
    call, inputs = fused(backend)
    value, _ = call(*inputs)
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(3 * value, inputs), strict=True):
        torch.testing.assert_close(3 * a, b)
    call, inputs = linear(backend)
    (grad, *_) = torch.autograd.grad(call(*inputs)[0], inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


def test_no_gradient_work_without_gradients(monkeypatch):
    """Under no_grad, or with frozen inputs, linear_grpo_loss forms no gradient."""
    from videor1_kernels.grpo_loss import reference

    def fail(*args):
        raise AssertionError("a gradient was formed")

    monkeypatch.setattr(reference.head, "backward", fail)
    call, inputs = fused("reference")
    with torch.no_grad():
        call(*inputs)
    call(*(x.detach() for x in inputs))
    with pytest.raises(AssertionError, match="a gradient was formed"):
        call(*inputs)
