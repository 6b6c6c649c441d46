"""The naive training pass: every completion in a row of its own behind a copy of its prompt, padded to one batch.

What the reference code of T-GRPO does, by transformers' own model and attention, on the weights of a
:class:`~videor1.model.VideoLM`. It takes the packed rows of :mod:`videor1.training.passes` and gives log-probs in their
order, so that the two ways can be compared, timed, and put in each other's place.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.step_inputs import COMPARED_RULE
from videor1.config import TrainConfig
from videor1.model import VideoLM
from videor1.model.features import prompt_features
from videor1.training.passes import Packed
from videor1.types import Media
from videor1.video.patches import normalize_patches
from videor1_kernels import GrpoLoss, grpo_loss

Head = Literal["all", "completions"]
Tower = Literal["row", "prompt"]
# The options of the loss that the trainer's have the same names for.
LOSS_OPTIONS = ("loss_type", "beta", "clip_low", "clip_high", "kl_clamp", "importance_level", "max_completion_length")


@dataclass(frozen=True)
class Batch:
    """R rows [prompt | completion | padding] of L columns, prompt by prompt, completion by completion."""

    ids: Tensor  # int64 [R, L]
    mask: Tensor  # int64 [R, L], 0 on padding
    kinds: Tensor  # int64 [R, L]: 0 text, 1 image, 2 video
    prompt_lengths: tuple[int, ...]  # of each row
    completion_lengths: tuple[int, ...]
    media: tuple[Media | None, ...]  # of each row

    @property
    def predicting(self) -> tuple[Tensor, Tensor]:
        """Row and column of the position that predicts each completion token, [N] each."""
        rows, columns = [], []
        for row, (prompt, length) in enumerate(zip(self.prompt_lengths, self.completion_lengths, strict=True)):
            rows.append(torch.full((length,), row))
            columns.append(torch.arange(prompt - 1, prompt - 1 + length))
        return torch.cat(rows).to(self.ids.device), torch.cat(columns).to(self.ids.device)


class RepeatedRows:
    """Log-probs and loss of repeated rows.

    transformers' modules are copied, its parameters shared: gradients land in the model's own parameters, and the copy
    keeps the attention ``sdpa`` through the backward pass (gradient checkpointing calls it again) while the model keeps
    its own. Build it again after the model's adapters, checkpointing or parameters were replaced.

    Args:
        model: the weights. Adapters of the copy are switched on and off by its own ``peft``.
        head: ``all`` takes the logits of every position, padding and prompt included, as the reference code does;
            ``completions`` those that predict a completion's token.
        tower: ``row`` runs the vision tower on every row's pixels, as the reference code does; ``prompt`` once per
            prompt, its features repeated.

    Raises:
        ValueError: an unknown variant, or a model whose positions are not by transformers' rule.
    """

    def __init__(self, model: VideoLM, *, head: Head = "all", tower: Tower = "row") -> None:
        if head not in ("all", "completions") or tower not in ("row", "prompt"):
            raise ValueError(
                f"RepeatedRows: expected head 'all' or 'completions', tower 'row' or 'prompt', got {head!r}, {tower!r}"
            )
        if model.position_rule != COMPARED_RULE:
            raise ValueError(f"RepeatedRows: expected position_rule {COMPARED_RULE!r}, got {model.position_rule!r}")
        self.model, self.head, self.tower = model, head, tower
        shared = {id(parameter): parameter for parameter in model.hf.parameters()}
        self.peft: Any = None if model.peft is None else copy.deepcopy(model.peft, shared)
        self.hf: Any = copy.deepcopy(model.hf, shared) if self.peft is None else self.peft.get_base_model()
        self.hf.model.language_model.set_attn_implementation("sdpa")

    def logp(self, packed: Packed, *, temperature: float = 1.0) -> Tensor:
        """Log-probs [N] of the completions' tokens in the order of ``packed``, nats, in the logits' dtype: a bf16 model
        has them in bf16, as in the reference code."""
        batch = make_batch(self.model, packed)
        self.hf.train(self.model.hf.training)
        with self.model.autocast():
            hidden = self.hf.model(**self._inputs(batch, packed), use_cache=False).last_hidden_state  # [R, L, H]
            rows, columns = batch.predicting
            if self.head == "completions":
                logits = self.hf.lm_head(hidden[rows, columns]).split(list(batch.completion_lengths))
                labels = packed.labels.split(list(batch.completion_lengths))
                return torch.cat([_selected(x, y, temperature) for x, y in zip(logits, labels, strict=True)])
            every = self.hf.lm_head(hidden)[:, :-1]
            scores = [_selected(x, y, temperature) for x, y in zip(every, batch.ids[:, 1:], strict=True)]
            return torch.stack(scores)[rows, columns]

    def loss(self, packed: Packed, advantages: Tensor, config: TrainConfig, **given: Any) -> GrpoLoss:
        """What :func:`videor1.training.passes.tgrpo_loss` gives of the same row, but for the entropy; ``given``: its
        num_tokens, old_logp and ref_logp."""
        logp = self.logp(packed, temperature=config.temperature)
        options = {name: getattr(config, name) for name in LOSS_OPTIONS}
        options |= {"backend": config.kernels, **given}
        return grpo_loss(logp, advantages.to(self.model.device), packed.layout.cu_completions, **options)

    def _inputs(self, batch: Batch, packed: Packed) -> dict[str, Any]:
        """Keyword arguments of transformers' model for the rows."""
        inputs: dict[str, Any] = {"attention_mask": batch.mask, "position_ids": self._positions(batch)}
        if self.tower == "prompt":
            features = prompt_features(self.model, packed.prompts)
            groups = zip(features, packed.layout.completion_lengths, strict=True)
            own = [x for x, group in groups if x is not None for _ in group]
            embeds = self.hf.get_input_embeddings()(batch.ids)
            if own:
                embeds = embeds.masked_scatter((batch.kinds > 0)[..., None], torch.cat(own).to(embeds.dtype))
            return inputs | {"inputs_embeds": embeds}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            patches = [media.patches for media in batch.media if media is not None and media.kind == kind]
            if patches:
                pixels = torch.cat(patches).to(self.model.device)
                if not pixels.is_floating_point():
                    pixels = normalize_patches(pixels, self.model.compute_dtype)
                inputs |= {name: pixels}
                inputs[f"{kind}_grid_thw"] = self._grids(batch, kind)
        return inputs | {"input_ids": batch.ids}

    def _positions(self, batch: Batch) -> Tensor:
        """M-RoPE positions [3, R, L] by transformers' own rule."""
        seconds = [m.second_per_grid for m in batch.media if m is not None and m.kind == "video"]
        positions, _ = self.hf.model.get_rope_index(
            batch.ids,
            batch.kinds,
            image_grid_thw=self._grids(batch, "image"),
            video_grid_thw=self._grids(batch, "video"),
            second_per_grid_ts=torch.tensor(seconds) if seconds else None,
            attention_mask=batch.mask,
        )
        return positions

    def _grids(self, batch: Batch, kind: str) -> Tensor | None:
        grids = [media.grid_thw for media in batch.media if media is not None and media.kind == kind]
        return torch.tensor(grids, device=self.model.device) if grids else None


def make_batch(model: VideoLM, packed: Packed) -> Batch:
    """The rows of a packed row's prompts and completions."""
    layout, rows, media = packed.layout, [], []
    groups = zip(packed.prompts, layout.prompt_starts, layout.prompt_lengths, strict=True)
    for i, (prompt, start, length) in enumerate(groups):
        own = packed.ids[start : start + length]
        for first, tokens in zip(layout.completion_starts[i], layout.completion_lengths[i], strict=True):
            rows.append(torch.cat([own, packed.ids[first : first + tokens]]))
            media.append(prompt.media)
    ids = pad_sequence(rows, batch_first=True, padding_value=model.special.pad)
    kinds = torch.zeros_like(ids)
    kinds[ids == model.special.image_pad] = 1
    kinds[ids == model.special.video_pad] = 2
    per_row = [
        (prompt, tokens)
        for prompt, group in zip(layout.prompt_lengths, layout.completion_lengths, strict=True)
        for tokens in group
    ]
    prompt_lengths, completion_lengths = zip(*per_row, strict=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return Batch(ids, mask, kinds, prompt_lengths, completion_lengths, tuple(media))


def _selected(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Log-softmax [n, V] of one row, taken at its labels [n]."""
    scores = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    return scores.gather(1, labels[:, None])[:, 0]
