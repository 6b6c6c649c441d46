"""prefix_gated_delta against the rule token by token in fp64, against transformers, and against repeated rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gated_delta_cases import LAYOUTS, NAMES, Delta, Lengths, make_delta, segments
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from videor1_kernels import last_backend, prefix_gated_delta
from videor1_kernels.prefix_gated_delta import reference
from videor1_kernels.testing import LargestTensor, PeakMemory, assert_matches, poisoned_memory

OP = "prefix_gated_delta"
RESULTS = ("out", "states of prompts", "states of completions", *(f"d{name}" for name in NAMES))
# Without the package fla these are transformers' own, with it those of the package: what is wrapped is its own.
CHUNKED = inspect.unwrap(qwen.torch_chunk_gated_delta_rule)
RECURRENT = inspect.unwrap(qwen.torch_recurrent_gated_delta_rule)


def results(case: Delta, call: Callable[..., Any] = prefix_gated_delta, **options: Any) -> list[Tensor]:
    """Output, states and gradients of the inputs."""
    inputs = [x.detach().requires_grad_() for x in case.inputs]
    given = {"scale": case.scale, "use_qk_l2norm": case.norm} | options
    out, states = call(*inputs, case.layout, return_states=True, **given)
    found = [out, states.prompts, states.completions]
    pairs = zip(found, (case.grad, *case.state_grads), strict=True)
    total = sum((x * grad.to(x.dtype)).sum() for x, grad in pairs)
    assert isinstance(total, Tensor)
    return [*(x.detach() for x in found), *torch.autograd.grad(total, inputs)]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference, of the norm."""
    if not theirs.numel():
        return 0.0
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def check(case: Delta, dtype: torch.dtype | None = None, found: list[Tensor] | None = None) -> None:
    for name, ours, exact in zip(RESULTS, results(case) if found is None else found, case.exact(), strict=True):
        assert ours.shape == exact.shape, name
        # A gradient's rounding is that of its largest terms, whatever cancels in an element.
        size = exact.abs().max().clamp(min=1) if exact.numel() else 1.0
        assert_matches(ours.double() / size, exact / size, dtype or ours.dtype, name)


@pytest.mark.grid(
    name=list(LAYOUTS), heads=[(1, 1), (2, 4), (1, 3)], dims=[(8, 6), (5, 16)], norm=[True, False], scale=[None, 0.3]
)
def test_equals_the_rule(
    name: str, heads: tuple[int, int], dims: tuple[int, int], norm: bool, scale: float | None
) -> None:
    check(make_delta(LAYOUTS[name], heads, dims, norm=norm, scale=scale))
    assert last_backend(OP) == "reference"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    case = make_delta(LAYOUTS["ragged"], dtype=dtype)
    found = results(case)
    assert found[0].dtype == dtype
    assert found[1].dtype == found[2].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(x.dtype == dtype for x in found[3:])
    check(case, dtype, found)


def test_a_decay_and_a_rate_of_their_own_dtypes() -> None:
    """As the model has them: g in fp32 beside bf16."""
    case = make_delta(LAYOUTS["ragged"], dtype=torch.bfloat16)
    q, k, v, g, beta = case.inputs
    case = replace(case, inputs=[q, k, v, g.detach().float().requires_grad_(), beta])
    found = results(case)
    assert [x.dtype for x in found[3:]] == [x.dtype for x in case.inputs]
    check(case, torch.bfloat16, found)


@pytest.mark.parametrize("norm", [True, False])
def test_gradcheck(norm: bool) -> None:
    case = make_delta(([3, 1], [[2, 1], []]), (1, 2), (3, 2), torch.float64, norm=norm)

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        out, states = prefix_gated_delta(*inputs, case.layout, use_qk_l2norm=norm, return_states=True)
        return out, states.prompts, states.completions

    assert torch.autograd.gradcheck(call, case.inputs)


def test_gradcheck_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK", 2)
    reference.cut.cache_clear()
    case = make_delta(([5, 2], [[3, 1], [4]]), (1, 1), (2, 2), torch.float64)
    try:
        assert torch.autograd.gradcheck(lambda *x: prefix_gated_delta(*x, case.layout), case.inputs)
    finally:
        reference.cut.cache_clear()


def rows_of(case: Delta) -> list[Tensor]:
    """The positions of [prompt | completion] of every completion, or of the prompt where there is none."""
    rows = []
    for prompt, completions in segments(case.lengths):
        for own in completions or [slice(0, 0)]:
            rows.append(torch.cat([torch.arange(part.start, part.stop) for part in (prompt, own)]))
    return rows


def repeated(case: Delta, call: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Every [prompt | completion] by itself, batch size 1, through transformers. A prompt's output and its gradient
    are those of its first row, as in the packed row."""
    inputs = [x.detach().requires_grad_() for x in case.inputs]
    out, written = torch.zeros_like(case.grad), torch.zeros(len(case.grad), dtype=torch.bool)
    states = []
    for rows in rows_of(case):
        row = [x[rows][None] for x in inputs]
        own, state = call(*row, output_final_state=True, use_qk_l2norm_in_kernel=case.norm)
        new = ~written[rows]
        out = out.index_put((rows[new],), own[0, new])
        written[rows] = True
        states.append(state[0])
    gradients = torch.autograd.grad((out * case.grad).sum(), inputs)
    return [out.detach(), torch.stack(states).detach(), *gradients]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", ["ragged", "a token more than a chunk", "many chunks"])
@pytest.mark.parametrize("call", [CHUNKED, RECURRENT], ids=["chunked", "recurrent"])
def test_a_fork_equals_transformers_on_repeated_rows(call: Callable[..., Any], name: str, norm: bool) -> None:
    case = make_delta(LAYOUTS[name], (2, 4), (16, 16), norm=norm)
    out, states, *gradients = repeated(case, call)
    inputs = [x.detach().requires_grad_() for x in case.inputs]
    ours, after = prefix_gated_delta(*inputs, case.layout, use_qk_l2norm=norm, return_states=True)
    assert (ours - out).abs().max() < 1e-5
    ends = [
        state
        for i, lengths in enumerate(case.lengths[1])
        for state in (
            after.completions.split([len(x) for x in case.lengths[1]])[i] if lengths else after.prompts[i][None]
        )
    ]
    assert relative(torch.stack(ends), states) < 1e-6
    for name, mine, theirs in zip(NAMES, torch.autograd.grad((ours * case.grad).sum(), inputs), gradients, strict=True):
        assert relative(mine, theirs) <= 1e-5, name


def test_completions_do_not_leak_into_each_other() -> None:
    """A packed row without the fork carries a completion's state into the next, by far more than rounding."""
    case = make_delta(([12], [[10, 10]]), (1, 2), (16, 16))
    changed = [x.detach().clone() for x in case.inputs]
    first, second = slice(12, 22), slice(22, 32)
    for x in changed[:3]:
        x[first] = x[first].flip(0) * 2

    def leak(call: Callable[..., Tensor]) -> float:
        """How far the second completion moves when the first does."""
        return (call(*changed)[second] - call(*(x.detach() for x in case.inputs))[second]).abs().max().item()

    def packed(*inputs: Tensor) -> Tensor:
        return CHUNKED(*(x[None] for x in inputs), use_qk_l2norm_in_kernel=True)[0][0]

    assert leak(packed) > 0.1
    assert leak(lambda *x: prefix_gated_delta(*x, case.layout)) < 1e-6


def test_a_prompt_does_not_see_its_completions() -> None:
    case = make_delta(LAYOUTS["ragged"])
    changed = [x.detach().clone() for x in case.inputs]
    for x in changed:
        x[case.layout.completion_index] *= 0.5
    prompts = case.layout.prompt_index
    ours, theirs = (prefix_gated_delta(*x, case.layout)[prompts] for x in (changed, case.inputs))
    assert torch.equal(ours, theirs)


def permuted(case: Delta, orders: list[list[int]]) -> tuple[Delta, Tensor, Tensor]:
    """The case with the completions of each group in another order; where each row, and each completion, came from."""
    rows, completions, lengths, count = [], [], [], 0
    for (prompt, parts), order in zip(segments(case.lengths), orders, strict=True):
        rows += [torch.arange(part.start, part.stop) for part in (prompt, *(parts[i] for i in order))]
        completions += [count + i for i in order]
        lengths.append([parts[i].stop - parts[i].start for i in order])
        count += len(order)
    there, of = torch.cat(rows), torch.tensor(completions)
    inputs = [x.detach()[there].requires_grad_() for x in case.inputs]
    grads = case.state_grads[0], case.state_grads[1][of]
    return Delta((case.lengths[0], lengths), inputs, case.grad[there], grads), there, of


def test_the_order_of_completions_changes_nothing() -> None:
    case = make_delta(([20, 9], [[18, 1, 70], [16, 3]]))
    other, there, of = permuted(case, [[2, 0, 1], [1, 0]])
    (out, prompts, ends, *gradients), found = results(case), results(other)
    expected = [out[there], prompts, ends[of], *(x[there] for x in gradients)]
    for name, ours, theirs in zip(RESULTS, found, expected, strict=True):
        assert relative(ours, theirs) < 1e-6, name


def test_gradient_checkpointing() -> None:
    case = make_delta(LAYOUTS["ragged"])

    def call(*inputs: Any, **options: Any) -> Any:
        return checkpoint(prefix_gated_delta, *inputs, use_reentrant=False, **options)

    for ours, theirs in zip(results(case, call), results(case), strict=True):
        assert torch.equal(ours, theirs)


def test_outputs_whose_memory_held_nan() -> None:
    for name in ("ragged", "many chunks"):
        case = make_delta(LAYOUTS[name])
        with poisoned_memory():
            found = results(case)
        for ours, theirs in zip(found, results(case), strict=True):
            assert torch.equal(ours, theirs)


def test_views_and_strange_strides() -> None:
    case = make_delta(LAYOUTS["ragged"], (2, 2), (6, 6))
    q, k, v = (x.detach() for x in case.inputs[:3])
    fused = torch.cat([q, k, v], 1).unbind(0)
    views = torch.stack(fused).split([2, 2, 2], 1)
    strided = [x.mT.contiguous().mT for x in views]
    exact = results(case)
    for inputs in (views, strided):
        other = replace(case, inputs=[*inputs, *case.inputs[3:]])
        for ours, theirs in zip(results(other), exact, strict=True):
            assert relative(ours, theirs) < 1e-6


def test_without_states_the_output_is_the_same() -> None:
    case = make_delta(LAYOUTS["ragged"])
    out = prefix_gated_delta(*case.inputs, case.layout)
    assert isinstance(out, Tensor)
    assert torch.equal(out, results(case)[0])


def test_autocast_changes_nothing() -> None:
    case = make_delta(LAYOUTS["ragged"])
    plain = prefix_gated_delta(*case.inputs, case.layout)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prefix_gated_delta(*case.inputs, case.layout), plain)


def test_a_decay_to_nothing() -> None:
    """exp(-80) a token: a chunk's decays are 0 in fp32, and none is a ratio of two."""
    case = make_delta(LAYOUTS["many chunks"])
    q, k, v, g, beta = case.inputs
    case = replace(case, inputs=[q, k, v, torch.full_like(g, -80.0).requires_grad_(), beta])
    found = results(case)
    assert all(x.isfinite().all() for x in found)
    check(case, found=found)


def test_padding_is_that_of_last_chunks_alone() -> None:
    """Nothing is padded to the longest sequence, and a row of short ones is cut into short chunks."""
    device = torch.device("cpu")
    chunks = reference.cut((500, 3, 65), device)
    assert len(chunks.tokens.there) == 64 * (8 + 1 + 2)
    assert chunks.active == [3, 2, 1, 1, 1, 1, 1, 1]
    assert len(reference.cut((9, 7, 2), device).tokens.there) == 27
    case = make_delta(([300], [[3] * 20]), (1, 1), (8, 8))
    with LargestTensor() as largest:
        prefix_gated_delta(*case.inputs, case.layout)
    assert largest.numel <= 64 * 64 * 5, largest.operation  # a chunk's decays


def test_all_prompts_are_one_call_and_all_completions_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, run = [], reference.gated_delta_rule

    def spy(inputs: Any, lengths: tuple[int, ...], *others: Any, **options: Any) -> Any:
        seen.append(lengths)
        return run(inputs, lengths, *others, **options)

    monkeypatch.setattr(reference, "gated_delta_rule", spy)
    case = make_delta(([2, 3, 4], [[1], [], [2, 2]]))
    prefix_gated_delta(*case.inputs, case.layout)
    assert seen == [(2, 3, 4), (1, 2, 2)]


def test_a_shared_prompt_saves_its_share_of_the_memory() -> None:
    """Beside every [prompt | completion] as a sequence of its own: four fifths of what the tokens are fewer, at least.
    Times are measured: what a machine is busy with changes them."""
    prompt, count, completion = 306, 8, 64
    shared: Lengths = ([prompt], [[completion] * count])
    repeated: Lengths = ([prompt + completion] * count, [[]] * count)
    peaks, tokens = [], []
    for lengths in (shared, repeated):
        case = make_delta(lengths, (2, 2), (32, 32))
        with PeakMemory(torch.device("cpu")) as peak:
            out = prefix_gated_delta(*case.inputs, case.layout)
            gradients = torch.autograd.grad(out, case.inputs, case.grad)
        del out, gradients
        peaks.append(peak.bytes)
        tokens.append(case.layout.total_tokens)
    assert peaks[1] / peaks[0] >= 0.8 * tokens[1] / tokens[0]
