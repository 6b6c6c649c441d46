"""TRL: its ``selective_log_softmax``, and the head that its trainers take log-probabilities from.

    from videor1_kernels.integrations.trl import use

    use()                       # from here on, in every TRL trainer of the process
    with use(): trainer.train() # or in a block

For TRL 1.16. GRPOTrainer, RLOOTrainer and AsyncGRPOTrainer read log-probabilities and entropy from a "fused LM head"
(``trl.trainer.utils.add_fused_lm_head``); ``use()`` computes it with :func:`videor1_kernels.linear_logprob`. The
trainers that keep their logits call ``selective_log_softmax``. SFT, DPO and KTO ask the head for more (``mean_logits``,
``is_top1``) and get an error: train them outside of the block. TRL 1.12 and older can take the loss of
:mod:`videor1_kernels.integrations.liger` (their ``use_liger_kernel=True``).
"""

from __future__ import annotations

import functools
from contextlib import ExitStack

import torch
from torch import Tensor

import videor1_kernels
from videor1_kernels.checks import check_number, fail
from videor1_kernels.integrations.host import Replacement, replace

__all__ = ["FusedHead", "selective_log_softmax", "use"]

HEAD_OUTPUTS = ("log_probs", "entropy")


def use(*, backend: str = "auto", match_dtype: bool = False) -> ExitStack:
    """Put this library's log-probabilities into TRL, for the rest of the process or for a ``with`` block.

    Args:
        backend: ``auto``, ``triton`` or ``reference``, for the kernels of :class:`FusedHead` and of
            :func:`selective_log_softmax`.
        match_dtype: whether :func:`selective_log_softmax` returns the dtype of its logits, as TRL's own does on a CPU.

    Returns:
        An ``ExitStack``. TRL has its own functions back when it is closed, or when its ``with`` block ends. A trainer
        takes the functions that are in place when it calls them.

    Raises:
        ImportError: TRL is not installed, or its version keeps the names elsewhere or with other parameters.

    Source:
        This library; the names and arguments replaced are TRL's (https://github.com/huggingface/trl).
    """
    ours = functools.partial(selective_log_softmax, backend=backend, match_dtype=match_dtype)
    replacements = [
        Replacement("trl.trainer.utils", "selective_log_softmax", ours),
        Replacement("trl.trainer.utils", "_ChunkedLogProbFunction", FusedHead(backend)),
    ]
    return replace("trl", ["trl"], replacements)


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    *,
    backend: str = "auto",
    match_dtype: bool = False,
) -> Tensor:
    """TRL's ``selective_log_softmax``: log softmax(logits / temperature)[index], in nats.

    Args:
        logits: [..., V], fp64, fp32, bf16 or fp16.
        index: int64 or int32, [...] or [..., K], in [0, V); anything where ``row_mask`` is zero.
        temperature: above 0.
        row_mask: shaped as ``index``; where it is zero the result is exactly 0 and no gradient flows.
        match_dtype: whether to round the result to the logits' dtype.

    Returns:
        Shaped as ``index``; fp32, or fp64 for fp64 logits, whatever the device, unless ``match_dtype``. TRL returns
        fp32 from its Triton kernel (GPUs) and the logits' dtype elsewhere; fp32 costs one number per token and keeps
        what a ratio needs.

    Raises:
        ValueError: as :func:`videor1_kernels.selective_log_softmax`, or a ``row_mask`` of another shape than ``index``.
    """
    if index.dtype == torch.int32:
        index = index.long()
    dtype = logits.dtype if match_dtype else torch.promote_types(logits.dtype, torch.float32)
    if row_mask is None:
        return videor1_kernels.selective_log_softmax(logits, index, temperature=temperature, backend=backend).to(dtype)
    if row_mask.shape != index.shape:
        raise fail("selective_log_softmax", "row_mask", f"shape {list(index.shape)}", list(row_mask.shape))
    out = row_mask == 0
    logp = videor1_kernels.selective_log_softmax(
        logits, index.masked_fill(out, 0), temperature=temperature, backend=backend
    )
    return logp.masked_fill(out, 0.0).to(dtype)


class FusedHead:
    """Takes the place of the autograd function of TRL's fused LM head, which TRL calls by its ``apply``."""

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = HEAD_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        """(logp [N], entropy [N] or None, None, None, None) of hidden [N, H], weight [V, H], bias [V], targets [N].

        Both are fp32 and differentiable. Under autocast the head runs in autocast's dtype, as in TRL. ``chunk_size``
        shapes TRL's own tiles and has no effect.

        Raises:
            ValueError: for an output other than those of :data:`HEAD_OUTPUTS`, or a head that DeepSpeed ZeRO-3 has
                partitioned (it would be gone again in the backward pass).
        """
        op = "trl fused head"
        if unknown := [name for name in outputs if name not in HEAD_OUTPUTS]:
            raise fail(op, "outputs", f"of {', '.join(HEAD_OUTPUTS)} (run this trainer without use())", unknown)
        if hasattr(weight, "ds_id"):
            raise fail(op, "weight", "a whole parameter (under DeepSpeed ZeRO-3 train without use())", "a ZeRO-3 one")
        check_number(op, "logit_scale", logit_scale, above=0)
        cap = final_logit_softcapping
        logp, entropy = videor1_kernels.linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature / logit_scale,
            softcap=None if cap is None else cap / logit_scale,  # TRL caps the scaled logits
            backend=self.backend,
        )
        return logp, entropy if "entropy" in outputs else None, None, None, None
