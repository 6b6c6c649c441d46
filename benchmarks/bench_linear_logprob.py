"""linear_logprob: log-probability and entropy of each label from hidden states."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks import oracle, peers, shapes
from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.shapes import HeadInputs, Size
from videor1_kernels import linear_logprob


def cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        forward = [
            _case(shapes.qwen_7b(8192)),
            *(_case(size, few=True) for size in (shapes.qwen_7b(2048), shapes.qwen_7b(16384), shapes.qwen_3b(8192))),
        ]
        return [*forward, _case(shapes.qwen_7b(8192), backward=True)]
    bars = [_case(shapes.cpu_bar(dtype), few=True, slow=True) for dtype in (torch.float32, torch.bfloat16)]
    return [_case(shapes.small()), _case(shapes.small(), backward=True, few=True), *bars]


def _case(size: Size, *, backward: bool = False, few: bool = False, slow: bool = False) -> Case:
    others = peers.logprob_peers(backward=backward)
    return Case(
        op="linear_logprob",
        title="forward + backward" if backward else "forward",
        size=size.described(),
        dtype=size.dtype,
        inputs=functools.partial(shapes.head_inputs, size),
        expected=oracle.logprob_gradients if backward else oracle.logprob,
        work=functools.partial(_work, backward=backward),
        contenders=(
            Contender(OURS, functools.partial(_ours, backward=backward), does="8NHV" if backward else ""),
            *(others[:1] if few else others),
        ),
        slow=slow,
    )


def _ours(inputs: HeadInputs, *, backward: bool) -> Step:
    def call() -> Mapping[str, Tensor]:
        logp, entropy = linear_logprob(inputs.hidden, inputs.weight, inputs.labels, temperature=shapes.TEMPERATURE)
        return {"logp": logp, "entropy": entropy}

    return peers.logprob_step(inputs, call, backward=backward)


def _work(inputs: HeadInputs, *, backward: bool) -> Work:
    product = inputs.hidden.shape[0] * inputs.weight.numel()  # NHV
    operands = inputs.hidden.nbytes + inputs.weight.nbytes
    if backward:
        return Work(6 * product, 2 * operands + 3 * inputs.labels.nbytes, "6NHV")
    return Work(2 * product, operands + 2 * inputs.labels.nbytes, "2NHV")


def test_linear_logprob(run_case):
    run_case()
