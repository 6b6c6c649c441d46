"""Packed rows of prompts and completions, and the passes over them: log-probs, T-GRPO loss, SFT loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from videor1.config import TrainConfig
from videor1.model import VideoLM
from videor1.model.features import prompt_features
from videor1.types import Media, Prompt, Sample
from videor1_kernels import GrpoLoss, PrefixLayout, linear_grpo_loss, linear_logprob
from videor1_kernels.frames_to_patches import patch_columns
from videor1_kernels.integrations.transformers import PackedRow


@dataclass(frozen=True)
class Packed:
    """A packed row: prompts with their completions, each prompt once. T tokens, N of them learned.

    These are the tokens of the completions, and in SFT the assistant's earlier turns in the prompts.
    """

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [3, 1, T]
    layout: PrefixLayout
    prompts: tuple[Prompt, ...]
    earlier: Tensor | None = None  # int64: row positions of the prompts' tokens that are learned; None: none

    @property
    def labels(self) -> Tensor:
        """The tokens of all completions end to end, then those of the prompts that are learned, int64 [N]."""
        index = self.layout.completion_index
        return self.ids[index if self.earlier is None else torch.cat([index, self.earlier])]

    @property
    def predict_index(self) -> Tensor:
        """Row position whose hidden state predicts each of ``labels``, int64 [N]."""
        index = self.layout.predict_index
        return index if self.earlier is None else torch.cat([index, self.earlier - 1])


def pack(
    model: VideoLM, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]], earlier: Sequence[Tensor] = ()
) -> Packed:
    """Pack prompts and completions into one row; ``completions[i]`` are the token ids of those of ``prompts[i]``.

    ``earlier[i]``, int64, are the positions in ``prompts[i]`` of its tokens that are learned, none of them the first.
    """
    layout = PrefixLayout(
        [len(p.input_ids) for p in prompts], [[len(ids) for ids in group] for group in completions], model.device
    )
    ids = [part for p, group in zip(prompts, completions, strict=True) for part in (p.input_ids, *group)]
    positions, firsts = zip(*map(model.positions, prompts), strict=True)
    starts = layout.prompt_starts
    learned = [start + places for start, places in zip(starts, earlier, strict=True)] if earlier else []
    more = torch.cat(learned).to(model.device) if any(map(len, learned)) else None
    row = torch.cat(ids).to(model.device)
    return Packed(row, layout.text_positions(positions, firsts), layout, tuple(prompts), more)


def predicting_states(
    model: VideoLM, packed: Packed, features: Sequence[Tensor] | None = None, backend: str = "auto"
) -> Tensor:
    """Return the hidden states [N, H] that predict the tokens that are learned; no others need to pass the head."""
    if features is None:
        features = [f for f in prompt_features(model, packed.prompts) if f is not None]
    hidden = model.hidden_states(packed.ids, packed.positions, PackedRow(packed.layout, backend), features)
    return hidden[packed.predict_index]


def completion_logp(
    model: VideoLM,
    packed: Packed,
    *,
    temperature: float = 1.0,
    features: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the log-probs [N] of ``packed.labels``, fp32, in nats."""
    hidden = predicting_states(model, packed, features, backend)
    head = model.hf.lm_head.weight
    with model.autocast():  # fp32 weights are multiplied in bf16, and their gradient stays in fp32
        return linear_logprob(hidden, head, packed.labels, temperature=temperature, backend=backend)[0]


def tgrpo_loss(
    model: VideoLM,
    packed: Packed,
    advantages: Tensor,
    config: TrainConfig,
    *,
    num_tokens: int,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    completion_mask: Tensor | None = None,
    features: Sequence[Tensor] | None = None,
) -> GrpoLoss:
    """Return the policy loss of one packed row.

    Args:
        advantages: [S], one per completion.
        num_tokens: completion tokens of the whole accumulated batch (loss_type dapo).
        old_logp: [N] log-probs under the policy that sampled; None for the first update after a rollout.
        ref_logp: [N] log-probs under the reference model; None where beta is 0.
        rollout_logp: [N] log-probs as the sampler gave them; None without an importance correction.
        completion_mask: bool [S], the completions that count; None: all.
        features: vision features from a frozen tower; None runs the tower, with gradients if it is trained.
    """
    hidden = predicting_states(model, packed, features, config.kernels)
    with model.autocast():  # as above
        return linear_grpo_loss(
            hidden,
            model.hf.lm_head.weight,
            packed.labels,
            advantages.to(model.device),
            packed.layout.cu_completions,
            old_logp=old_logp,
            ref_logp=ref_logp,
            rollout_logp=rollout_logp,
            completion_mask=completion_mask,
            loss_type=config.loss_type,
            beta=config.beta,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            delta=config.delta,
            clip_dual=config.clip_dual,
            importance_correction=config.importance_correction,
            correction_mode=config.correction_mode,
            correction_min=config.correction_min,
            correction_max=config.correction_max,
            sapo_temperature_pos=config.sapo_temperature_pos,
            sapo_temperature_neg=config.sapo_temperature_neg,
            vespo_k_pos=config.vespo_k_pos,
            vespo_lambda_pos=config.vespo_lambda_pos,
            vespo_k_neg=config.vespo_k_neg,
            vespo_lambda_neg=config.vespo_lambda_neg,
            use_bias_correction_kl=config.use_bias_correction_kl,
            entropy_coef=config.entropy_coef,
            kl_clamp=config.kl_clamp,
            importance_level=config.importance_level,
            temperature=config.temperature,
            max_completion_length=config.max_completion_length,
            num_tokens=num_tokens,
            backend=config.kernels,
        )


def dummy_tower_loss(model: VideoLM) -> Tensor:
    """Return a loss of 0 that runs the vision tower if it is trained.

    A rank whose pass has no media needs it beside ranks whose passes have some, which wait for it inside the tower.
    """
    if not any(p.requires_grad for p in model.visual.parameters()):
        return torch.zeros((), device=model.device)
    columns = patch_columns(model.family.frames.patch_size)
    black = Media("image", torch.zeros(4, columns, dtype=torch.uint8), (1, 2, 2), 0.0, 0.0)
    return model.vision_features([black])[0].float().sum() * 0.0


def dummy_loss(model: VideoLM, backend: str = "auto") -> Tensor:
    """Return a loss of 0 that depends on every trained parameter, for a rank that has fewer rows than another."""
    eos = torch.tensor([model.special.eos])
    row = pack(model, [Prompt(Sample(0, "", "", "text", "free-form", ""), eos, None, 0)], [[eos]])
    tower_loss = dummy_tower_loss(model)
    return completion_logp(model, row, features=[], backend=backend).sum() * 0.0 + tower_loss


def sft_loss(model: VideoLM, packed: Packed, num_tokens: int, backend: str = "auto") -> Tensor:
    """Return the cross-entropy summed over the target tokens, divided by ``num_tokens`` of the accumulated batch."""
    return -completion_logp(model, packed, backend=backend).sum() / num_tokens
