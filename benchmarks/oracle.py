"""The correctness gate: results compared with fp64 on a sample of rows, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import TEMPERATURE, HeadInputs, LogitInputs

SAMPLED_ROWS = 256
SAMPLED_COLUMNS = 64
BLOCK_ROWS = 512
CLIP = 0.2

# Largest error allowed, by dtype: rms of log-probabilities, entropies (nats) and losses; norm of the difference over
# norm of the fp64 gradient. Others may round their logits to 16 bits before the softmax (at these inputs an rms
# log-prob error near 7e-3); ours may not.
OURS = {torch.bfloat16: (2e-4, 1e-2), torch.float32: (1e-4, 1e-4)}
OTHERS = {torch.bfloat16: (5e-2, 5e-2), torch.float32: (1e-3, 1e-3)}


class GateFailure(AssertionError):
    """A result is wrong, or came from another backend than the one measured: nothing is timed."""


@dataclass(frozen=True)
class Expected:
    """What fp64 gives for a part of one output."""

    name: str
    output: str
    value: Tensor | Callable[[Mapping[str, Tensor]], Tensor]  # the latter: of what was drawn, from all outputs
    index: Tensor | None = None  # rows of the output that ``value`` holds; None: all of it
    gradient: bool = False  # compared relative to its norm
    ours_only: bool = False  # others may leave it out, or approximate it on purpose
    bound: float | None = None  # instead of the table's


def check(
    outputs: Mapping[str, Tensor], expected: Sequence[Expected], dtype: torch.dtype, *, ours: bool
) -> dict[str, float]:
    """Errors by name. Raises GateFailure for an error above its bound, a NaN, or a missing output."""
    errors = {}
    for entry in expected:
        output = outputs.get(entry.output)
        if output is None:
            if ours or not entry.ours_only:
                raise GateFailure(f"{entry.output}: expected among the outputs, got {', '.join(outputs)}")
            continue
        if output.dim() > 2:
            output = output.flatten(0, -2)
        if not bool(output.isfinite().all()):
            raise GateFailure(f"{entry.output}: {int((~output.isfinite()).sum())} values are NaN or infinite")
        part = output.detach() if entry.index is None else output.detach()[entry.index]
        value = entry.value(outputs) if callable(entry.value) else entry.value
        if part.shape != value.shape:
            raise GateFailure(f"{entry.name}: expected shape {list(value.shape)}, got {list(part.shape)}")
        difference = (part.double() - value).norm().item()
        scale = value.norm().item() if entry.gradient else max(value.numel(), 1) ** 0.5
        errors[entry.name] = difference / scale
        bound = entry.bound if entry.bound is not None else (OURS if ours else OTHERS)[dtype][int(entry.gradient)]
        if (ours or not entry.ours_only) and not errors[entry.name] <= bound:
            kind = "relative" if entry.gradient else "rms"
            raise GateFailure(f"{entry.name}: {kind} error {errors[entry.name]:.2e} against fp64, bound {bound:.0e}")
    return errors


def logprob(inputs: HeadInputs) -> list[Expected]:
    """What linear_logprob must give forward."""
    rows = sample(inputs.size.tokens, SAMPLED_ROWS, inputs.labels.device)
    logp, entropy, _ = statistics(inputs, rows)
    return [Expected("logp", "logp", logp, rows), Expected("entropy", "entropy", entropy, rows, ours_only=True)]


def logprob_gradients(inputs: HeadInputs) -> list[Expected]:
    """What linear_logprob must give forward, and backward from the sum of logp * old_logp."""
    logp, _, lse = statistics(inputs)
    rows = sample(inputs.size.tokens, SAMPLED_ROWS, inputs.labels.device)
    return [Expected("logp", "logp", logp), *gradients(inputs, rows, lse, inputs.old_logp.double())]


def grpo(inputs: HeadInputs) -> list[Expected]:
    """What linear_grpo_loss must give forward and backward."""
    logp, _, lse = statistics(inputs)
    loss, coefficient = differentiate(lambda x: grpo_of(x, inputs), logp)
    rows = sample(inputs.size.tokens, SAMPLED_ROWS, inputs.labels.device)
    return [
        Expected("loss", "loss", loss),
        Expected("logp", "logp", logp, ours_only=True),
        *gradients(inputs, rows, lse, coefficient),
    ]


def grpo_from_logp(inputs: HeadInputs) -> list[Expected]:
    """What grpo_loss of :func:`policy_logp` must give forward and backward."""
    loss, coefficient = differentiate(lambda x: grpo_of(x, inputs), policy_logp(inputs).detach().double())
    return [Expected("loss", "loss", loss), Expected("d_logp", "d_logp", coefficient, gradient=True)]


def selected(inputs: LogitInputs) -> list[Expected]:
    """What selective_log_softmax must give forward."""
    rows = sample(len(inputs.logits), SAMPLED_ROWS, inputs.logits.device)
    return [Expected("logp", "logp", _label_logp(inputs, rows)[0], rows)]


def selected_gradients(inputs: LogitInputs) -> list[Expected]:
    """What selective_log_softmax must give forward, and backward from the sum of logp * old_logp."""
    rows = sample(len(inputs.logits), SAMPLED_ROWS, inputs.logits.device)
    logp, probs = _label_logp(inputs, rows)
    slope = _d_scores(probs, inputs.head.labels[rows], inputs.head.old_logp[rows].double())
    return [Expected("logp", "logp", logp, rows), Expected("d_logits", "d_logits", slope, rows, gradient=True)]


def grpo_from_logits(inputs: LogitInputs) -> list[Expected]:
    """What the loss of whole logits must give forward and backward."""
    everything = torch.arange(len(inputs.logits), device=inputs.logits.device)
    logp = torch.cat([_label_logp(inputs, rows)[0] for rows in everything.split(BLOCK_ROWS)])
    loss, coefficient = differentiate(lambda x: grpo_of(x, inputs.head), logp)
    rows = sample(len(inputs.logits), SAMPLED_ROWS, inputs.logits.device)
    slope = _d_scores(_label_logp(inputs, rows)[1], inputs.head.labels[rows], coefficient[rows])
    return [Expected("loss", "loss", loss), Expected("d_logits", "d_logits", slope, rows, gradient=True)]


def grpo_of(logp: Tensor, inputs: HeadInputs) -> Tensor:
    """The loss of log-probabilities [N], token level, by its formula: mean over completions of token means."""
    advantage = inputs.advantages.to(logp.dtype)[:, None]
    rows = logp.view(inputs.rows)
    ratio = (rows - inputs.old_logp.to(logp.dtype).view(inputs.rows)).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    if inputs.ref_logp is not None:
        gap = inputs.ref_logp.to(logp.dtype).view(inputs.rows) - rows
        loss = loss + inputs.beta * (gap.exp() - gap - 1)
    return loss.mean(1).mean()


def loss_options(inputs: HeadInputs) -> dict[str, Any]:
    """The options of our losses for :func:`grpo_of`."""
    log_probs = {"old_logp": inputs.old_logp, "ref_logp": inputs.ref_logp}
    return log_probs | {"loss_type": "grpo", "beta": inputs.beta, "clip_low": CLIP, "clip_high": CLIP}


def policy_logp(inputs: HeadInputs) -> Tensor:
    """Log-probabilities for the loss alone: the old policy's, plus -0.3, 0 and 0.3 nats by turns."""
    turns = torch.arange(len(inputs.old_logp), device=inputs.old_logp.device) % 3
    return (inputs.old_logp + 0.3 * (turns - 1)).requires_grad_()


@torch.no_grad()
def statistics(inputs: HeadInputs, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 log-probability, entropy and log-sum-exp of the rows; all of them by default."""
    if rows is None:
        rows = torch.arange(inputs.size.tokens, device=inputs.labels.device)
    weight = inputs.weight.double()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for block in rows.split(BLOCK_ROWS):
        logits = inputs.hidden[block].double() @ weight.T / TEMPERATURE
        lse = logits.logsumexp(-1)
        picked = logits.gather(1, inputs.labels[block, None])[:, 0]
        scores = logits.sub_(lse[:, None])
        parts.append((picked - lse, -(scores.exp() * scores).sum(-1), lse))
    logp, entropy, lse = (torch.cat(column) for column in zip(*parts, strict=True))
    return logp, entropy, lse


@torch.no_grad()
def gradients(inputs: HeadInputs, rows: Tensor, lse: Tensor, coefficient: Tensor) -> list[Expected]:
    """d_hidden of sampled rows and d_weight of sampled vocabulary entries, from d loss / d logp [N]."""
    hidden, weight, labels = inputs.hidden.double(), inputs.weight.double(), inputs.labels
    probs = (hidden[rows] @ weight.T / TEMPERATURE - lse[rows, None]).exp()
    d_hidden = _d_scores(probs, labels[rows], coefficient[rows]) @ weight / TEMPERATURE
    chosen = labels[sample(len(labels), SAMPLED_COLUMNS // 2, labels.device)].unique()
    others = sample(inputs.size.vocab, SAMPLED_COLUMNS // 2, labels.device)
    columns = torch.cat([chosen, others])
    d_scores = (hidden @ weight[columns].T / TEMPERATURE - lse[:, None]).exp_().mul_(-coefficient[:, None])
    d_scores += coefficient[:, None] * (labels[:, None] == columns)
    d_weight = d_scores.T @ hidden / TEMPERATURE
    return [
        Expected("d_hidden", "d_hidden", d_hidden, rows, gradient=True),
        Expected("d_weight", "d_weight", d_weight, columns, gradient=True),
        # Entries that are rarely labels have gradients that vanish in the norm over all: ours must have them right too.
        Expected("d_weight_rare", "d_weight", d_weight[len(chosen) :], others, gradient=True, ours_only=True),
    ]


def differentiate(loss_of: Callable[[Tensor], Tensor], logp: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logp.detach().requires_grad_()
    loss = loss_of(leaf)
    (slope,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), slope


def sample(size: int, count: int, device: torch.device) -> Tensor:
    """``count`` of ``size`` indices at random, the first and the last among them."""
    inner = torch.randperm(size, generator=torch.Generator().manual_seed(1))[: max(count - 2, 0)]
    return torch.cat([torch.tensor([0, size - 1]), inner]).unique().to(device)


@torch.no_grad()
def _label_logp(inputs: LogitInputs, rows: Tensor) -> tuple[Tensor, Tensor]:
    scores = (inputs.logits[rows].double() / TEMPERATURE).log_softmax(-1)
    return scores.gather(1, inputs.head.labels[rows, None])[:, 0], scores.exp()


def _d_scores(probs: Tensor, labels: Tensor, coefficient: Tensor) -> Tensor:
    slope = probs * -coefficient[:, None]
    return slope.scatter_add(1, labels[:, None], coefficient[:, None]) / TEMPERATURE
