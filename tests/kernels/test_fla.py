"""Linear attention by flash-linear-attention: what its functions are given, and when they are taken.

A stand-in has the signatures of version 0.6.0 and refuses what that version's kernels would not take; it computes by
the formula, sequence by sequence.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from gated_delta_cases import LAYOUTS, convolved, make_delta
from torch import Tensor

from videor1_kernels import (
    PrefixLayout,
    backends,
    chosen_backend,
    dispatch,
    last_backend,
    prefix_causal_conv,
    prefix_gated_delta,
)
from videor1_kernels.prefix_gated_delta import fla

OPS = ("prefix_gated_delta", "prefix_causal_conv")
HALF = torch.bfloat16
# As ``inspect.signature`` gives them in 0.6.0, without annotations.
SIGNATURES = {
    "chunk_gated_delta_rule": "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, "
    "use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, "
    "cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, **kwargs",
    "causal_conv1d": "x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, "
    "activation=None, backend='triton', cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, "
    "**kwargs",
}


class Fla:
    """The stand-in; ``calls`` holds the name and the bound arguments of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def _given(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        signature = inspect.signature(eval(f"lambda {SIGNATURES[name]}: None"))
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        given = bound.arguments
        assert not given.pop("kwargs"), "an argument that its signature does not name"
        bounds, on_host = given["cu_seqlens"], given["cu_seqlens_cpu"]
        assert bounds.dtype == on_host.dtype == torch.int64
        assert bounds.tolist() == on_host.tolist()
        self.calls.append((name, dict(given)))
        return given

    def chunk_gated_delta_rule(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        given = self._given("chunk_gated_delta_rule", arguments, options)
        q, k, v, g, beta = (given[name] for name in ("q", "k", "v", "g", "beta"))
        _, rows, key_heads, dk = q.shape
        heads, dv = v.shape[2:]
        assert (q.shape, v.shape[:2]) == (k.shape, (1, rows))
        assert g.shape == beta.shape == (1, rows, heads)
        assert heads % key_heads == 0
        assert q.dtype == k.dtype == v.dtype == HALF
        bounds = given["cu_seqlens"].tolist()
        assert (bounds[0], bounds[-1]) == (0, rows)
        initial = given["initial_state"]
        if initial is not None:
            assert initial.shape == (len(bounds) - 1, heads, dk, dv)
            assert initial.dtype == torch.float32
        states, outs = [], []
        for i, (first, last) in enumerate(pairwise(bounds)):
            part = slice(first, last)
            x, y = (z[0, part].float() for z in (q, k))
            if given["use_qk_l2norm_in_kernel"]:
                x, y = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (x, y))
            state = q.new_zeros(heads, dk, dv, dtype=torch.float32) if initial is None else initial[i]
            out, state = _rule(x * given["scale"], y, v[0, part].float(), g[0, part], beta[0, part], state)
            outs.append(out)
            states.append(state)
        return torch.cat(outs)[None].to(q.dtype), torch.stack(states) if given["output_final_state"] else None

    def causal_conv1d(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        given = self._given("causal_conv1d", arguments, options)
        x, weight, bias, initial = (given[name] for name in ("x", "weight", "bias", "initial_state"))
        bounds = given["cu_seqlens"].tolist()
        count, (channels, size) = len(bounds) - 1, weight.shape
        assert x.shape == (1, bounds[-1], channels)
        assert given["activation"] in (None, "silu")
        if initial is None:
            initial = x.new_zeros(count, channels, size)
        assert initial.shape == (count, channels, size)
        outs, states = [], []
        for i, (first, last) in enumerate(pairwise(bounds)):
            wide = [None if t is None else t.float() for t in (weight, bias)]
            out, _ = convolved(x[0, first:last].float(), wide[0], wide[1], initial[i, :, 1:].float())
            outs.append(out * torch.sigmoid(out) if given["activation"] else out)
            states.append(torch.cat([initial[i], x[0, first:last].T], 1)[:, -size:])
        return torch.cat(outs)[None].to(x.dtype), torch.stack(states) if given["output_final_state"] else None


def _rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    repeat, outs = v.shape[1] // k.shape[1], []
    q, k = (x.repeat_interleave(repeat, 1) for x in (q, k))
    for t in range(len(q)):
        state = state * g[t].float().exp()[:, None, None]
        change = beta[t, :, None].float() * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t, :, :, None] * change[:, None]
        outs.append(torch.einsum("hk,hkv->hv", q[t], state))
    return torch.stack(outs), state


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Fla:
    """The stand-in as the package fla, and a CPU as a device that it runs on; on a GPU ``auto`` would take it."""
    stand_in = Fla()
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule", "fla.modules", "fla.modules.causal_conv1d"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = stand_in.chunk_gated_delta_rule  # type: ignore
    sys.modules["fla.modules.causal_conv1d"].causal_conv1d = stand_in.causal_conv1d  # type: ignore
    known = dict(dispatch._registry)
    for op in OPS:
        known[op] = [replace(entry, unavailable=lambda device, dtype: None) for entry in known[op]]
    monkeypatch.setattr(dispatch, "_registry", known)
    return stand_in


def assert_fla_ran(op: str, package: Fla, function: str, calls: int) -> None:
    assert last_backend(op) == "fla"
    assert [name for name, _ in package.calls] == [function] * calls


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", ["ragged", "only prompts", "single tokens", "a token more than a chunk"])
def test_the_rule_is_two_calls(package: Fla, name: str, norm: bool) -> None:
    case = make_delta(LAYOUTS[name], (1, 2), (8, 6), HALF, norm=norm)
    found, calls = {}, 1 + any(LAYOUTS[name][1])
    for backend in ("fla", "reference"):
        package.calls.clear()
        leaves = [x.detach().requires_grad_() for x in case.inputs]
        out, states = prefix_gated_delta(
            *leaves, case.layout, use_qk_l2norm=norm, scale=0.4, return_states=True, backend=backend
        )
        if backend == "fla":
            assert_fla_ran("prefix_gated_delta", package, "chunk_gated_delta_rule", calls)
        total = (out * case.grad).sum() + sum(
            (x * grad.float()).sum()
            for x, grad in zip((states.prompts, states.completions), case.state_grads, strict=True)
        )
        found[backend] = [out, states.prompts, states.completions, *torch.autograd.grad(total, leaves)]
    for ours, theirs in zip(found["fla"], found["reference"], strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("activation", ["silu", "none"])
def test_the_convolution_is_two_calls(package: Fla, activation: str) -> None:
    torch.manual_seed(0)
    layout = PrefixLayout([1, 2, 5], [[1, 2, 6], [3], []])
    given = [torch.randn(layout.total_tokens, 6), torch.randn(6, 4), torch.randn(6)]
    found = {}
    for backend in ("fla", "reference"):
        package.calls.clear()
        x, weight, bias = (y.to(HALF).requires_grad_() for y in given)
        options: dict[str, Any] = {"bias": bias, "activation": activation, "return_states": True, "backend": backend}
        out, states = prefix_causal_conv(x, weight, layout, **options)
        if backend == "fla":
            assert_fla_ran("prefix_causal_conv", package, "causal_conv1d", 2)
        total = out.square().sum() + states.prompts.sum() + states.completions.square().sum()
        found[backend] = [out, states.prompts, states.completions, *torch.autograd.grad(total, (x, weight, bias))]
    for ours, theirs in zip(found["fla"], found["reference"], strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=5e-2)


def test_states_are_asked_for_only_where_they_are_needed(package: Fla) -> None:
    def asked(lengths: tuple[list[int], list[list[int]]], **options: Any) -> list[bool]:
        case = make_delta(lengths, dtype=HALF)
        package.calls.clear()
        prefix_gated_delta(*case.inputs, case.layout, backend="fla", **options)
        return [given["output_final_state"] for _, given in package.calls]

    assert asked(([3], [[2]])) == [True, False]
    assert asked(([3], [[2]]), return_states=True) == [True, True]
    assert asked(([3], [[]])) == [False]
    assert asked(([3], [[]]), return_states=True) == [True]


def test_the_bounds_are_the_same_tensors_for_every_layer(package: Fla) -> None:
    """What fla makes of them it keeps by their identity, and reading them anew would wait for the device."""
    case = make_delta(LAYOUTS["ragged"], dtype=HALF)
    for _ in range(2):
        prefix_gated_delta(*case.inputs, case.layout, backend="fla")
    first, second = package.calls[:2], package.calls[2:]
    for (_, before), (_, after) in zip(first, second, strict=True):
        for name in ("cu_seqlens", "cu_seqlens_cpu"):
            assert before[name] is after[name]


def test_that_fla_ran_is_not_said_of_the_reference(package: Fla) -> None:
    case = make_delta(LAYOUTS["ragged"], dtype=HALF)
    prefix_gated_delta(*case.inputs, case.layout, backend="reference")
    with pytest.raises(AssertionError):
        assert_fla_ran("prefix_gated_delta", package, "chunk_gated_delta_rule", 2)


@pytest.mark.parametrize("op", OPS)
def test_which_is_taken_on_a_card(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 16 bits fla alone: without it an error that says what to install. fp32 and fp64 are the reference's."""
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda name: object())
    for dtype in (torch.bfloat16, torch.float16, None):
        assert chosen_backend(op, "cuda", dtype=dtype) == "fla"
        assert chosen_backend(op, "cpu", dtype=dtype) == "reference"
    for dtype in (torch.float32, torch.float64):
        assert chosen_backend(op, "cuda", dtype=dtype) == "reference"
    with pytest.raises(ValueError, match=f"{op}: backend 'fla' cannot run on cuda: it takes bf16 and fp16"):
        chosen_backend(op, "cuda", "fla", torch.float32)
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda name: None)
    for backend in ("auto", "fla"):
        with pytest.raises(ValueError, match=r'pip install -e "\.\[fla\]".*usable here: .*\'reference\'') as error:
            chosen_backend(op, "cuda", backend, torch.bfloat16)
        assert ("'auto'" in str(error.value).partition("usable here")[2]) == (backend != "auto")
    assert chosen_backend(op, "cuda", "reference", torch.bfloat16) == "reference"
    with pytest.raises(ValueError, match=f"{op}: backend 'fla' cannot run on cpu: it needs CUDA tensors"):
        chosen_backend(op, "cpu", "fla")
    assert set(backends(op)) == {"fla", "reference"}
