"""gated_delta_step and causal_conv_step on every backend: against one step of the rule in fp64, against transformers,
and a prefill with 200 steps behind it against the whole row."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from gated_delta_cases import convolved, make_delta, rule
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen
from triton_cases import DEVICE, DTYPES

from videor1_kernels import (
    PrefixLayout,
    causal_conv_step,
    gated_delta_step,
    last_backend,
    prefix_causal_conv,
    prefix_gated_delta,
)
from videor1_kernels.testing import assert_matches, assert_no_worse, poisoned_memory

BACKENDS = ["reference", "triton"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TAKEN = {"reference": FLOATS, "triton": DTYPES}
NAN = float("nan")
RECURRENT = inspect.unwrap(qwen.torch_recurrent_gated_delta_rule)
UPDATE = inspect.unwrap(qwen.causal_conv1d_update)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # slots that do not exist


@dataclass
class Delta:
    """One call; slots of no row are NaN."""

    inputs: list[Tensor]  # q, k, v, g, beta
    state: Tensor
    slots: Tensor | None
    backend: str
    options: dict[str, Any]

    def __call__(self) -> tuple[Tensor, Tensor]:
        """The output, and the states after it; the call's own stay as they were."""
        state = self.state.clone(memory_format=torch.preserve_format)
        out = gated_delta_step(*self.inputs, state, slots=self.slots, backend=self.backend, **self.options)
        assert last_backend("gated_delta_step") == self.backend
        return out, state

    def rows(self) -> Tensor:
        return torch.arange(len(self.inputs[0])) if self.slots is None else self.slots.long().cpu()

    def exact(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = (x.cpu().to(dtype) for x in self.inputs)
        if self.options.get("use_qk_l2norm", True):
            q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        q = q * (self.options.get("scale") or k.shape[-1] ** -0.5)
        state, outs = self.state.cpu().to(dtype).clone(), []
        for row, slot in enumerate(self.rows()):
            one = slice(row, row + 1)
            out, state[slot] = rule(q[one], k[one], v[one], g[one], beta[one], state[slot])
            outs.append(out)
        return torch.cat(outs) if outs else v, state


def make(
    backend: str,
    rows: int = 5,
    heads: tuple[int, int] = (2, 4),
    dims: tuple[int, int] = (16, 8),
    dtype: torch.dtype = torch.float32,
    *,
    slots: bool = True,
    index: torch.dtype = torch.int64,
    **options: Any,
) -> Delta:
    device = DEVICE if backend == "triton" else "cpu"
    case = make_delta(([max(rows, 1)], [[]]), heads, dims, dtype, norm=options.get("use_qk_l2norm", True))
    inputs = [x.detach()[:rows].to(device) for x in case.inputs]
    generator = torch.Generator().manual_seed(rows)
    count = rows + 2
    order = torch.randperm(count, generator=generator)[:rows] if slots else torch.arange(rows)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = torch.full((count, heads[1], *dims), NAN, dtype=wide)
    state[order] = torch.randn(rows, heads[1], *dims, generator=generator).to(wide)
    return Delta(inputs, state.to(device), order.to(device, index) if slots else None, backend, options)


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.fits(lambda backend, dtype, **_: dtype in TAKEN[backend])
@pytest.mark.grid(
    backend=BACKENDS,
    dtype=FLOATS,
    shape=[
        (1, (1, 1), (2, 1)),
        (5, (2, 4), (16, 8)),
        (3, (1, 3), (20, 50)),
        (2, (2, 2), (128, 128)),
        (0, (1, 2), (4, 4)),
    ],
    slots=[True, False],
    index=[torch.int64, torch.int32],
    norm=[True, False],
    scale=[None, 0.3],
)
def test_equals_the_rule(
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, tuple[int, int], tuple[int, int]],
    slots: bool,
    index: torch.dtype,
    norm: bool,
    scale: float | None,
) -> None:
    call = make(backend, *shape, dtype, slots=slots, index=index, use_qk_l2norm=norm, scale=scale)
    (out, state), (exact, exact_state) = call(), call.exact()
    assert (out.dtype, state.dtype) == (dtype, call.state.dtype)
    assert_matches(out.cpu(), exact)
    rows = call.rows()
    assert_matches(state.cpu()[rows], exact_state[rows])
    others = [i for i in range(len(state)) if i not in rows]
    assert state[others].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_worse_than_plain_torch(backend: str) -> None:
    call = make(backend, 6, (2, 4), (64, 64))
    exact, plain = call.exact(), call.exact(torch.float32)
    rows = call.rows()
    for ours, single, double in zip(call(), plain, exact, strict=True):
        pick = rows if len(ours) > len(rows) else slice(None)
        assert_no_worse(ours.cpu()[pick], single[pick], double[pick], terms=128)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_transformers(backend: str) -> None:
    call = make(backend, 3, (2, 4), (16, 16), slots=False)
    inputs = [x.cpu()[:, None] for x in call.inputs]
    out, state = RECURRENT(
        *inputs, initial_state=call.state.cpu()[:3], output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    ours, after = call()
    assert_matches(ours.cpu(), out[:, 0].double())
    assert_matches(after.cpu()[:3], state.double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_strange_strides(backend: str) -> None:
    """Rows of one product with all in it, columns first, and slots with something between them."""
    call = make(backend, 4, (2, 2), (16, 16))
    expected = call()
    q, k, v, g, beta = call.inputs
    wide = torch.cat([q, k, v], 1).flatten(1)
    size = 2 * 16
    views = [part.unflatten(1, (2, 16)) for part in wide.split(size, 1)]
    gates = torch.stack([g, beta], -1)
    room = torch.full((len(call.state), 2, *call.state.shape[1:]), NAN, device=g.device)
    room[:, 0] = call.state
    for inputs in (views, [x.mT.contiguous().mT for x in (q, k, v)]):
        state = room.clone()
        out = gated_delta_step(*inputs, *gates.unbind(-1), state[:, 0], slots=call.slots, backend=backend)
        for ours, theirs in zip((out, state[:, 0]), expected, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert state[:, 1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_poisoned_memory(backend: str) -> None:
    call = make(backend, 3, (1, 2), (20, 50))
    with poisoned_memory():
        found = call()
    assert_same(found, call())
    assert found[0].isfinite().all()


def test_a_slot_that_does_not_exist() -> None:
    """The reference says so; the kernel, which does not wait, gives NaN and writes nothing."""
    for bad in (-1, 7, 2**31 - 1):
        call = make("reference", 5)
        assert call.slots is not None
        slots = call.slots.clone()
        slots[2] = bad
        with pytest.raises(ValueError, match=r"gated_delta_step: slots: expected values in \[0, 7\), got 1 outside"):
            replace(call, slots=slots)()
        good = make("triton", 5)
        expected, after = good()
        out, state = replace(good, slots=slots.to(DEVICE))()
        assert out[2].isnan().all()
        keep = [0, 1, 3, 4]
        assert torch.equal(out[keep], expected[keep])
        after[call.slots[2]] = good.state[call.slots[2]]  # the row that had it wrote nothing
        torch.testing.assert_close(state, after, rtol=0, atol=0, equal_nan=True)


@dataclass
class Conv:
    x: Tensor
    state: Tensor
    weight: Tensor
    bias: Tensor | None
    slots: Tensor | None
    activation: str
    backend: str

    def __call__(self) -> tuple[Tensor, Tensor]:
        state = self.state.clone(memory_format=torch.preserve_format)
        options: dict[str, Any] = {"bias": self.bias, "slots": self.slots, "activation": self.activation}
        out = causal_conv_step(self.x, state, self.weight, **options, backend=self.backend)
        assert last_backend("causal_conv_step") == self.backend
        return out, state

    def exact(self) -> tuple[Tensor, Tensor]:
        x, state, weight = (x.cpu().double() for x in (self.x, self.state, self.weight))
        bias = None if self.bias is None else self.bias.cpu().double()
        out = x.clone()
        slots = range(len(x)) if self.slots is None else self.slots.tolist()
        for row, slot in enumerate(slots):
            [out[row]], state[slot] = convolved(x[row, None], weight, bias, state[slot])
        return out * torch.sigmoid(out) if self.activation == "silu" else out, state


def make_conv(
    backend: str,
    rows: int = 5,
    channels: int = 40,
    size: int = 4,
    dtype: torch.dtype = torch.float32,
    *,
    slots: bool = True,
    bias: bool = True,
    activation: str = "silu",
    weight: torch.dtype | None = None,
) -> Conv:
    device = DEVICE if backend == "triton" else "cpu"
    generator = torch.Generator().manual_seed(rows + channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)

    order = torch.randperm(rows + 2, generator=generator)[:rows].to(device) if slots else None
    state = torch.full((rows + 2, channels, size - 1), NAN, dtype=dtype, device=device)
    state[order if slots else slice(rows)] = normal(rows, channels, size - 1)
    filters = normal(channels, size).to(weight or dtype)
    return Conv(normal(rows, channels), state, filters, normal(channels) if bias else None, order, activation, backend)


@pytest.mark.fits(lambda backend, dtype, weight, **_: {dtype, weight or dtype} <= set(TAKEN[backend]))
@pytest.mark.grid(
    backend=BACKENDS,
    dtype=FLOATS,
    weight=[None, torch.float32],
    shape=[(1, 1, 2), (5, 40, 4), (3, 600, 4), (2, 20, 1), (0, 8, 4)],
    slots=[True, False],
    bias=[True, False],
    activation=["silu", "none"],
)
def test_a_step_of_the_convolution(
    backend: str,
    dtype: torch.dtype,
    weight: torch.dtype | None,
    shape: tuple[int, int, int],
    slots: bool,
    bias: bool,
    activation: str,
) -> None:
    call = make_conv(backend, *shape, dtype, slots=slots, bias=bias, activation=activation, weight=weight)
    (out, state), (exact, after) = call(), call.exact()
    assert out.dtype == dtype
    assert_matches(out.cpu(), exact)
    torch.testing.assert_close(state.cpu(), after.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_the_convolution_equals_transformers(backend: str) -> None:
    call = make_conv(backend, bias=False, slots=False)
    state = call.state.cpu()[:5].clone()
    out = UPDATE(call.x.cpu()[..., None], state, call.weight.cpu(), activation="silu")
    ours, after = call()
    assert_matches(ours.cpu(), out[..., 0].double())
    assert torch.equal(after.cpu()[:5], state)


def test_a_slot_of_the_convolution_that_does_not_exist() -> None:
    call, good = make_conv("reference"), make_conv("triton")
    assert call.slots is not None
    slots = call.slots.clone()
    slots[2] = 7
    with pytest.raises(ValueError, match=r"causal_conv_step: slots: expected values in \[0, 7\), got 1 outside"):
        replace(call, slots=slots)()
    (expected, after), (out, state) = good(), replace(good, slots=slots.to(DEVICE))()
    assert out[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(out[keep], expected[keep])
    after[call.slots[2]] = good.state[call.slots[2]]
    torch.testing.assert_close(state, after, rtol=0, atol=0, equal_nan=True)


def test_a_prefill_and_200_steps_equal_the_whole_row() -> None:
    """Of a layer: convolution, split, rule; three completions of a prompt, which take slots in another order."""
    torch.manual_seed(0)
    key_heads, heads, dk, dv, steps, prompt = 1, 2, 16, 16, 200, 70
    width, size = 2 * key_heads * dk + heads * dv, 4
    whole = PrefixLayout([prompt], [[steps] * 3])
    x, weight = torch.randn(whole.total_tokens, width), torch.randn(width, size) / 2
    g, beta = -torch.rand(whole.total_tokens, heads), torch.rand(whole.total_tokens, heads)

    def split(x: Tensor) -> list[Tensor]:
        parts = x.split([key_heads * dk, key_heads * dk, heads * dv], -1)
        return [y.unflatten(-1, (-1, n)) for y, n in zip(parts, (dk, dk, dv), strict=True)]

    mixed = prefix_causal_conv(x, weight, whole, activation="silu")
    expected, ends = prefix_gated_delta(*split(mixed), g, beta, whole, return_states=True)

    prefill = PrefixLayout([prompt], [[]])
    mixed, tails = prefix_causal_conv(x[:prompt], weight, prefill, activation="silu", return_states=True)
    first, states = prefix_gated_delta(*split(mixed), g[:prompt], beta[:prompt], prefill, return_states=True)
    assert_matches(first, expected[:prompt].double())
    slots = torch.tensor([4, 1, 2])
    state, tail = torch.zeros(5, heads, dk, dv), torch.zeros(5, width, size - 1)
    state[slots], tail[slots] = states.prompts, tails.prompts
    for t in range(steps):
        rows = prompt + torch.arange(3) * steps + t
        mixed = causal_conv_step(x[rows], tail, weight, slots=slots, activation="silu")
        out = gated_delta_step(*split(mixed), g[rows], beta[rows], state, slots=slots)
        assert_matches(out, expected[rows].double(), name=f"step {t}")
    assert_matches(state[slots], ends.completions.double())
