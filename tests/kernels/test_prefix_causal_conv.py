"""prefix_causal_conv against its sum output by output in fp64, and against transformers on repeated rows."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from gated_delta_cases import LAYOUTS, Lengths, convolved, over, segments
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from videor1_kernels import PrefixLayout, last_backend, prefix_causal_conv
from videor1_kernels.testing import assert_matches, poisoned_memory

OP = "prefix_causal_conv"
CONV = inspect.unwrap(qwen.causal_conv1d_fn)
SHORT: Lengths = ([1, 2, 5], [[1, 2, 6], [3], []])  # prompts and completions that a filter of 4 is longer than


class Case:
    def __init__(
        self,
        lengths: Lengths = SHORT,
        size: int = 4,
        channels: int = 6,
        dtype: torch.dtype = torch.float32,
        *,
        bias: bool = True,
        activation: str = "silu",
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

        self.lengths, self.layout, self.activation = lengths, PrefixLayout(*lengths), activation
        rows, counts = self.layout.total_tokens, (len(lengths[0]), sum(map(len, lengths[1])))
        inputs = [normal(rows, channels), normal(channels, size), *([normal(channels)] if bias else [])]
        self.inputs = [x.requires_grad_() for x in inputs]
        self.grad, self.state_grads = normal(rows, channels), [normal(n, channels, size - 1) for n in counts]

    def __call__(self, call: Any = prefix_causal_conv) -> list[Tensor]:
        """Output, states and gradients of x, weight and bias."""
        x, weight, *bias = (x.detach().requires_grad_() for x in self.inputs)
        options = {"bias": bias[0] if bias else None, "activation": self.activation, "return_states": True}
        out, states = call(x, weight, self.layout, **options)
        return self._with_gradients([out, states.prompts, states.completions], [x, weight, *bias])

    def exact(self) -> list[Tensor]:
        leaves = [x.detach().double().requires_grad_() for x in self.inputs]
        x, weight, *rest = leaves
        before = x.new_zeros(x.shape[1], weight.shape[1] - 1)

        def run(part: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
            return convolved(x[part], weight, rest[0] if rest else None, before if state is None else state)

        out, prompts, ends = over(self.lengths, run)
        out = out * torch.sigmoid(out) if self.activation == "silu" else out
        states = [torch.stack(s) if s else before.expand(0, *before.shape) for s in (prompts, ends)]
        return self._with_gradients([out, *states], leaves)

    def _with_gradients(self, found: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
        total = sum((x * g.to(x.dtype)).sum() for x, g in zip(found, (self.grad, *self.state_grads), strict=True))
        assert isinstance(total, Tensor)
        return [*(x.detach() for x in found), *torch.autograd.grad(total, leaves)]

    def check(self, dtype: torch.dtype | None = None) -> None:
        for ours, exact in zip(self(), self.exact(), strict=True):
            assert ours.shape == exact.shape
            assert ours.dtype == self.inputs[0].dtype
            size = exact.abs().max().clamp(min=1) if exact.numel() else 1.0
            assert_matches(ours.double() / size, exact / size, dtype or ours.dtype)


@pytest.mark.grid(
    name=[*LAYOUTS, "short"], size=[4, 1, 2, 7], bias=[True, False], activation=["silu", "none"], channels=[6, 1]
)
def test_equals_the_sum(name: str, size: int, bias: bool, activation: str, channels: int) -> None:
    Case(LAYOUTS.get(name, SHORT), size, channels, bias=bias, activation=activation).check()
    assert last_backend(OP) == "reference"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    Case(dtype=dtype).check(dtype)


def test_states_are_the_inputs_themselves() -> None:
    """Of a sequence that the filter is longer than, what it began with is among them."""
    case = Case(dtype=torch.bfloat16)
    x = case.inputs[0].detach()
    _, prompts, completions, *_ = case()
    assert torch.equal(prompts[0], torch.stack([x[0] * 0, x[0] * 0, x[0]], 1))  # one token
    assert torch.equal(completions[0], torch.stack([x[0] * 0, x[0], x[1]], 1))  # one token after one
    assert torch.equal(completions[2], x[7:10].T)  # the last 3 of 6


def test_gradcheck() -> None:
    case = Case(dtype=torch.float64, channels=2)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out, states = prefix_causal_conv(x, weight, case.layout, bias=bias, activation="silu", return_states=True)
        return out, states.prompts, states.completions

    assert torch.autograd.gradcheck(call, case.inputs)


@pytest.mark.parametrize("name", ["ragged", "many chunks", "short"])
def test_a_fork_equals_transformers_on_repeated_rows(name: str) -> None:
    case = Case(LAYOUTS.get(name, SHORT), bias=False)
    x, weight = (x.detach().requires_grad_() for x in case.inputs)
    out = torch.zeros_like(case.grad)
    for prompt, completions in segments(case.lengths):
        for own in completions or [slice(0, 0)]:
            rows = torch.cat([torch.arange(part.start, part.stop) for part in (prompt, own)])
            row = CONV(x[rows].T[None], weight, activation="silu")[0].T
            new = (
                slice(0, None)
                if own == (completions or [own])[0] or not completions
                else slice(prompt.stop - prompt.start, None)
            )
            out = out.index_put((rows[new],), row[new])
    ours = case()
    assert (ours[0] - out).abs().max() < 1e-6
    for mine, theirs in zip(ours[3:], _without_states(case, out, [x, weight]), strict=True):
        assert mine.shape == theirs.shape


def _without_states(case: Case, out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The gradients of the output alone, which those of a call without states must be."""
    theirs = torch.autograd.grad((out * case.grad).sum(), leaves)
    x, weight = (x.detach().requires_grad_() for x in case.inputs)
    plain = prefix_causal_conv(x, weight, case.layout, activation="silu")
    assert isinstance(plain, Tensor)
    for mine, other in zip(torch.autograd.grad((plain * case.grad).sum(), [x, weight]), theirs, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()
    return list(theirs)


def test_completions_do_not_leak_into_each_other() -> None:
    """The first outputs of a completion that is packed behind another are of the other's last inputs."""
    case = Case(([5], [[4, 4]]), bias=False, activation="none")
    x, weight = (x.detach() for x in case.inputs)
    changed = x.clone()
    changed[5:9] *= -2

    def leak(call: Any) -> float:
        return (call(changed) - call(x))[9:].abs().max().item()

    assert leak(lambda x: CONV(x.T[None], weight)[0].T) > 0.1
    assert leak(lambda x: prefix_causal_conv(x, weight, case.layout)) < 1e-6


def test_gradient_checkpointing_and_poisoned_memory() -> None:
    case = Case(LAYOUTS["ragged"])
    plain = case()

    def again(*inputs: Any, **options: Any) -> Any:
        return checkpoint(prefix_causal_conv, *inputs, use_reentrant=False, **options)

    with poisoned_memory():
        poisoned = case()
    for found in (case(again), poisoned):
        for ours, theirs in zip(found, plain, strict=True):
            assert torch.equal(ours, theirs)


def test_rows_of_a_product_that_holds_more() -> None:
    """A view of wider rows, as a model's one product for q, k, v and the gates gives it."""
    case = Case(LAYOUTS["ragged"])
    plain = case()[0]
    x, weight, bias = (x.detach() for x in case.inputs)
    wider = torch.cat([x, x], 1)[:, : x.shape[1]]
    strange = x.T.contiguous().T
    for view in (wider, strange):
        assert torch.equal(prefix_causal_conv(view, weight, case.layout, bias=bias, activation="silu"), plain)
