"""grpo_loss: from log-probabilities alone, and behind selective_log_softmax from whole logits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import oracle, peers, shapes
from benchmarks.bench_selective_log_softmax import selected
from benchmarks.cases import OURS, Case, Contender, Work
from benchmarks.shapes import HeadInputs, Size
from videor1_kernels import grpo_loss


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
        contenders=(Contender(OURS, lambda x: peers.logp_loss_step(x, _loss)), *peers.loss_peers(compiled=compiled)),
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
            Contender(
                f"{OURS} (selective_log_softmax + grpo_loss)", lambda x: peers.logits_loss_step(x, selected, _loss)
            ),
            *peers.logits_loss_peers(compiled=compiled),
        ),
        uses=("selective_log_softmax",),
    )


def _loss(logp: Tensor, inputs: HeadInputs) -> Tensor:
    return grpo_loss(logp, inputs.advantages, inputs.cu_seqlens, **oracle.loss_options(inputs)).loss


def test_grpo_loss(run_case):
    run_case()
