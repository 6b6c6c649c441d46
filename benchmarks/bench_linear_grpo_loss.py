"""linear_grpo_loss: the loss from hidden states, and its gradients into them and the head."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks import oracle, peers, shapes
from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.shapes import HeadInputs, Size
from videor1_kernels import GrpoLoss, linear_grpo_loss

DOES = {"reference": "2NHV + 6NHV of the rows that are not zero", "triton": "2NHV + 4NHV of the rows that are not zero"}
ZERO_SHARE = 0.625  # of the completions; with the clipped tokens about 63% of the rows have no coefficient


def cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        large = shapes.qwen_7b(16384)
        rest = (shapes.qwen_7b(2048), shapes.qwen_7b(8192), shapes.qwen_3b(8192))
        return [
            _case(large, compiled=True),
            _case(large, zero=True, compiled=True),
            *(_case(size, few=True) for size in rest),
        ]
    return [_case(shapes.small()), _case(shapes.small(), zero=True, few=True)]


def _case(size: Size, *, zero: bool = False, few: bool = False, compiled: bool = False) -> Case:
    beta, zero_completions = (0.0, round(ZERO_SHARE * size.completions)) if zero else (0.04, 0)
    others = peers.grpo_peers(compiled=compiled)
    return Case(
        op="linear_grpo_loss",
        title="forward + backward, 63% of rows zero, beta 0" if zero else "forward + backward, beta 0.04",
        size=size.described(),
        dtype=size.dtype,
        inputs=functools.partial(shapes.head_inputs, size, beta=beta, zero_completions=zero_completions),
        expected=oracle.grpo,
        work=_work,
        contenders=(Contender(OURS, _ours, does=DOES), *(others[:1] if few else others)),
    )


def call(inputs: HeadInputs, backend: str = "auto") -> GrpoLoss:
    operands = (inputs.hidden, inputs.weight, inputs.labels, inputs.advantages, inputs.cu_seqlens)
    options = oracle.loss_options(inputs)
    return linear_grpo_loss(*operands, **options, temperature=shapes.TEMPERATURE, backend=backend)


def _ours(inputs: HeadInputs) -> Step:
    def step() -> Mapping[str, Tensor]:
        out = call(inputs)
        gradients = peers.head_gradients(out.loss, inputs)
        return {"loss": out.loss.detach(), "logp": out.logp, **gradients}

    return step


def _work(inputs: HeadInputs) -> Work:
    """Both gradient products leave out the rows whose coefficient is 0."""
    tokens = inputs.size.tokens
    _, coefficient = oracle.differentiate(lambda x: oracle.grpo_of(x, inputs), _logp(inputs))
    live = int((coefficient != 0).sum())
    product = tokens * inputs.weight.numel()
    forms = 2 + 4 * live / tokens
    moved = 2 * (inputs.hidden.nbytes + inputs.weight.nbytes) + inputs.labels.nbytes + 4 * inputs.old_logp.nbytes
    return Work(forms * product, moved, f"{forms:.3g}NHV")


def _logp(inputs: HeadInputs) -> Tensor:
    return oracle.statistics(inputs)[0]


def test_linear_grpo_loss(run_case):
    run_case()
