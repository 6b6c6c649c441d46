"""The last part of a decode step of a rollout: one token per row from logits, and its log-probability."""

from __future__ import annotations

import torch
from torch import Tensor

from videor1_kernels import dispatch
from videor1_kernels.checks import capturing, check_indices, check_number, check_tensor, compute_dtype, fail
from videor1_kernels.sampling import native, reference
from videor1_kernels.sampling.reference import SampleTokensOptions

__all__ = ["sample_tokens"]

dispatch.register_triton("sample_tokens", "videor1_kernels.sampling.triton")
dispatch.register("sample_tokens", "native", native, unavailable=native.unavailable)
dispatch.register("sample_tokens", "reference", reference)


def sample_tokens(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    banned: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw a token from each row by inverting its cumulative distribution, and return its log-probability.

    With z the logits and t the temperature, the probabilities are softmax(z / t) over the tokens that are not banned.
    ``top_k`` keeps the k likeliest; ``top_p`` then keeps the shortest list of likeliest tokens whose probabilities,
    renormalised, sum to at least top_p (up to rounding: of ten equal tokens 0.1 keeps one). The likeliest token always
    stays, and the lower id goes first among equals. The token drawn is the first, in order of id, at which the
    cumulative probability of the kept tokens exceeds ``uniform``. Temperature 0 takes the likeliest.

    Its log-probability is that of the whole distribution, with neither truncation nor ban: log_softmax(z / t), at
    temperature 0 log_softmax(z). This is what a policy gradient compares with.

    A row's result is bit for bit the same whatever the rows beside it. A row in which NaN or +inf stands gets a token
    that may be drawn and a log-probability of NaN; NaN then counts as the least logit, +inf as the greatest finite one.

    Args:
        logits: [R, V], fp64, fp32, bf16 or fp16.
        uniform: [R], in [0, 1), fp32 or fp64. Not checked: a number outside is taken for the nearest end.
        temperature: 0 or more.
        top_p: above 0, at most 1; 1 is off.
        top_k: 0 or more; 0 is off.
        banned: int64 [K], ids that are never drawn; at least one id of the vocabulary must not be among them.
        backend: ``auto``, ``triton``, ``native`` (on a CPU; C++ compiled at its first use), ``reference``.

    Returns:
        (tokens, logp): int64 [R], and [R] in nats: fp32, or fp64 where the logits are. Neither has a gradient.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value. The ids in ``banned`` are read for
            that, which waits for the device; inside a CUDA graph they go unchecked.

    Source:
        This library; top-p is that of arXiv 1904.09751, top-k that of arXiv 1805.04833.
    """
    op = "sample_tokens"
    check_tensor(op, "logits", logits, ("R", "V"))
    rows, vocabulary = logits.shape
    if not vocabulary:
        raise fail(op, "logits", "at least one token", list(logits.shape))
    check_tensor(op, "uniform", uniform, (rows,), (torch.float32, torch.float64), logits.device)
    check_number(op, "temperature", temperature, at_least=0)
    check_number(op, "top_p", top_p, above=0)
    if top_p > 1:
        raise fail(op, "top_p", "a number of at most 1", top_p)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
        raise fail(op, "top_k", "an int of 0 or more", repr(top_k))
    if banned is not None:
        check_tensor(op, "banned", banned, ("K",), (torch.int64,), logits.device)
        banned = _checked(op, banned, vocabulary) if len(banned) else None
    if temperature:  # beyond these bounds nothing changes but that fp32 no longer holds it
        temperature = min(max(temperature, 1e-30), 1e30)
    options = SampleTokensOptions(float(temperature), float(top_p), top_k if top_k < vocabulary else 0)
    run = dispatch.resolve(op, backend, logits.device, compute_dtype(logits))
    with torch.no_grad(), dispatch.running_on(logits):
        return run.sample_tokens(logits, uniform, banned, options)


def _checked(op: str, banned: Tensor, vocabulary: int) -> Tensor:
    check_indices(op, "banned", banned, vocabulary)
    if len(banned) >= vocabulary and not capturing(banned) and len(banned.unique()) == vocabulary:
        raise fail(op, "banned", "at least one token that is not banned", f"all {vocabulary}")
    return banned
