"""The implementations measured beside ours, each set to compute the same numbers. Imports happen when one is built. The
steps around the calls, which serve ours too, have public names.

Token gradients are taken with ``torch.autograd.grad`` into the hidden states and the head's weight (or the logits).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import Contender, Step
from benchmarks.oracle import CLIP, grpo_of, policy_logp
from benchmarks.shapes import TEMPERATURE, HeadInputs, LogitInputs

LossOf = Callable[[Tensor, HeadInputs], Tensor]  # of log-probs
TORCH_CHUNK = 2048  # rows of logits that plain torch holds at once in its chunked form
VERL = "not part of the bench extra: verl brings Ray and a training stack of its own"


def missing(distribution: str, module: str, *, gpu: bool = False) -> Callable[[torch.device], str | None]:
    """The reason that ``module`` cannot run here."""

    def reason(device: torch.device) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{distribution} is not installed"
        return "its kernels need a GPU" if gpu and device.type != "cuda" else None

    return reason


def left_out(name: str, reason: str) -> Contender:
    """One that is not measured here; the table names it with the reason."""

    def build(inputs: Any) -> Step:
        raise AssertionError(f"{name} is left out: {reason}")

    return Contender(name, build, lambda device: reason)


LIGER = missing("liger-kernel", "liger_kernel")
LIGER_GPU = missing("liger-kernel", "liger_kernel", gpu=True)
TRL = missing("trl", "trl")
CUT = missing("cut-cross-entropy", "cut_cross_entropy", gpu=True)


def logprob_peers(*, backward: bool) -> tuple[Contender, ...]:
    """The others beside linear_logprob. TRL's function and plain torch give the entropy too."""
    form = functools.partial(logprob_step, backward=backward)
    work = ("6NHV", "8NHV") if backward else ("", "")
    return (
        Contender("torch, whole logits", lambda x: form(x, _torch_logp_entropy(x)), does=work[0]),
        Contender("torch, chunks of 2048 rows", lambda x: form(x, _chunked(x, entropy=True)), does=work[1]),
        Contender("torch.compile, whole logits", lambda x: form(x, torch.compile(_torch_logp_entropy(x)))),
        Contender("TRL ChunkedLogProbFunction", lambda x: form(x, _trl_chunked(x)), TRL, does=work[1]),
        Contender("cut-cross-entropy", lambda x: form(x, _cut(x)), CUT, does=work[1] and f"{work[1]}, less filtered"),
        left_out("verl linear_cross_entropy", VERL),
    )


def grpo_peers(*, compiled: bool) -> tuple[Contender, ...]:
    """The others beside linear_grpo_loss. The loss behind each log-prob is the formula, in plain torch."""
    compile_ = Contender("torch.compile, whole logits", _compiled_loss_step, does="6NHV")
    return (
        Contender("torch, whole logits", lambda x: _loss_step(x, _torch_logp(x)), does="6NHV"),
        Contender("torch, chunks of 2048 rows", lambda x: _loss_step(x, _chunked(x, entropy=False)), does="8NHV"),
        *((compile_,) if compiled else ()),
        Contender("Liger LigerFusedLinearGRPOLoss", _liger_fused, LIGER, does="8NHV"),
        Contender("TRL ChunkedLogProbFunction + loss", lambda x: _loss_step(x, _trl_chunked(x)), TRL, does="8NHV"),
        Contender("TRL selective_log_softmax + loss", lambda x: _loss_step(x, _trl_logits(x)), TRL, does="6NHV"),
        Contender("cut-cross-entropy + loss", lambda x: _loss_step(x, _cut(x)), CUT, does="8NHV, less filtered"),
        left_out("verl linear_cross_entropy + loss", VERL),
    )


def selective_peers(*, backward: bool, compiled: bool) -> tuple[Contender, ...]:
    """The others beside selective_log_softmax."""
    form = functools.partial(selective_step, backward=backward)
    compile_ = Contender("torch.compile", lambda x: form(x, torch.compile(_torch_selective)))
    return (
        Contender("torch log_softmax, gather", lambda x: form(x, _torch_selective)),
        *((compile_,) if compiled else ()),
        Contender("TRL selective_log_softmax", lambda x: form(x, _trl_selective()), TRL),
        *(() if backward else (Contender("Liger fused_selective_log_softmax", _liger_selective, LIGER_GPU),)),
    )


def logits_loss_peers(*, compiled: bool) -> tuple[Contender, ...]:
    """The others beside the loss of whole logits."""
    compile_ = Contender("torch.compile", lambda x: logits_loss_step(x, torch.compile(_torch_selective)))
    return (
        Contender("torch log_softmax, gather + loss", lambda x: logits_loss_step(x, _torch_selective)),
        *((compile_,) if compiled else ()),
        Contender("TRL selective_log_softmax + loss", lambda x: logits_loss_step(x, _trl_selective()), TRL),
        Contender("Liger triton_grpo_loss, not in place", _liger_triton, LIGER_GPU),
    )


def loss_peers(*, compiled: bool) -> tuple[Contender, ...]:
    """The others beside grpo_loss."""
    compile_ = Contender("torch.compile", lambda x: logp_loss_step(x, torch.compile(grpo_of)))
    return (Contender("torch", logp_loss_step), *((compile_,) if compiled else ()))


def head_gradients(loss: Tensor, inputs: HeadInputs) -> dict[str, Tensor]:
    d_hidden, d_weight = torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
    return {"d_hidden": d_hidden, "d_weight": d_weight}


def logprob_step(inputs: HeadInputs, call: Callable[[], Mapping[str, Tensor]], *, backward: bool) -> Step:
    def forward() -> Mapping[str, Tensor]:
        with torch.no_grad():
            return call()

    def forward_backward() -> Mapping[str, Tensor]:
        outputs = call()
        loss = (outputs["logp"] * inputs.old_logp).sum()
        return {"logp": outputs["logp"].detach(), **head_gradients(loss, inputs)}

    return forward_backward if backward else forward


def _loss_step(inputs: HeadInputs, call: Callable[[], Mapping[str, Tensor]]) -> Step:
    def step() -> Mapping[str, Tensor]:
        logp = call()["logp"]
        loss = grpo_of(logp, inputs)
        return {"loss": loss.detach(), **head_gradients(loss, inputs)}

    return step


def _compiled_loss_step(inputs: HeadInputs) -> Step:
    logp = _torch_logp(inputs)
    loss_of = torch.compile(lambda: grpo_of(logp()["logp"], inputs))

    def step() -> Mapping[str, Tensor]:
        loss = loss_of()
        return {"loss": loss.detach(), **head_gradients(loss, inputs)}

    return step


def _torch_logp(inputs: HeadInputs) -> Callable[[], dict[str, Tensor]]:
    def call() -> dict[str, Tensor]:
        return {"logp": _label_scores(inputs.hidden, inputs.weight, inputs.labels)}

    return call


def _torch_logp_entropy(inputs: HeadInputs) -> Callable[[], dict[str, Tensor]]:
    def call() -> dict[str, Tensor]:
        logp, entropy = _scores_entropy(inputs.hidden, inputs.weight, inputs.labels)
        return {"logp": logp, "entropy": entropy}

    return call


def _chunked(inputs: HeadInputs, *, entropy: bool) -> Callable[[], dict[str, Tensor]]:
    form = _scores_entropy if entropy else _label_scores

    def call() -> dict[str, Tensor]:
        chunks = zip(inputs.hidden.split(TORCH_CHUNK), inputs.labels.split(TORCH_CHUNK), strict=True)
        parts = [checkpoint(form, hidden, inputs.weight, labels, use_reentrant=False) for hidden, labels in chunks]
        if not entropy:
            return {"logp": torch.cat(parts)}
        return {"logp": torch.cat([part[0] for part in parts]), "entropy": torch.cat([part[1] for part in parts])}

    return call


def _label_scores(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    scores = F.linear(hidden, weight).float().div(TEMPERATURE).log_softmax(-1)
    return scores.gather(1, labels[:, None])[:, 0]


def _scores_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    scores = F.linear(hidden, weight).float().div(TEMPERATURE).log_softmax(-1)
    entropy = -(scores.detach().exp() * scores.detach()).sum(-1)
    return scores.gather(1, labels[:, None])[:, 0], entropy


def _trl_chunked(inputs: HeadInputs) -> Callable[[], dict[str, Tensor]]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as COLUMNS

    def call() -> dict[str, Tensor]:
        logp, entropy, *_ = ChunkedLogProbFunction.apply(
            inputs.hidden, inputs.weight, None, inputs.labels, TEMPERATURE, COLUMNS, None, 1.0, ("entropy",)
        )
        return {"logp": logp, "entropy": entropy}

    return call


def _trl_logits(inputs: HeadInputs) -> Callable[[], dict[str, Tensor]]:
    select = _trl_selective()
    return lambda: {"logp": select(F.linear(inputs.hidden, inputs.weight), inputs.labels, inputs.rows).view(-1)}


def _trl_selective() -> Callable[[Tensor, Tensor, tuple[int, int]], Tensor]:
    from trl.trainer.utils import selective_log_softmax

    def select(logits: Tensor, labels: Tensor, rows: tuple[int, int]) -> Tensor:
        return selective_log_softmax(logits.view(*rows, -1), labels.view(rows), temperature=TEMPERATURE)

    return select


def _cut(inputs: HeadInputs) -> Callable[[], dict[str, Tensor]]:
    from cut_cross_entropy import linear_cross_entropy

    def call() -> dict[str, Tensor]:
        loss = linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, reduction="none")
        return {"logp": -loss.float()}

    return call


def _liger_fused(inputs: HeadInputs) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss_of = LigerFusedLinearGRPOLoss(
        beta=inputs.beta,
        compiled=inputs.hidden.device.type == "cuda",
        use_ref_model=inputs.ref_logp is not None,
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="grpo",
        temperature=TEMPERATURE,
    )
    mask = torch.ones(inputs.rows, dtype=torch.int64, device=inputs.hidden.device)

    def step() -> Mapping[str, Tensor]:
        loss, _ = loss_of(
            inputs.hidden.view(*inputs.rows, -1),
            inputs.weight,
            inputs.labels.view(inputs.rows),
            mask,
            inputs.advantages,
            ref_per_token_logps=None if inputs.ref_logp is None else inputs.ref_logp.view(inputs.rows),
            old_per_token_logps=inputs.old_logp.view(inputs.rows),
        )
        return {"loss": loss.detach(), **head_gradients(loss, inputs)}

    return step


def selective_step(inputs: LogitInputs, select: Callable[..., Tensor], *, backward: bool) -> Step:
    head = inputs.head

    def forward() -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"logp": select(inputs.logits, head.labels, head.rows).view(-1)}

    def forward_backward() -> Mapping[str, Tensor]:
        logp = select(inputs.logits, head.labels, head.rows).view(-1)
        (d_logits,) = torch.autograd.grad(logp, inputs.logits, head.old_logp)
        return {"logp": logp.detach(), "d_logits": d_logits}

    return forward_backward if backward else forward


def logits_loss_step(inputs: LogitInputs, select: Callable[..., Tensor], loss_of: LossOf = grpo_of) -> Step:
    head = inputs.head

    def step() -> Mapping[str, Tensor]:
        loss = loss_of(select(inputs.logits, head.labels, head.rows).view(-1), head)
        (d_logits,) = torch.autograd.grad(loss, inputs.logits)
        return {"loss": loss.detach(), "d_logits": d_logits}

    return step


def _torch_selective(logits: Tensor, labels: Tensor, rows: Any) -> Tensor:
    return logits.float().div(TEMPERATURE).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def _padded(inputs: LogitInputs) -> Tensor:
    """[S, L+1, V]: Liger's kernels on logits expect one position more than there are tokens."""
    logits = inputs.logits.detach().view(*inputs.head.rows, -1)
    return torch.cat([logits, logits[:, -1:]], 1)


def _liger_selective(inputs: LogitInputs) -> Step:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    logits, labels = _padded(inputs), inputs.head.labels.view(inputs.head.rows)
    return lambda: {"logp": fused_selective_log_softmax(logits, labels, TEMPERATURE).view(-1)}


def _liger_triton(inputs: LogitInputs) -> Step:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    head = inputs.head
    assert head.ref_logp is not None
    logits = _padded(inputs).requires_grad_()
    old, ref, labels = (x.view(head.rows).contiguous() for x in (head.old_logp, head.ref_logp, head.labels))
    mask = torch.ones(head.rows, dtype=torch.int64, device=logits.device)

    def step() -> Mapping[str, Tensor]:
        loss, _ = triton_grpo_loss(
            logits,
            old,
            ref,
            labels,
            head.advantages,
            mask,
            temperature=TEMPERATURE,
            beta=head.beta,
            eps_low=CLIP,
            eps_high=CLIP,
            inplace=False,
            loss_type="grpo",
            reduce=True,
        )
        (d_logits,) = torch.autograd.grad(loss, logits)
        return {"loss": loss.detach(), "d_logits": d_logits[:, :-1]}

    return step


def logp_loss_step(inputs: HeadInputs, loss_of: LossOf = grpo_of) -> Step:
    logp = policy_logp(inputs)

    def step() -> Mapping[str, Tensor]:
        loss = loss_of(logp, inputs)
        return {"loss": loss.detach(), "d_logp": torch.autograd.grad(loss, logp)[0]}

    return step
