"""selective_log_softmax: log-probability of each label from whole logits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import oracle, peers, shapes
from benchmarks.cases import OURS, Case, Contender, Work
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
            Contender(OURS, lambda x: peers.selective_step(x, selected, backward=backward)),
            *peers.selective_peers(backward=backward, compiled=device.type == "cuda"),
        ),
    )


def selected(logits: Tensor, labels: Tensor, rows: tuple[int, int]) -> Tensor:
    """Ours, as :mod:`benchmarks.peers` calls all of them."""
    return selective_log_softmax(logits, labels, temperature=shapes.TEMPERATURE)


def _work(inputs: LogitInputs, *, backward: bool) -> Work:
    """The backward pass reads the logits once more and writes as many."""
    return Work(0.0, (3 if backward else 1) * inputs.logits.nbytes + 2 * inputs.head.labels.nbytes, "")


def test_selective_log_softmax(run_case):
    run_case()
