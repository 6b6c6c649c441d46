"""Liger-Kernel: its ``LigerFusedLinearGRPOLoss``, with its arguments, its numbers and its results.

    from videor1_kernels.integrations.liger import LigerFusedLinearGRPOLoss   # for liger_kernel.chunked_loss

``use()`` puts it where Liger keeps its own, and into TRL: ``GRPOTrainer`` of TRL 1.12 and older takes it with
``use_liger_kernel=True`` (later versions have no Liger loss; see :mod:`videor1_kernels.integrations.trl`).
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack

import torch
from torch import Tensor

import videor1_kernels
from videor1_kernels.checks import FLOATS, INTEGERS, check_choice, check_number, check_tensor, fail
from videor1_kernels.integrations.host import Replacement, replace, with_backend

__all__ = ["LigerFusedLinearGRPOLoss", "use"]

OP = "LigerFusedLinearGRPOLoss"
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
BY_TOKENS_OF_ALL = ("dapo", "cispo", "vespo")
BY_TOKEN = ("cispo", "sapo", "vespo")  # loss types that Liger has at token level alone
UNCLIPPED = ("sapo", "vespo")
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
        loss_type, delta, use_bias_correction_kl, sapo_*, vespo_*: as in Liger.
        use_ref_model: False: the KL term is 0 with gradient 0, as in Liger.
        compiled, chunk_size: of Liger's implementation; no effect here.
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
        above_0 = {"sapo_temperature_pos": sapo_temperature_pos, "sapo_temperature_neg": sapo_temperature_neg}
        above_0 |= {} if delta is None else {"delta": delta}
        for name, value in above_0.items():
            check_number(OP, name, value, above=0)
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg
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
            selected_token_ids: int64 [B, T]; anything where masked, but tokens for "luspo", whose terms of tokens count
                there too, as in Liger and TRL.
            attention_mask: [B, T] of 0 and 1, the tokens that count; holes are fine.
            advantages: [B].
            old_per_token_logps: [B, T]; None: those of this call, so that every ratio is 1.
            ref_per_token_logps: [B, T]; None with ``beta`` other than 0: worked out, without gradient, from
                ``ref_input`` [B, T, H], ``ref_weight`` [V, H] and ``ref_bias``; with both a warning, and these win.
            vllm_is_ratio: [B, T], [B, 1] or [B], weights of the policy term as TRL makes them. At sequence level not
                [B, T], and none with ``use_bias_correction_kl``.
            num_items_in_batch: for "dapo", "cispo" and "vespo", the tokens of the whole accumulated batch over all
                processes; None: those of this call over all processes.

        Returns:
            (loss, metrics): an fp32 scalar that can be differentiated, and detached scalars: the mean KL if ``beta`` is
            not 0, then the share of clipped tokens.

        Raises:
            ValueError: an input that is not supported or does not fit the others.
        """
        if self.importance_sampling_level == "sequence" and self.loss_type in BY_TOKEN:
            raise ValueError(
                f"{OP}: Sequence-level importance sampling is not supported for loss_type {self.loss_type!r}, as in "
                "Liger; use importance_sampling_level 'token'"
            )
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
        old_logp = self._packed("old_per_token_logps", old_per_token_logps, keep)
        cispo = self.loss_type == "cispo"
        if self.use_ref_model and ref_per_token_logps is not None and ref_input is not None:
            message = "Both ref_per_token_logps and ref_input are provided. Using ref_per_token_logps."
            warnings.warn(message, stacklevel=2)
        if self.loss_type == "luspo" and (with_kl or self.importance_sampling_level == "token"):
            head, references = (_input, lin_weight, bias), (ref_per_token_logps, ref_input, ref_weight, ref_bias)
            given = selected_token_ids, keep, advantages, old_per_token_logps, vllm_is_ratio
            return self._luspo(head, *given, references if with_kl else None)
        ref_logp = None
        if with_kl:
            ref_logp = self._reference(labels, keep, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        result = videor1_kernels.linear_grpo_loss(
            _input[keep],
            lin_weight,
            labels,
            advantages,
            cu_seqlens,
            old_logp=old_logp,
            ref_logp=ref_logp,
            bias=bias,
            loss_type=self.loss_type,
            beta=self.beta if with_kl else 0.0,
            importance_weight=self._importance(vllm_is_ratio, keep, with_kl),
            # Liger bounds CISPO's weight by epsilon_high itself, and not from below.
            clip_low=None if cispo or self.loss_type in UNCLIPPED else self.epsilon_low,
            clip_high=None if self.loss_type in UNCLIPPED else self.epsilon_high - cispo,
            delta=None if self.loss_type in BY_TOKEN else self.delta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
            vespo_k_pos=self.vespo_k_pos,
            vespo_lambda_pos=self.vespo_lambda_pos,
            vespo_k_neg=self.vespo_k_neg,
            vespo_lambda_neg=self.vespo_lambda_neg,
            kl_clamp=UNCLAMPED,
            importance_level=self.importance_sampling_level,
            temperature=self.temperature,
            max_completion_length=self.max_completion_length,
            num_tokens=self._num_tokens(keep, num_items_in_batch) if self.loss_type in BY_TOKENS_OF_ALL else None,
            backend=self.backend,
        )
        clipped = result.clip_fraction
        if cispo or (self.delta is not None and self.loss_type not in BY_TOKEN):
            clipped = self._clip_ratio(result.logp, old_logp, keep, advantages)
        return result.loss, (clipped,) if self.beta == 0 else (result.kl, clipped)

    def _luspo(
        self,
        head: tuple[Tensor, Tensor, Tensor | None],
        labels: Tensor,
        keep: Tensor,
        advantages: Tensor,
        old_logp: Tensor | None,
        ratio: Tensor | None,
        references: tuple[Tensor | None, ...] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """LUSPO where its terms are of tokens: their mean over all T positions, times the tokens that count.

        A policy term of a whole completion is the same at every position, so that only its KL term is of tokens.
        """
        (hidden, weight, bias), (rows, width) = head, keep.shape
        everywhere = torch.ones_like(keep)
        logp, _ = videor1_kernels.linear_logprob(
            hidden.flatten(0, 1), weight, labels.flatten(), bias=bias, temperature=self.temperature,
            backend=self.backend,
        )  # fmt: skip
        old = self._packed("old_per_token_logps", old_logp, everywhere)
        old = logp.detach() if old is None else old.to(logp.dtype)
        share = keep.sum(1, keepdim=True).to(logp.dtype) / width  # [B, 1]
        by_token = self.importance_sampling_level == "token"
        policy = videor1_kernels.grpo_loss(
            logp,
            advantages,
            torch.arange(rows + 1, device=keep.device, dtype=torch.int32) * width,
            old_logp=old,
            importance_weight=self._importance(ratio, everywhere, references is not None),
            token_weight=share.expand(keep.shape).flatten() if by_token else None,
            mask=None if by_token else keep.flatten(),
            loss_type="luspo",
            beta=0.0,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            delta=self.delta,
            importance_level=self.importance_sampling_level,
            backend=self.backend,
        )
        clipped = self._clip_ratio(logp.detach()[keep.flatten()], old[keep.flatten()], keep, advantages)
        if references is None:
            return policy.loss, (clipped,) if self.beta == 0 else (policy.kl, clipped)
        gap = (self._reference(labels.flatten(), everywhere, *references).to(logp.dtype) - logp).view(keep.shape)
        kl = gap.expm1() - gap
        if self.use_bias_correction_kl:
            log_ratio = (logp - old).view(keep.shape)
            if not by_token:
                log_ratio = log_ratio.where(keep, 0.0).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)
            kl = kl * log_ratio.exp()
        mean_kl = kl.detach().where(keep, 0.0).sum() / keep.sum().clamp(min=1)
        return policy.loss + self.beta * (kl * share).sum() / rows, (mean_kl, clipped)

    def _clip_ratio(self, logp: Tensor, old_logp: Tensor | None, keep: Tensor, advantages: Tensor) -> Tensor:
        """Liger's share of clipped tokens, which counts neither ``delta`` nor negative advantages of CISPO."""
        gaps = torch.zeros(keep.shape, dtype=logp.dtype, device=keep.device)
        gaps[keep] = torch.zeros_like(logp) if old_logp is None else logp - old_logp.to(logp.dtype)
        if self.importance_sampling_level == "sequence":
            gaps = (gaps.sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)).expand_as(gaps)
        ratio, signs = gaps.exp(), advantages[:, None]
        high = self.epsilon_high + (self.loss_type != "cispo")
        clipped = (ratio > high) & (signs > 0)
        if self.loss_type != "cispo":
            clipped |= (ratio < 1 - self.epsilon_low) & (signs < 0)
        return (clipped & keep).sum() / keep.sum().clamp(min=1).to(logp.dtype)

    def _importance(self, ratio: Tensor | None, keep: Tensor, with_kl: bool) -> Tensor | None:
        """The weights of the tokens that count, [N], of a ratio [B, T], [B, 1] or [B]."""
        if ratio is None:
            return None
        check_tensor(OP, "vllm_is_ratio", ratio, device=keep.device)
        (rows, width), shape = keep.shape, list(ratio.shape)
        if shape not in ([rows], [rows, 1], [rows, width]):
            raise fail(OP, "vllm_is_ratio", f"shape [{rows}, {width}], [{rows}, 1] or [{rows}]", shape)
        by_completion = ratio.dim() == 1 or ratio.shape[1] == 1
        if self.importance_sampling_level == "sequence":
            if not by_completion:
                raise fail(OP, "vllm_is_ratio", f"shape [{rows}, 1] or [{rows}] at sequence level", shape)
            if self.use_bias_correction_kl and with_kl:
                raise fail(OP, "use_bias_correction_kl", "False at sequence level with a vllm_is_ratio", True)
        weights = ratio.detach().reshape(rows, -1).expand(rows, width)
        if self.loss_type == "vespo" and by_completion:  # VESPO multiplies the weights of tokens: this is one of them
            first = keep & (keep.cumsum(1) == 1)
            weights = torch.where(first, weights, 1.0)
        return weights[keep]

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
