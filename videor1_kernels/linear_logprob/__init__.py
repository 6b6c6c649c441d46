"""Log-probability and entropy of given tokens, from hidden states without whole logits, or from logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import check_number, check_tensor, compute_dtype, fail
from videor1_kernels.linear_logprob import reference, reference_selective, sharded
from videor1_kernels.linear_logprob.inputs import autocast_dtype
from videor1_kernels.linear_logprob.ops import linear_logprob_op, selective_op

__all__ = ["linear_logprob", "selective_log_softmax"]

for _op, _reference in (("linear_logprob", reference), ("selective_log_softmax", reference_selective)):
    dispatch.register_triton(_op, "videor1_kernels.linear_logprob.triton")
    dispatch.register(_op, "reference", _reference)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_shard: tuple[int, Any] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of its distribution under a linear head, without storing the logits.

    z = (hidden @ weight^T + bias) / temperature, p = softmax(z) over the vocabulary;
    logp = log p[label], entropy = -sum_v p_v log p_v, both in nats. With softcap c, z = c tanh((hidden @ weight^T +
    bias) / c) / temperature.

    Under autocast hidden, weight and bias are taken in autocast's dtype, as ``F.linear`` takes them, but for fp64.
    Their gradients keep their own dtypes: that of an fp32 weight is never rounded to 16 bits.

    Args:
        hidden: [..., H], fp64, fp32, bf16 or fp16.
        weight: [V, H], fp64, fp32, bf16 or fp16 (it need not be the dtype of ``hidden``).
        labels: int64 [...] in [0, V), or -100: ignored, both outputs exactly 0 and no gradient.
        bias: [V], fp64, fp32, bf16 or fp16; or None. An entry of -inf bans that token.
        temperature: a number, or one per row as a tensor [...] of a float dtype; above 0; no gradient flows into it.
        softcap: c of the soft cap on the logits, as Gemma's heads have it, above 0; None: none.
        vocab_shard: (start, group) where the head is divided among the ranks of a torch.distributed group: ``weight``
            and ``bias`` are this rank's, [V / n, H] and [V / n], of the tokens from ``start`` on. hidden, labels (of
            the whole vocabulary) and the incoming gradients have to be the same on all ranks. The results are too, and
            so is the gradient of hidden, which is summed here; those of weight and bias are this rank's. Two
            all-reduces of [N] and [4, N] fp64 numbers, and one of [N, H] for the gradient of hidden.
        backend: ``auto``, ``triton``, ``reference``.

    Returns:
        (logp, entropy), each [...], in nats: fp32, or fp64 where an input is fp64. The softmax runs on the accumulator
        of the product, never on logits rounded to 16 bits. Both are differentiable into ``hidden``, ``weight`` and
        ``bias``. Rows whose incoming gradients are exactly 0 cost nothing in the backward pass; ``weight`` costs
        nothing there when it needs no gradient.

    Raises:
        ValueError: a wrong shape, dtype, device, label, temperature, cap or shard, a DTensor, or a backend that cannot
            run here.
        TypeError: an argument that is no tensor.

    Source:
        This library; the running softmax is that of arXiv 1805.02867, logits that are never stored those of
        arXiv 2411.09009, the division of the vocabulary that of arXiv 1909.08053, the soft cap that of
        arXiv 2408.00118.
    """
    op = "linear_logprob"
    check_head(op, hidden, weight, labels, bias)
    temperatures, scalar = split_temperature(op, temperature, hidden, weight, bias)
    rows, flat, cap = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), check_softcap(op, softcap)
    operands = autocast_dtype(hidden, weight, bias)
    if vocab_shard is not None:
        shard = sharded.check_shard(op, vocab_shard)
        logp, entropy = sharded.linear_logprob(
            sharded.ShardedHead(rows, weight, bias, flat, temperatures, scalar, operands, cap, shard, backend)
        )
    else:
        logp, entropy, _ = linear_logprob_op(rows, weight, flat, bias, temperatures, scalar, operands, cap, backend)
    return logp.reshape(labels.shape), entropy.reshape(labels.shape)


def selective_log_softmax(
    logits: Tensor, index: Tensor, *, temperature: float | Tensor = 1.0, backend: str = "auto"
) -> Tensor:
    """Log-probabilities of chosen entries: log softmax(logits / temperature)[index], in nats.

    Args:
        logits: [..., V], fp64, fp32, bf16 or fp16.
        index: int64 [...] (one entry per row) or [..., K] (K entries per row), in [0, V).
        temperature: a number, or one per row as a tensor [...] of a float dtype; above 0; no gradient flows into it.
        backend: ``auto``, ``triton``, ``reference``.

    Returns:
        Log-probabilities in nats, shaped as ``index``, [...] or [..., K]; fp32, or fp64 for fp64 logits. Differentiable
        into ``logits``.

    Raises:
        ValueError: a wrong shape, dtype, device, index or temperature, or a backend that cannot run here.
        TypeError: an argument that is no tensor.

    Source:
        This library, under the name that TRL has for it (https://github.com/huggingface/trl).
    """
    op = "selective_log_softmax"
    check_tensor(op, "logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise fail(op, "logits", "shape [..., V] with V of 1 or more", list(logits.shape))
    check_tensor(op, "index", index, dtypes=(torch.int64,), device=logits.device)
    rows, single = logits.shape[:-1], index.dim() == logits.dim() - 1
    if (index.shape if single else index.shape[:-1]) != rows:
        raise fail(op, "index", f"shape {list(rows)} or {[*rows, 'K']}".replace("'", ""), list(index.shape))
    temperatures, scalar = split_temperature(op, temperature, logits)
    entries = 1 if single else index.shape[-1]
    logp, _ = selective_op(_in_place(logits), index.reshape(rows.numel(), entries), temperatures, scalar, backend)
    return logp.reshape(index.shape)


def _in_place(logits: Tensor) -> Tensor:
    """Logits as [B, T, V], copied only where more than two strides lead to a row: a slice [:, :-1] needs two."""
    if logits.dim() == 3:
        return logits
    return logits.reshape(1, -1, logits.shape[-1])


def check_head(op: str, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    """The checks of all operations that start at the linear head."""
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if type(value).__name__ == "DTensor":
            how = f"{name}.to_local()"
            if name != "hidden":
                how += " and vocab_shard=(its first row, device_mesh.get_group()), if it is sharded by the vocabulary"
            raise fail(op, name, f"a plain tensor: {how}", "a DTensor")
    check_tensor(op, "hidden", hidden)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise fail(op, "hidden", "shape [..., H] with H of 1 or more", list(hidden.shape))
    check_tensor(op, "weight", weight, ("V", hidden.shape[-1]), device=hidden.device)
    if weight.shape[0] < 1:
        raise fail(op, "weight", "V of 1 or more", list(weight.shape))
    check_tensor(op, "labels", labels, hidden.shape[:-1], (torch.int64,), hidden.device)
    if bias is not None:
        check_tensor(op, "bias", bias, (weight.shape[0],), device=hidden.device)


def check_softcap(op: str, softcap: float | None) -> float:
    """Check ``softcap``, and return it, 0 for none."""
    if softcap is None:
        return 0.0
    check_number(op, "softcap", softcap, above=0)
    return float(softcap)


def split_temperature(
    op: str, temperature: float | Tensor, values: Tensor, *others: Tensor | None
) -> tuple[Tensor | None, float]:
    """Check ``temperature``, and return (a tensor with one for each row of ``values``, 1.0) or (None, the number)."""
    if not isinstance(temperature, Tensor):
        check_number(op, "temperature", temperature, above=0)
        return None, float(temperature)
    if temperature.dim() == 0:
        temperature = temperature.expand(values.shape[:-1])
    check_tensor(op, "temperature", temperature, values.shape[:-1], device=values.device)
    if temperature.requires_grad:
        raise fail(op, "temperature", "a tensor without gradient (detach it)", "one that requires a gradient")
    return temperature.to(compute_dtype(values, *others)).reshape(-1), 1.0
