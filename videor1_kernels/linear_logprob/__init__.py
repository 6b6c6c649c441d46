"""Log-probability and entropy of given tokens, from hidden states without whole logits, or from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import check_number, check_tensor, compute_dtype, fail
from videor1_kernels.linear_logprob import reference, reference_selective
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of its distribution under a linear head, without storing the logits.

    z = (hidden @ weight^T + bias) / temperature, p = softmax(z) over the vocabulary;
    logp = log p[label], entropy = -sum_v p_v log p_v, both in nats.

    Under autocast hidden, weight and bias are taken in autocast's dtype, as ``F.linear`` takes them, but for fp64.
    Their gradients keep their own dtypes: that of an fp32 weight is never rounded to 16 bits.

    Args:
        hidden: [..., H], fp64, fp32, bf16 or fp16.
        weight: [V, H], fp64, fp32, bf16 or fp16 (it need not be the dtype of ``hidden``).
        labels: int64 [...] in [0, V), or -100: ignored, both outputs exactly 0 and no gradient.
        bias: [V], fp64, fp32, bf16 or fp16; or None. An entry of -inf bans that token.
        temperature: a number, or one per row as a tensor [...] of a float dtype; above 0; no gradient flows into it.
        backend: ``auto``, ``triton``, ``reference``.

    Returns:
        (logp, entropy), each [...], in nats: fp32, or fp64 where an input is fp64. The softmax runs on the accumulator
        of the product, never on logits rounded to 16 bits. Both are differentiable into ``hidden``, ``weight`` and
        ``bias``. Rows whose incoming gradients are exactly 0 cost nothing in the backward pass; ``weight`` costs
        nothing there when it needs no gradient.

    Raises:
        ValueError: a wrong shape, dtype, device, label or temperature, or a backend that cannot run here.
        TypeError: an argument that is no tensor.

    Source:
        This library; the running softmax is that of arXiv 1805.02867, logits that are never stored those of
        arXiv 2411.09009.
    """
    op = "linear_logprob"
    check_head(op, hidden, weight, labels, bias)
    temperatures, scalar = split_temperature(op, temperature, hidden, weight, bias)
    rows = hidden.reshape(-1, hidden.shape[-1])
    operands = autocast_dtype(hidden, weight, bias)
    logp, entropy, _ = linear_logprob_op(
        rows, weight, labels.reshape(-1), bias, temperatures, scalar, operands, backend
    )
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
    check_tensor(op, "hidden", hidden)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise fail(op, "hidden", "shape [..., H] with H of 1 or more", list(hidden.shape))
    check_tensor(op, "weight", weight, ("V", hidden.shape[-1]), device=hidden.device)
    if weight.shape[0] < 1:
        raise fail(op, "weight", "V of 1 or more", list(weight.shape))
    check_tensor(op, "labels", labels, hidden.shape[:-1], (torch.int64,), hidden.device)
    if bias is not None:
        check_tensor(op, "bias", bias, (weight.shape[0],), device=hidden.device)


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
