"""A linear head whose vocabulary is divided among ranks: each computes with its rows of the weight alone.

Of each row of hidden states a rank has the log-sum-exp and the mean logit of its part, and the label's logit if that is
in it. One all-reduce finds the largest log-sum-exp, another sums what the parts add to the whole. In the backward pass
a rank knows its part of the probabilities from the whole log-sum-exp, and what the parts give to ``hidden`` is summed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from videor1_kernels import dispatch
from videor1_kernels.checks import IGNORED, check_temperature, compute_dtype, fail
from videor1_kernels.linear_logprob.inputs import HeadInputs, head_inputs

OP = "linear_logprob"
ELSEWHERE = -1  # a label of another rank


class Shard(NamedTuple):
    """A rank's part of the vocabulary."""

    start: int  # its first token
    group: Any  # torch.distributed.ProcessGroup, of the ranks that hold the parts


class ShardedHead(NamedTuple):
    """The arguments of the head's operator, with global labels, and where the weight's rows stand."""

    hidden: Tensor  # [N, H], the same on every rank
    weight: Tensor  # [V / n, H]
    bias: Tensor | None  # [V / n]
    labels: Tensor  # int64 [N], of the whole vocabulary
    temperatures: Tensor | None
    temperature: float
    operands: torch.dtype | None
    softcap: float
    shard: Shard
    backend: str

    def inputs(self) -> HeadInputs:
        """Those of the rank's part; labels of others are ELSEWHERE. d_hidden is fp32, as it is still to be summed."""
        local = self.labels - self.shard.start
        here = (local >= 0) & (local < len(self.weight))
        local = torch.where(self.labels == IGNORED, IGNORED, torch.where(here, local, ELSEWHERE))
        options = self.temperatures, self.temperature, self.operands, self.softcap
        made = head_inputs(self.hidden, self.weight, local, self.bias, *options)
        return made._replace(given=(compute_dtype(self.hidden, self.weight, self.bias), *made.given[1:]))

    def run(self) -> Any:
        dtype = compute_dtype(self.hidden, self.weight, self.bias)
        return dispatch.resolve(OP, self.backend, self.hidden.device, dtype)


def check_shard(op: str, vocab_shard: Any) -> Shard:
    """Check the argument ``vocab_shard``."""
    expected = (
        "(the first token of this rank's rows of weight, the torch.distributed group of the ranks that hold them)"
    )
    pair = isinstance(vocab_shard, tuple) and len(vocab_shard) == 2
    if not pair or type(vocab_shard[0]) is not int or not isinstance(vocab_shard[1], dist.ProcessGroup):
        raise fail(op, "vocab_shard", expected, vocab_shard)
    if vocab_shard[0] < 0:
        raise fail(op, "vocab_shard", "a first token of 0 or more", vocab_shard[0])
    return Shard(*vocab_shard)


def linear_logprob(head: ShardedHead) -> tuple[Tensor, Tensor]:
    """Return (logp, entropy), each [N], the same on every rank."""
    if torch.compiler.is_compiling():
        raise fail(
            OP, "vocab_shard", "a call that is not compiled (wrap it in torch.compiler.disable)", "torch.compile"
        )
    check_temperature(OP, head.temperatures)
    logp, entropy = _Function.apply(*head)
    return logp, entropy


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        head = ShardedHead(*arguments)
        inputs, dtype = head.inputs(), compute_dtype(head.hidden, head.weight, head.bias)
        with dispatch.running_on(head.hidden):
            # A row whose label is another rank's gets any label here, whose log-prob is not looked at.
            found = head.run().forward(inputs._replace(labels=inputs.labels.where(inputs.labels != ELSEWHERE, 0)))
        part, part_entropy, part_lse = (x.double() for x in found)
        mine, kept = (inputs.labels >= 0).double(), head.labels != IGNORED
        mean, label = part_lse - part_entropy, (part + part_lse) * mine
        if head.bias is not None:  # a part that is banned as a whole, as padding may be
            banned = (head.bias == -torch.inf).all()
            part_lse, mean = part_lse.masked_fill(banned, -torch.inf), mean.masked_fill(banned, 0.0)
            label = label.masked_fill(banned & (mine > 0), -torch.inf)
        top = part_lse.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, head.shard.group)
        share = (part_lse - top).exp()
        sums = torch.stack([share, share * mean, label, mine])
        dist.all_reduce(sums, dist.ReduceOp.SUM, head.shard.group)
        total, weighted, label, ranks = sums
        _check_labels(head, ranks[kept])
        lse = (top + total.log()).masked_fill(~kept, 0.0)
        logp = (label - lse).masked_fill(~kept, 0.0).to(dtype)
        entropy = (lse - weighted / total).masked_fill(~kept, 0.0).to(dtype)
        ctx.save_for_backward(*arguments[:5], entropy, lse, found[2])
        ctx.options = arguments[5:]
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, entropy, lse, part_lse = ctx.saved_tensors
        head = ShardedHead(*tensors, *ctx.options)
        needs = ctx.needs_input_grad[:3]
        gradients: Any = (None, None, None)
        if grad_logp is not None or grad_entropy is not None:
            with dispatch.running_on(head.hidden):
                grads = grad_logp, grad_entropy
                gradients = head.run().backward(head.inputs(), grads, entropy, lse, needs, part_lse=part_lse)
        d_hidden, d_weight, d_bias = gradients
        if d_hidden is not None:
            dist.all_reduce(d_hidden, dist.ReduceOp.SUM, head.shard.group)
            d_hidden = d_hidden.to(head.hidden.dtype)
        return d_hidden, d_weight, d_bias, *[None] * 7


def _check_labels(head: ShardedHead, ranks: Tensor) -> None:
    """Check that each label is in exactly one rank's part; all ranks find the same."""
    if bool((ranks != 1).any()):
        own = f"this rank holds {head.shard.start} to {head.shard.start + len(head.weight) - 1}"
        kept = head.labels[head.labels != IGNORED]
        raise fail(OP, "labels", f"each in the part of exactly one rank ({own})", kept[ranks != 1][:4].tolist())
