"""Liger-Kernel: its ``LigerFusedLinearGRPOLoss``, with its arguments, its numbers and its results.

    from videor1_kernels.integrations.liger import LigerFusedLinearGRPOLoss   # for liger_kernel.chunked_loss

``use()`` puts it where Liger keeps its own, and into TRL: ``GRPOTrainer`` of TRL 1.12 and older takes it with
``use_liger_kernel=True`` (later versions have no Liger loss; see :mod:`videor1_kernels.integrations.trl`).
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

import videor1_kernels
from videor1_kernels.checks import FLOATS, INTEGERS, check_choice, check_tensor, fail
from videor1_kernels.integrations.host import Replacement, replace, with_backend

__all__ = ["LigerFusedLinearGRPOLoss", "use"]

OP = "LigerFusedLinearGRPOLoss"
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
UNCLAMPED = float(torch.finfo(torch.float32).max)  # Liger's KL has no clamp


def use(*, backend: str = "auto") -> ExitStack:
    """Put this library's :class:`LigerFusedLinearGRPOLoss` into Liger and, if it is loaded, TRL, for the rest of the
    process or for a ``with`` block.

    Args:
        backend: the kernels' backend: ``auto``, ``triton``, ``reference``.

    Returns:
        An ``ExitStack``. When it is closed or its ``with`` block ends, Liger and TRL have Liger's own loss back.

    Raises:
        ImportError: liger-kernel is not installed, or its version has other constructor arguments.

    Source:
        This library; the names and arguments replaced are Liger-Kernel's (https://github.com/linkedin/Liger-Kernel).
    """
    ours = with_backend(LigerFusedLinearGRPOLoss, backend)
    replacement = Replacement("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss", ours)
    return replace("liger-kernel", ["liger_kernel", "trl"], [replacement])


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """GRPO loss from hidden states, :func:`videor1_kernels.linear_grpo_loss` under Liger's names.

    Args:
        beta, epsilon_low, epsilon_high, temperature, max_completion_length, importance_sampling_level: as in Liger.
        loss_type: "grpo", "bnpo", "dr_grpo" or "dapo".
        use_ref_model: False: the KL term is 0 with gradient 0, as in Liger.
        delta: None only.
        use_bias_correction_kl: False where there is a KL term (TRL's default is True: set it to False for a ``beta``).
        compiled, chunk_size: of Liger's implementation; no effect here.
        sapo_*, vespo_*: of loss types that are not supported here; no effect.
        backend: of the kernels.

    Raises:
        ValueError: for an option that is not supported.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice(OP, "loss_type", loss_type, LOSS_TYPES)
        check_choice(OP, "importance_sampling_level", importance_sampling_level, ("token", "sequence"))
        if delta is not None:
            raise fail(OP, "delta", "None (the ratio is clipped by epsilon_low and epsilon_high only)", delta)
        if use_bias_correction_kl and beta != 0 and use_ref_model:
            raise fail(OP, "use_bias_correction_kl", "False, or beta=0 (no ratio weights the KL term here)", True)
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.temperature = temperature
        self.backend = backend

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of B completions, padded to T tokens.

        Args:
            _input: [B, T, H], position t predicts token t. A masked position is left out before the head.
            lin_weight, bias: the head, [V, H] and [V] or None.
            selected_token_ids: int64 [B, T]; anything where masked.
            attention_mask: [B, T] of 0 and 1, the tokens that count; holes are fine.
            advantages: [B].
            old_per_token_logps: [B, T]; None: those of this call, so that every ratio is 1.
            ref_per_token_logps: [B, T]; None with ``beta`` other than 0: worked out, without gradient, from
                ``ref_input`` [B, T, H], ``ref_weight`` [V, H] and ``ref_bias``.
            vllm_is_ratio: None only.
            num_items_in_batch: for "dapo", the tokens of the whole accumulated batch over all processes; None: those
                of this call over all processes.

        Returns:
            (loss, metrics): an fp32 scalar that can be differentiated, and detached scalars: the mean KL if ``beta`` is
            not 0, then the share of clipped tokens.

        Raises:
            ValueError: an input that is not supported or does not fit the others.
        """
        if vllm_is_ratio is not None:
            raise fail(OP, "vllm_is_ratio", "None (a sampler's importance correction is not supported)", "a tensor")
        check_tensor(OP, "_input", _input, ("B", "T", "H"))
        batch = _input.shape[:2]
        check_tensor(OP, "attention_mask", attention_mask, batch, (torch.bool, *INTEGERS, *FLOATS), _input.device)
        check_tensor(OP, "selected_token_ids", selected_token_ids, batch, (torch.int64,), _input.device)
        keep = attention_mask != 0
        if attention_mask.dtype != torch.bool and bool((keep & (attention_mask != 1)).any()):
            raise fail(OP, "attention_mask", "0 and 1 only (a token counts or does not)", "other values")
        cu_seqlens = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int()
        labels = selected_token_ids[keep]
        with_kl = self.beta != 0 and self.use_ref_model
        ref_logp = None
        if with_kl:
            ref_logp = self._reference(labels, keep, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        result = videor1_kernels.linear_grpo_loss(
            _input[keep],
            lin_weight,
            labels,
            advantages,
            cu_seqlens,
            old_logp=self._packed("old_per_token_logps", old_per_token_logps, keep),
            ref_logp=ref_logp,
            bias=bias,
            loss_type=self.loss_type,
            beta=self.beta if with_kl else 0.0,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            kl_clamp=UNCLAMPED,
            importance_level=self.importance_sampling_level,
            temperature=self.temperature,
            max_completion_length=self.max_completion_length,
            num_tokens=self._num_tokens(keep, num_items_in_batch) if self.loss_type == "dapo" else None,
            backend=self.backend,
        )
        metrics = (result.clip_fraction,) if self.beta == 0 else (result.kl, result.clip_fraction)
        return result.loss, metrics

    def _reference(
        self,
        labels: Tensor,
        keep: Tensor,
        logps: Tensor | None,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> Tensor:
        """The reference model's log-probabilities of the tokens that count, [N]."""
        packed = self._packed("ref_per_token_logps", logps, keep)
        if packed is not None:
            return packed
        if ref_input is None or ref_weight is None:
            raise fail(
                OP,
                "ref_per_token_logps",
                f"a tensor, or ref_input and ref_weight, as beta is {self.beta:g} and use_ref_model is True",
                None,
            )
        check_tensor(OP, "ref_input", ref_input, (*keep.shape, "H"), device=keep.device)
        with torch.no_grad():
            logp, _ = videor1_kernels.linear_logprob(
                ref_input[keep], ref_weight, labels, bias=ref_bias, temperature=self.temperature, backend=self.backend
            )
        return logp

    def _packed(self, name: str, values: Tensor | None, keep: Tensor) -> Tensor | None:
        if values is None:
            return None
        check_tensor(OP, name, values, keep.shape, device=keep.device)
        return values.detach()[keep]

    @staticmethod
    def _num_tokens(keep: Tensor, num_items_in_batch: Tensor | float | None) -> float:
        """Tokens per process of the accumulated batch, at least 1."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if distributed else 1
        if num_items_in_batch is None:
            total = keep.sum()
            if distributed:
                torch.distributed.all_reduce(total)
            num_items_in_batch = total
        return max(float(num_items_in_batch) / processes, 1.0)
