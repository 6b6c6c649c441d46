"""selective_log_softmax: log-probability of each label from whole logits."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks import oracle, peers, shapes
from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.shapes import LogitInputs
from videor1_kernels import selective_log_softmax


def cases(device: torch.device) -> list[Case]:
    return [_case(device, backward=False), _case(device, backward=True)]


def _case(device: torch.device, *, backward: bool) -> Case:
    size = shapes.qwen_7b(8192) if device.type == "cuda" else shapes.small()
    return Case(
        op="selective_log_softmax",
        title="forward + backward" if backward else "forward",
        size=size.described(),
        dtype=size.dtype,
        inputs=functools.partial(shapes.logit_inputs, size),
        expected=oracle.selected_gradients if backward else oracle.selected,
        work=functools.partial(_work, backward=backward),
        contenders=(
            Contender(OURS, functools.partial(_ours, backward=backward)),
            *peers.selective_peers(backward=backward, compiled=device.type == "cuda"),
        ),
    )


def _ours(inputs: LogitInputs, *, backward: bool) -> Step:
    labels, weights = inputs.head.labels, inputs.head.old_logp

    def forward() -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"logp": selective_log_softmax(inputs.logits, labels, temperature=shapes.TEMPERATURE)}

    def forward_backward() -> Mapping[str, Tensor]:
        logp = selective_log_softmax(inputs.logits, labels, temperature=shapes.TEMPERATURE)
        (d_logits,) = torch.autograd.grad(logp, inputs.logits, weights)
        return {"logp": logp.detach(), "d_logits": d_logits}

    return forward_backward if backward else forward


def _work(inputs: LogitInputs, *, backward: bool) -> Work:
    """The backward pass reads the logits once more and writes as many."""
    return Work(0.0, (3 if backward else 1) * inputs.logits.nbytes + 2 * inputs.head.labels.nbytes, "")


def test_selective_log_softmax(run_case):
    run_case()
