"""The torch operators: torch.compile without a graph break, opcheck, determinism, and what the registry is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import videor1_kernels as vk
from videor1_kernels.add_rms_norm.ops import add_rms_norm_op
from videor1_kernels.group_advantage.ops import tgrpo_advantages_op
from videor1_kernels.grpo_loss import reference
from videor1_kernels.grpo_loss.ops import grpo_loss_op, linear_grpo_loss_op
from videor1_kernels.grpo_loss.records import GrpoLossOptions
from videor1_kernels.linear_logprob.ops import (
    linear_logprob_backward_op,
    linear_logprob_op,
    selective_backward_op,
    selective_op,
)
from videor1_kernels.output_gates.ops import gated_rms_norm_op, sigmoid_mul_op
from videor1_kernels.prefix_attention.ops import prefix_attention_backward_op, prefix_attention_op
from videor1_kernels.prefix_gated_delta.ops import (
    causal_conv_step_op,
    gated_delta_step_op,
    prefix_causal_conv_backward_op,
    prefix_causal_conv_op,
    prefix_gated_delta_backward_op,
    prefix_gated_delta_op,
)
from videor1_kernels.rotary_append.ops import rotary_append_op
from videor1_kernels.silu_mul.ops import silu_mul_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
torch.manual_seed(0)
HIDDEN, WEIGHT, BIAS, LOGP, OTHER, TEMPERATURES = (
    x.to(DEVICE).requires_grad_(i < 4)
    for i, x in enumerate(
        (torch.randn(9, 8), torch.randn(21, 8), torch.randn(21), -torch.rand(9), -torch.rand(9), torch.rand(9) + 0.5)
    )
)
LABELS = torch.tensor([3, 20, -100, 0, 7, 7, 1, 12, 5], device=DEVICE)
CU = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=DEVICE)
ADVANTAGES = torch.tensor([1.0, 2.0, -1.0], device=DEVICE)
LOGITS, INDEX = torch.randn(2, 5, 17, device=DEVICE).requires_grad_(), torch.randint(17, (2, 5, 3), device=DEVICE)
LAYOUT = vk.PrefixLayout([5, 3], [[2, 4], [3]], DEVICE)
QKV = [torch.randn(17, heads, 16, device=DEVICE).requires_grad_() for heads in (2, 1, 1)]
OLD = {"old_logp": OTHER, "ref_logp": OTHER, "clip_low": 0.2}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on the padding of interpreted kernels


def shown(out: vk.GrpoLoss) -> tuple[Any, ...]:
    return (
        out.loss,
        out.logp,
        *([] if out.entropy is None else [out.entropy]),
        out.kl,
        out.clip_fraction,
        out.skipped_rows,
    )


def attention(backend: str, *qkv: Tensor) -> Tensor:
    dtype = torch.float16 if DEVICE == "cuda" and backend == "triton" else torch.float32
    return vk.prefix_attention(*(x.to(dtype) for x in qkv), LAYOUT, backend=backend).float()


# (backend, inputs) -> outputs, and the inputs, which have gradients.
CALLS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "linear_logprob": (
        lambda on, h, w, bias: vk.linear_logprob(h, w, LABELS, bias=bias, temperature=0.7, backend=on),
        [HIDDEN, WEIGHT, BIAS],
    ),
    "row temperature": (
        lambda on, h, w: vk.linear_logprob(h, w, LABELS, temperature=TEMPERATURES, backend=on),
        [HIDDEN, WEIGHT],
    ),
    "selective": (lambda on, x: vk.selective_log_softmax(x, INDEX, temperature=1.3, backend=on), [LOGITS]),
    "grpo_loss": (lambda on, x: shown(vk.grpo_loss(x, ADVANTAGES, CU, **OLD, clip_high=0.2, backend=on)), [LOGP]),
    "sequence": (
        lambda on, x: shown(vk.grpo_loss(x, ADVANTAGES, CU, **OLD, importance_level="sequence", backend=on)),
        [LOGP],
    ),
    "linear_grpo_loss": (
        lambda on, h, w, bias: shown(
            vk.linear_grpo_loss(h, w, LABELS, ADVANTAGES, CU, bias=bias, **OLD, temperature=0.9, backend=on)
        ),
        [HIDDEN, WEIGHT, BIAS],
    ),
    "prefix_attention": (attention, QKV),
}


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(call, fullgraph=True, backend="aot_eager")


def results(call: Callable[..., Any], inputs: list[Tensor]) -> list[Any]:
    """What a call returns, and the gradients of it all."""
    made = call(*inputs)
    outputs = made if isinstance(made, tuple) else (made,)
    differentiable = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    value = sum(i * x.square().sum() for i, x in enumerate(differentiable, 1))
    detached = [x.detach() if isinstance(x, Tensor) else x for x in outputs]
    return [*detached, *torch.autograd.grad(value, inputs)]


def assert_same(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_graph_break_to_the_same_bits(name: str, backend: str) -> None:
    call, inputs = CALLS[name]
    eager = results(lambda *x: call(backend, *x), inputs)
    graph = compiled(lambda *x: call(backend, *x))
    assert_same(results(graph, inputs), eager)
    assert_same(results(lambda *x: call(backend, *x), inputs), eager)


@pytest.mark.slow
def test_compiles_with_the_default_compiler() -> None:
    """What users call: inductor, on the backend that ``auto`` takes here."""
    call, inputs = CALLS["linear_grpo_loss"]

    def wrapped(*x: Tensor) -> Tensor:
        return call("auto", *(v * 2 for v in x))[0].sin()

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

    graph = compiled(call)
    assert_same(graph(accuracy), call(accuracy))
    with pytest.raises(ValueError, match="accuracy: expected finite values, got 1 that are NaN or infinite"):
        graph(accuracy.index_put((torch.tensor([0]), torch.tensor([0])), torch.tensor(torch.nan)))


def test_values_and_backends_are_checked_inside_a_compiled_graph() -> None:

    def graph(backend: str) -> Callable[[Tensor], Tensor]:
        return compiled(lambda labels: vk.linear_logprob(HIDDEN, WEIGHT, labels, backend=backend)[0])

    call = graph("auto")
    call(LABELS)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 21\)"):
        call(LABELS.masked_fill(LABELS == 3, 21))
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        graph("trition")(LABELS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    fixed, lp = WEIGHT.detach(), LOGP.detach()
    chosen = {"importance_correction": "token", "correction_mode": "mask", "delta": 4.0, "use_bias_correction_kl": True}
    options = GrpoLossOptions("grpo", 0.1, 0.2, 0.3, 10.0, "token", None, None, **chosen).packed()
    completions = (ADVANTAGES, CU, lp, lp, lp - 0.5, lp.exp(), None, ADVANTAGES[0] != ADVANTAGES)
    numbers = ("margin", 0.3, 0.8, 0.1, 0.2, 3.0, 6.0, "std", 1e-4, "reward", "mean", None)
    head = (HIDDEN.detach(), fixed, LABELS, BIAS.detach(), None, 0.8, None, 1.5)
    rewards, shuffled = torch.rand(2, 3, device=DEVICE), torch.rand(2, 2, device=DEVICE)
    logits, index = torch.randn(4, 7, device=DEVICE), torch.randint(7, (4, 2), device=DEVICE)
    logp, kept = selective_op(logits, index, None, 0.8, backend)
    qkv = [x.detach().to(torch.float16 if DEVICE == "cuda" else torch.float32) for x in QKV]
    row = ([5, 3], [2, 1], [2, 4, 3], 0.3)
    checks: list[tuple[Any, tuple[Any, ...]]] = [
        (linear_logprob_op, (HIDDEN, WEIGHT, LABELS, BIAS, None, 0.8, torch.float16, 0.0)),
        (linear_logprob_op, (HIDDEN, fixed, LABELS, None, TEMPERATURES, 1.0, None, 1.5)),
        (linear_logprob_backward_op, (lp, None, *head, lp, lp.double(), [True, False, True])),
        (selective_op, (logits.clone().requires_grad_(), index, None, 0.8)),
        (selective_backward_op, (torch.ones_like(logp), logits, index, None, 0.8, kept)),
        (grpo_loss_op, (LOGP, *completions, LABELS != -100, *options)),
    ]
    checks += [
        (
            linear_grpo_loss_op,
            (HIDDEN, WEIGHT, LABELS, *completions, BIAS, None, 0.8, operands, 0.0, *options, [True, True, True]),
        )
        for operands in (None, torch.float16)
    ]
    checks += [
        (
            linear_grpo_loss_op,
            (
                *(
                    HIDDEN,
                    fixed,
                    LABELS,
                    ADVANTAGES,
                    CU,
                    None,
                    lp,
                    lp,
                    None,
                    None,
                    None,
                    None,
                    TEMPERATURES,
                    1.0,
                    None,
                    2.0,
                ),
                *(*options, [True, False, False]),
            ),
        ),
        (tgrpo_advantages_op, (rewards, rewards, (9 * rewards).long(), shuffled, *numbers)),
        (add_rms_norm_op, (fixed, fixed[0], 2 * fixed, 1e-6, False)),
        (add_rms_norm_op, (fixed, fixed[0].half(), None, 1e-6, False)),
        (add_rms_norm_op, (fixed.half(), fixed[0], None, 1e-6, True)),
        (rotary_append_op, (*rotary_inputs(), None, None, 0.0, False)),
        (rotary_append_op, (*rotary_inputs(), *rotary_inputs()[1][:2], 1e-6, True)),
        (silu_mul_op, (fixed, None, None)),
        (sigmoid_mul_op, (fixed, 2 * fixed)),
        (gated_rms_norm_op, (fixed[:, None], fixed.half()[:, None], fixed[0], 1e-6)),
        (silu_mul_op, (fixed, fixed[:, :2], fixed[0, :, None])),
        (prefix_attention_op, (*(x.clone().requires_grad_() for x in qkv), *row)),
        (prefix_attention_backward_op, (qkv[0], *qkv, *prefix_attention_op(*qkv, *row, backend), *row)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op, arguments in checks:
            assert set(opcheck(op, (*arguments, backend)).values()) == {"SUCCESS"}
        bars = (rewards, rewards, (9 * rewards).long(), shuffled, *numbers, backend, rewards[:, 0])
        assert set(opcheck(tgrpo_advantages_op, (*bars, rewards > 0)).values()) == {"SUCCESS"}


def delta_inputs() -> list[Tensor]:
    """q, k, v, g and beta of the 17 tokens of LAYOUT."""
    generator = torch.Generator().manual_seed(4)
    made = [torch.randn(17, *shape, generator=generator) for shape in ((1, 8), (1, 8), (2, 6), (2,), (2,))]
    return [x.to(DEVICE) for x in (*made[:3], -made[3].abs(), made[4].sigmoid())]


def conv_inputs() -> list[Tensor]:
    """x, weight and bias."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in ((17, 6), (6, 4), (6,))]


def test_opcheck_of_linear_attention() -> None:
    row = ([5, 3], [2, 1], [2, 4, 3])
    delta, conv = delta_inputs(), conv_inputs()
    rule, filtered = (*row, 0.3, True, "reference"), (*row, "silu", "reference")
    checks: list[tuple[Any, tuple[Any, ...]]] = [
        (prefix_gated_delta_op, (*(x.clone().requires_grad_() for x in delta), *rule)),
        (prefix_gated_delta_backward_op, (prefix_gated_delta_op(*delta, *rule), *delta, *rule)),
        (prefix_causal_conv_op, (*(x.clone().requires_grad_() for x in conv), *filtered)),
        (prefix_causal_conv_op, (*(x.clone().requires_grad_() for x in conv[:2]), None, *filtered)),
        (prefix_causal_conv_backward_op, (prefix_causal_conv_op(*conv, *filtered), *conv, *filtered)),
    ]
    slots = torch.tensor([3, 0], device=DEVICE)
    for backend in BACKENDS:
        tokens = [x[:2].clone() for x in delta]
        state, last = torch.randn(4, 2, 8, 6, device=DEVICE), torch.randn(4, 6, 3, device=DEVICE)
        checks += [
            (gated_delta_step_op, (*tokens, state, slots, 0.3, True, backend)),
            (causal_conv_step_op, (conv[0][:2].clone(), last, *conv[1:], slots, "silu", backend)),
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op, arguments in checks:
            assert set(opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("states", [False, True])
def test_linear_attention_compiles(states: bool) -> None:
    """The node computes the forward pass again in its backward pass, to the same bits."""

    def delta(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = vk.prefix_gated_delta(*(2 * x for x in inputs), LAYOUT, return_states=states)
        return (found[0], found[1].prompts, found[1].completions) if states else (found,)

    def conv(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        found = vk.prefix_causal_conv(2 * x, weight, LAYOUT, bias=bias, activation="silu", return_states=states)
        return (found[0], found[1].prompts, found[1].completions) if states else (found,)

    for call, made in ((delta, delta_inputs()), (conv, conv_inputs())):
        inputs = [x.to(torch.float32).requires_grad_() for x in made]
        assert_same(results(compiled(call), inputs), results(call, inputs))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_states_change_in_a_compiled_graph(backend: str) -> None:
    def call(state: Tensor, last: Tensor, slots: Tensor, *tokens: Tensor) -> Tensor:
        mixed = vk.causal_conv_step(tokens[0].flatten(1), last, WEIGHT.detach()[:8, :4], slots=slots, backend=backend)
        out = vk.gated_delta_step(mixed[:, None], *tokens[1:], state, slots=slots, backend=backend)
        return out + state.sum() + last.sum()

    def inputs() -> list[Tensor]:
        generator = torch.Generator().manual_seed(6)
        state, last = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((4, 2, 8, 6), (4, 8, 3)))
        return [state, last, torch.tensor([3, 0], device=DEVICE), *(x[:2].clone() for x in delta_inputs())]

    ours, theirs = inputs(), inputs()
    assert_same([compiled(call)(*ours)], [call(*theirs)])
    assert_same(ours, theirs)
    assert not torch.equal(ours[0], inputs()[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_and_a_second_derivative(backend: str) -> None:
    call, inputs = CALLS["linear_grpo_loss"]
    loss = call(backend, *inputs)[0]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(3 * loss, inputs), strict=True):
        torch.testing.assert_close(3 * a, b)
    call, inputs = CALLS["linear_logprob"]
    (grad, *_) = torch.autograd.grad(call(backend, *inputs)[0].sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


def test_no_gradient_work_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad, or with frozen inputs, linear_grpo_loss forms no gradient."""
    monkeypatch.setattr(reference.head, "backward", lambda *args: pytest.fail("a gradient was formed"))
    call, inputs = CALLS["linear_grpo_loss"]
    with torch.no_grad():
        call("reference", *inputs)
    call("reference", *(x.detach() for x in inputs))
    with pytest.raises(pytest.fail.Exception, match="a gradient was formed"):
        call("reference", *inputs)


def decode_inputs(rows: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, 4, 16), (5, 2, 16), (5, 2, 16), (rows, 3, 2, 16), (rows, 3, 2, 16))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


LENGTHS, ENDS, GROUPS = torch.tensor([1, 3, 2, 1]), torch.tensor([0, 2, 5]), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_decode_attention_compiles_with_a_layout(backend: str) -> None:
    def call(layout: vk.DecodeLayout, lengths: Tensor, q: Tensor, *others: Tensor) -> Tensor:
        out = vk.prefix_decode_attention(2 * q, *others, suffix_lengths=lengths, layout=layout, backend=backend)
        return out.sin()

    graph, inputs = compiled(call), decode_inputs()
    for batch, groups in enumerate((GROUPS, GROUPS.flip(0), torch.zeros(4, dtype=torch.int64), GROUPS)):
        layout = vk.DecodeLayout(ENDS, groups)
        with torch.compiler.set_stance("default" if batch < 2 else "fail_on_recompile"):
            assert torch.equal(graph(layout, LENGTHS, *inputs), call(layout, LENGTHS, *inputs))
    with pytest.raises(ValueError, match="suffix_lengths: expected"):
        graph(layout, LENGTHS + 1, *inputs)


def test_decode_attention_compiles_with_lengths_and_groups() -> None:
    def call(cu: Tensor, groups: Tensor, q: Tensor, *others: Tensor) -> Tensor:
        return vk.prefix_decode_attention(q, *others, suffix_lengths=LENGTHS, cu_prefix=cu, row_group=groups) + 1

    graph, inputs = compiled(call), decode_inputs()
    assert torch.equal(graph(ENDS, GROUPS, *inputs), call(ENDS, GROUPS, *inputs))
    with pytest.raises(ValueError, match=r"row_group: expected values in \[0, 2\)"):
        graph(ENDS, GROUPS + 1, *inputs)


def test_a_compiled_decode_attention_has_no_gradient() -> None:
    q, *others = decode_inputs()

    def call(q: Tensor) -> Tensor:
        return vk.prefix_decode_attention(q, *others, suffix_lengths=LENGTHS, cu_prefix=ENDS, row_group=GROUPS)

    with pytest.raises(Exception, match=r"none that requires a gradient under torch\.compile"):
        compiled(call)(q.requires_grad_())
    with torch.no_grad():
        assert torch.equal(compiled(call)(q), call(q))


def rotary_inputs() -> tuple[Tensor, ...]:
    """qkv, tables, cache, positions, lengths and slots."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 8 * 16), (9, 16), (9, 16), (3, 5, 2, 16), (3, 5, 2, 16))
    index = (torch.tensor(values, device=DEVICE) for values in ([8, 0], [5, 1], [2, 0]))
    return *(torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes), *index


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_the_cache_changes_in_a_compiled_graph(backend: str, norms: bool) -> None:
    def call(qkv: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, *places: Tensor) -> Tensor:
        names = ("positions", "suffix_lengths", "suffix_slots")
        index = dict(zip(names, places, strict=True))
        weights = {"q_norm": cos[0], "k_norm": cos[1], "eps": 1e-3} if norms else {}
        return vk.rotary_append(2 * qkv, cos, sin, k, v, **index, **weights, backend=backend) + k.sum()

    ours, theirs = ([x.clone() for x in rotary_inputs()] for _ in range(2))
    assert_same([compiled(call)(*ours)], [call(*theirs)])
    assert_same(ours, theirs)
    assert not torch.equal(ours[3], rotary_inputs()[3])
    if backend == "triton":
        return
    with pytest.raises(ValueError, match=r"positions: expected values in \[0, 9\)"):
        compiled(call)(*ours[:5], ours[5] + 1, *ours[6:])


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("added", [True, False])
def test_norm_activation_and_gates_compile(backend: str, added: bool) -> None:
    def call(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        given = 2 * residual if added else None
        normed, summed = vk.add_rms_norm(2 * x, weight, residual=given, backend=backend)
        heads = vk.gated_rms_norm(normed[:, None], summed[:, None], weight, backend=backend)
        gated = vk.sigmoid_mul(normed, summed, backend=backend)
        return normed + 1, summed + 1, vk.silu_mul(normed, backend=backend), gated, heads

    inputs = WEIGHT.detach(), WEIGHT[0].detach(), WEIGHT.detach().flip(0)
    assert_same(compiled(call)(*inputs), call(*inputs))
    with pytest.raises(Exception, match=r"weight: expected a tensor that requires no gradient"):
        compiled(call)(inputs[0], inputs[1].clone().requires_grad_(), inputs[2])


def nv12(frames: int = 3) -> vk.YuvFrames:
    generator = torch.Generator().manual_seed(1)
    planes = ((frames, 30, 40), (frames, 15, 20, 2))
    return vk.YuvFrames(
        tuple(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in planes), "709"
    )


RGB = torch.randint(0, 256, (3, 30, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"permutation": (2, 0, 1)},
        {"permutation": (2, 0, 1), "both": True},
        {"dtype": torch.uint8, "rotation": 90},
        {"dtype": torch.float32},
    ],
    ids=["plain", "permuted", "both", "levels, turned", "fp32"],
)
@pytest.mark.parametrize("frames", [RGB, nv12()], ids=["RGB", "planes"])
def test_frames_to_patches_compiles(frames: Any, options: dict[str, Any], backend: str) -> None:
    def call(frames: Any) -> tuple[Tensor, ...]:
        made = vk.frames_to_patches(frames, size=(56, 84), backend=backend, **options)
        return tuple(x.float() + 1 for x in (made if isinstance(made, tuple) else (made,)))

    for mine, plain in zip(compiled(call)(frames), call(frames), strict=True):
        assert torch.equal(mine, plain)


def test_a_permutation_may_be_an_input_of_the_graph() -> None:
    def call(order: Tensor) -> Tensor:
        return vk.frames_to_patches(RGB, size=(56, 84), permutation=order)

    graph = compiled(call)
    for order in ([0, 1, 2], [2, 1, 0]):
        assert torch.equal(graph(torch.tensor(order)), call(torch.tensor(order)))
    with pytest.raises(ValueError, match=r"permutation: expected each of 0\.\.2 once"):
        graph(torch.tensor([0, 1, 1]))


def test_sampling_does_not_compile_whole() -> None:
    """Its truncation asks values which way to go; the rollout engine captures a CUDA graph of the kernel instead."""

    def call(logits: Tensor) -> Tensor:
        return vk.sample_tokens(logits, torch.full((3,), 0.5), top_k=4, backend="reference")[0]

    with pytest.raises(Exception, match="data-dependent"):
        compiled(call)(torch.randn(3, 5))
