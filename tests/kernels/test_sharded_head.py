"""A head whose vocabulary is divided among two ranks gives what one rank gives; and soft caps, on one and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import loss_cases as cases
import pytest
import torch
from sharded_ranks import compute
from torch import Tensor
from triton_cases import QUIET, leaf, make_head, upstream

from videor1_kernels import linear_grpo_loss, linear_logprob
from videor1_kernels.testing import assert_matches

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
VOCAB = 83


def head_case(backend: str, dtype: torch.dtype, parts: list[tuple[int, int]], **more: Any) -> dict[str, Any]:
    head = make_head(11, VOCAB, 12, dtype, bias=more.pop("biased", True), ignored=True)
    bias = None if head.bias is None else head.bias.detach()
    if bias is not None and parts[1][0] < VOCAB - 1:
        bias[parts[1][0] + 1 : -2] = -torch.inf  # most of the second part is banned
    temperature = torch.linspace(0.5, 2, 11) if more.get("softcap") else 0.7
    case = {"backend": backend, "parts": parts, "bias": bias, "labels": head.labels, "temperature": temperature}
    case |= {"hidden": head.hidden.detach(), "weight": head.weight.detach(), "softcap": None, "loss": None}
    return case | {"incoming": [upstream(11, seed=i) for i in range(2)]} | more


def every_case() -> list[dict[str, Any]]:
    halves, uneven = [(0, 40), (40, VOCAB)], [(0, 80), (80, VOCAB)]
    found = [head_case(backend, dtype, halves) for backend, dtype in cases.KINDS]
    found += [head_case(*cases.KINDS[0], uneven, softcap=1.5), head_case(*cases.KINDS[1], uneven, softcap=1.5)]
    generator = torch.Generator().manual_seed(2)
    equal = head_case(*cases.KINDS[1], [(0, 40), (40, 80)], biased=False, verl=True)
    found.append(equal | {"labels": equal["labels"].clamp(max=79)})
    loss: dict[str, Any] = {
        "advantages": torch.randn(3, generator=generator),
        "cu_seqlens": torch.tensor([0, 4, 4, 11]),
    }
    loss |= {name: -5 + torch.randn(11, generator=generator) for name in ("old_logp", "ref_logp")}
    loss |= {"clip_low": 0.2, "clip_high": 0.3}
    for backend, dtype in (cases.KINDS[0], cases.KINDS[1]):
        found.append(head_case(backend, dtype, halves, loss=loss, biased=False))
        found.append(head_case(backend, dtype, halves, loss=loss | {"importance_level": "sequence"}, softcap=2.0))
        bonus = {"entropy_coef": 0.3, "token_weight": torch.tensor([0.0, *[0.5, 1.5] * 5])}
        found.append(head_case(backend, dtype, halves, loss=loss | bonus))
        without = {"completion_mask": torch.tensor([True, True, False]), "loss_type": "bnpo"}
        found.append(head_case(backend, dtype, uneven, loss=loss | bonus | without))
    return found


CASES = every_case()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[dict[str, Tensor]], list[str]]]:
    """Results of both ranks, for each of CASES, and the messages of mistakes."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(CASES, folder / "cases.pt")
    script, here = Path(__file__).with_name("sharded_ranks.py"), os.environ | {"TRITON_INTERPRET": "1"}
    commands = [
        [sys.executable, str(script), str(rank), str(folder / "store"), str(folder / "cases.pt"), str(folder / name)]
        for rank, name in enumerate(("0.pt", "1.pt"))
    ]
    running = [subprocess.Popen(command, env=here) for command in commands]
    assert [process.wait(120) for process in running] == [0, 0]
    return [torch.load(folder / name) for name in ("0.pt", "1.pt")]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_ranks_equal_one(number: int, ranks: list[tuple[list[dict[str, Tensor]], list[str]]]) -> None:
    """To rounding of the whole in fp64: every rank the results and d_hidden, its own rows of d_weight and d_bias."""
    case = CASES[number]
    wide = case | {name: case[name].double() for name in ("hidden", "weight", "bias") if case[name] is not None}
    whole = compute(wide | {"backend": "reference"}, 0, case["parts"][1][1], None)
    for (start, end), (found, _) in zip(case["parts"], ranks, strict=True):
        assert found[number].keys() == whole.keys()
        for name, ours in found[number].items():
            theirs = whole[name][start:end] if name in ("d_weight", "d_bias") else whole[name]
            if name == "skipped":
                assert torch.equal(ours, theirs)
            else:
                assert_matches(ours, theirs, name=name)
    a, b = (found[number] for found, _ in ranks)
    assert all(torch.equal(a[name], b[name]) for name in a if name not in ("d_weight", "d_bias"))


def test_labels_that_no_rank_or_two_have_are_refused(ranks: list[tuple[list[dict[str, Tensor]], list[str]]]) -> None:
    for rank, (_, messages) in enumerate(ranks):
        beyond, twice = messages
        assert f"each in the part of exactly one rank (this rank holds {3 * rank} to {3 * rank + 2}), got [9]" in beyond
        assert "exactly one rank (this rank holds 0 to 2), got [0, 1]" in twice


def capped(head: Any, softcap: float, temperature: float) -> tuple[Tensor, Tensor]:
    """The formula, on whole logits."""
    logits = torch.nn.functional.linear(head.hidden, head.weight, head.bias)
    logits = torch.where(logits == -torch.inf, logits, softcap * torch.tanh(logits / softcap)) / temperature
    logp = logits.log_softmax(-1)
    kept = head.labels != -100
    chosen = logp.gather(-1, head.labels.clamp(min=0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp.clamp(min=-1e9)).sum(-1)
    return chosen.where(kept, 0.0), entropy.where(kept, 0.0)


@pytest.mark.grid(kind=cases.KINDS, softcap=[0.8, 30.0], banned=[False, True])
def test_softcap(kind: cases.Kind, softcap: float, banned: bool) -> None:
    """Against the formula in fp64: small caps, at which most logits are cut, and Gemma's; banned tokens stay so."""
    backend, dtype = kind
    head = make_head(7, 70, 16, dtype, bias=True, ignored=True)
    if banned:
        assert head.bias is not None
        with torch.no_grad():
            head.bias[20:60] = -torch.inf
    incoming = [upstream(7, seed=i) for i in range(2)]
    found = linear_logprob(
        head.hidden, head.weight, head.labels.where((head.labels < 20) | (head.labels > 59), 3), bias=head.bias,
        temperature=0.7, softcap=softcap, backend=backend,
    )  # fmt: skip
    ours = [*found, *torch.autograd.grad(found, head.leaves, [g.to(found[0].dtype) for g in incoming])]
    exact = replace(head.oracle(), labels=head.labels.where((head.labels < 20) | (head.labels > 59), 3))
    expected = capped(exact, softcap, 0.7)
    theirs = [*expected, *torch.autograd.grad(expected, exact.leaves, [g.double() for g in incoming])]
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_matches(a, b.nan_to_num(0.0) if number > 1 else b, name=f"result {number}")


def test_gradcheck_of_a_softcap() -> None:
    head = make_head(4, 5, 3, torch.float64, bias=True, ignored=True)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, head.labels, bias=b, softcap=1.2), tuple(head.leaves)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap: expected .*above 0.*got 0"),
        ({"vocab_shard": 3}, r"vocab_shard: expected \(the first token of this rank's rows.*got 3"),
        ({"vocab_shard": (0, None)}, r"vocab_shard: expected \(the first token"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    head = make_head(2, 5, 3)
    with pytest.raises(ValueError, match=message):
        linear_logprob(head.hidden, head.weight, head.labels, **options)


def test_a_dtensor_is_told_how_to_be_passed() -> None:
    class DTensor(torch.Tensor):
        """Stands for torch.distributed.tensor.DTensor, which needs a process group to be made."""

    weight = torch.randn(5, 3).as_subclass(DTensor)
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"weight: expected a plain tensor: weight.to_local\(\) and vocab_shard=\("):
        linear_logprob(torch.randn(2, 3), weight, labels)
    advantages, bounds = torch.zeros(1), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"hidden: expected a plain tensor: hidden.to_local\(\), got a DTensor"):
        linear_grpo_loss(leaf(torch.randn(2, 3)).as_subclass(DTensor), torch.randn(5, 3), labels, advantages, bounds)
