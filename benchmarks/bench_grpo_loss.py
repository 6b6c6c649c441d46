"""grpo_loss: from log-probabilities alone, and behind selective_log_softmax from whole logits."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks import oracle, peers, shapes
from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.shapes import HeadInputs, LogitInputs, Size
from videor1_kernels import grpo_loss, selective_log_softmax


def cases(device: torch.device) -> list[Case]:
    on_gpu = device.type == "cuda"
    size = shapes.qwen_7b(8192) if on_gpu else shapes.small()
    sizes = [shapes.tokens(n) for n in ((16384, 1048576) if on_gpu else (4096,))]
    return [_from_logits(size, compiled=on_gpu), *(_from_logp(size, compiled=on_gpu) for size in sizes)]


def _from_logp(size: Size, *, compiled: bool) -> Case:
    return Case(
        op="grpo_loss",
        title="from log-probs, forward + backward",
        size={"N": size.tokens, "completion": size.completion, "dtype": "float32"},
        dtype=torch.float32,
        inputs=functools.partial(shapes.head_inputs, size),
        expected=oracle.grpo_from_logp,
        work=lambda inputs: Work(0.0, 4 * inputs.old_logp.nbytes, ""),
        contenders=(Contender(OURS, _ours_from_logp), *peers.loss_peers(compiled=compiled)),
    )


def _from_logits(size: Size, *, compiled: bool) -> Case:
    return Case(
        op="grpo_loss",
        title="from logits, forward + backward",
        size=size.described(),
        dtype=size.dtype,
        inputs=functools.partial(shapes.logit_inputs, size),
        expected=oracle.grpo_from_logits,
        work=lambda inputs: Work(0.0, 3 * inputs.logits.nbytes, ""),
        contenders=(
            Contender(f"{OURS} (selective_log_softmax + grpo_loss)", _ours_from_logits),
            *peers.logits_loss_peers(compiled=compiled),
        ),
        uses=("selective_log_softmax",),
    )


def _loss(logp: Tensor, inputs: HeadInputs) -> Tensor:
    return grpo_loss(logp, inputs.advantages, inputs.cu_seqlens, **oracle.loss_options(inputs)).loss


def _ours_from_logp(inputs: HeadInputs) -> Step:
    logp = oracle.policy_logp(inputs)

    def step() -> Mapping[str, Tensor]:
        loss = _loss(logp, inputs)
        return {"loss": loss.detach(), "d_logp": torch.autograd.grad(loss, logp)[0]}

    return step


def _ours_from_logits(inputs: LogitInputs) -> Step:
    def step() -> Mapping[str, Tensor]:
        logp = selective_log_softmax(inputs.logits, inputs.head.labels, temperature=shapes.TEMPERATURE)
        loss = _loss(logp, inputs.head)
        return {"loss": loss.detach(), "d_logits": torch.autograd.grad(loss, inputs.logits)[0]}

    return step


def test_grpo_loss(run_case):
    run_case()
