"""The training pass of a step, both ways in one run: forward and backward of one group's loss, on a packed row that
holds the prompt once, and on repeated rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import step_flops
from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.options import check_choice
from benchmarks.oracle import Expected
from benchmarks.repeated_rows import Head, RepeatedRows, Tower
from benchmarks.step_inputs import SHAPES, Group, Shape, StepInputs, step_inputs
from videor1.training.passes import tgrpo_loss
from videor1_kernels import GrpoLoss

SHARED = f"{OURS}: shared prefix"
BASELINE = "repeated rows, head on completions"
SAMPLE = 4096  # entries of each parameter's gradient that are compared
FAMILIES = {"d_tower": "visual.", "d_embedding": "embed_tokens", "d_head": "lm_head", "d_layers": "language_model."}

# Largest difference from the baseline: rms of log-probs and loss; gradients relative to the norm of those compared.
# In bf16 both ways round, the baseline its log-probs too: about 2e-2 between them at 4 to 36 layers.
BOUNDS = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (5e-2, 5e-2)}


def cases(
    device: torch.device,
    *,
    shape: Sequence[str] = (),
    prompt: int | None = None,
    generations: int = 8,
    completion: int = 768,
    checkpointing: bool | None = None,
) -> list[Case]:
    """Each model on one group of each length of the prompt."""
    on_card = device.type == "cuda"
    for name in shape:
        check_choice("shape", name, SHAPES, "training")
    lengths = (1224, 2248) if on_card else (1224,)
    groups = [Group(length, generations, completion) for length in (lengths if prompt is None else (prompt,))]
    for group in groups:
        group.grid  # noqa: B018 (refuses a prompt that leaves no whole video)
    names = shape or (("3b", "7b") if on_card else ("cpu",))
    return [training(SHAPES[name], group, checkpointing=checkpointing) for name in names for group in groups]


def small_training(*, checkpointing: bool = False) -> Case:
    """For the machinery: its times say nothing."""
    return training(SHAPES["toy"], Group(40, 3, 12, text=24, temporal=2), checkpointing=checkpointing)


def training(shape: Shape, group: Group, *, checkpointing: bool | None = None) -> Case:
    """Forward and backward of one group; ``checkpointing`` None: as the shape has it."""
    on = shape.checkpointing if checkpointing is None else checkpointing
    dtype = str(shape.dtype).removeprefix("torch.")
    size = {
        "model": f"{shape.name} ({shape.hidden} x {shape.layers})",
        "P": group.prompt,
        "G": group.generations,
        "C": group.completion,
        "dtype": dtype,
    }
    return Case(
        op="training step",
        uses=("prefix_attention", "linear_grpo_loss"),
        title=f"forward + backward, gradient checkpointing {'on' if on else 'off'}",
        size=size,
        dtype=shape.dtype,
        inputs=functools.partial(step_inputs, shape, group, on),
        expected=functools.partial(_expected, shape.dtype),
        work=_shared_work,
        contenders=(
            Contender(SHARED, _shared, does="packed row, no logits stored, tower once"),
            _repeated(BASELINE, "completions", "row"),
            _repeated("repeated rows as the reference code", "all", "row"),
            # On a CPU a row takes minutes, and this one says least.
            *([] if shape.name == "cpu" else [_repeated("repeated rows, both trimmed", "completions", "prompt")]),
        ),
        against=BASELINE,
        slow=shape.name == "cpu",
    )


def _repeated(name: str, head: Head, tower: Tower) -> Contender:
    does = f"G padded rows, logits of {'all positions' if head == 'all' else 'completions'}, tower once per {tower}"
    return Contender(
        name, functools.partial(_rows, head, tower), does=does, work=functools.partial(_rows_work, head, tower)
    )


def _shared(inputs: StepInputs) -> Step:
    return lambda: _pass(inputs, functools.partial(tgrpo_loss, inputs.model))


def _rows(head: Head, tower: Tower, inputs: StepInputs) -> Step:
    rows = RepeatedRows(inputs.model, head=head, tower=tower)
    return lambda: _pass(inputs, rows.loss)


def _pass(inputs: StepInputs, loss_of: Callable[..., GrpoLoss]) -> Mapping[str, Tensor]:
    """Forward and backward. Gradients are added to those that are there, as they are between optimizer steps; these
    start from 0."""
    log_probs = {"num_tokens": len(inputs.ref_logp), "ref_logp": inputs.ref_logp}
    result = loss_of(inputs.packed, inputs.advantages, inputs.config, **log_probs)
    parameters = dict(inputs.model.hf.named_parameters())
    torch._foreach_zero_([p.grad for p in parameters.values()])  # type: ignore[arg-type]
    result.loss.backward()
    return {"loss": result.loss.detach(), "logp": result.logp.detach(), **_sampled(inputs, parameters)}


def _sampled(inputs: StepInputs, parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """Some entries of every parameter's gradient, by family; of an embedding, the rows of tokens that occur."""
    parts: dict[str, list[Tensor]] = {}
    rows = inputs.packed.ids.unique()[:64]
    for name, parameter in parameters.items():
        family = next(family for family, word in FAMILIES.items() if word in name)
        gradient = parameter.grad[rows] if family == "d_embedding" else parameter.grad
        flat = gradient.flatten()
        parts.setdefault(family, []).append(flat[:: max(1, len(flat) // SAMPLE)].float())
    return {family: torch.cat(values) for family, values in parts.items()}


def _expected(dtype: torch.dtype, outputs: Mapping[str, Tensor]) -> Sequence[Expected]:
    """The baseline's results."""
    value, gradient = BOUNDS[dtype]
    return [
        Expected(
            name,
            name,
            output.double(),
            gradient=name.startswith("d_"),
            bound=gradient if name.startswith("d_") else value,
        )
        for name, output in outputs.items()
    ]


def _shared_work(inputs: StepInputs) -> Work:
    layout, config = inputs.packed.layout, inputs.model.hf.config
    group = inputs.group
    flops = step_flops.forward(
        config,
        tokens=layout.total_tokens,
        head_positions=len(inputs.packed.labels),
        grids=[group.grid],
        pairs=step_flops.shared_pairs(group.prompt, layout.completion_lengths[0]),
    )
    return _work(flops, inputs, layout.total_tokens)


def _rows_work(head: Head, tower: Tower, inputs: StepInputs) -> Work:
    group, config = inputs.group, inputs.model.hf.config
    length = group.prompt + group.completion
    tokens = group.generations * length
    flops = step_flops.forward(
        config,
        tokens=tokens,
        pairs=group.generations * step_flops.causal_pairs(length),
        head_positions=tokens if head == "all" else len(inputs.packed.labels),
        grids=[group.grid] * (group.generations if tower == "row" else 1),
    )
    return _work(flops, inputs, tokens)


def _work(flops: step_flops.Flops, inputs: StepInputs, tokens: int) -> Work:
    return Work(flops.training(checkpointing=inputs.checkpointing), 0.0, "", tokens)


def test_step(run_case):
    run_case()
