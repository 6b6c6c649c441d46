"""A model as the trainer uses it: vision features of a prompt, hidden states of a packed row, and the head's weight.

The classes are transformers' own, unpatched. The language model runs with the attention ``videor1_prefix``; the context
of a pass defines what it attends to (``videor1_kernels.integrations.transformers``).
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from videor1.config import LoraConfig
from videor1.errors import ConfigError
from videor1.model import vision
from videor1.model.chat import PLAIN_CHAT, Chat
from videor1.model.families import Family, family_of
from videor1.model.lora import use_lean_lora
from videor1.model.positions import PositionRule, prompt_positions
from videor1.model.prompts import SpecialIds, special_ids
from videor1.model.template import opened_text
from videor1.seeding import derive_seed
from videor1.types import Media, Prompt, Sample
from videor1.video.patches import normalize_patches, num_media_tokens
from videor1_kernels.checks import check_choice
from videor1_kernels.frames_to_patches import patch_columns
from videor1_kernels.integrations import transformers as attention


class VideoLM:
    """A model of one of the families with its tokenizer, on one device.

    Attributes:
        hf: the model, of transformers' class, adapters inside where LoRA is on.
        family: what its family does differently from others.
        peft: the peft wrapper, or None.
        tokenizer, special: the tokenizer and its special ids.
        opened_text: what the chat template opens an answer with, at the end of every prompt; "" for most. An answer as
            a whole is this and what the model wrote (:func:`videor1.answer.whole_text`).
        linear_layers: how many layers of the language model are linear attention.
        chat: the run's system prompt and arguments of the chat template.
        compute_dtype: bf16 under autocast, or the parameters' own dtype.
        position_rule: which positions text after media has, see :mod:`videor1.model.positions`.
    """

    def __init__(
        self,
        hf: Any,
        tokenizer: Any,
        *,
        device: torch.device | str = "cpu",
        bf16: bool = False,
        source: str = "",
        position_rule: PositionRule = "paper",
        chat: Chat = PLAIN_CHAT,
    ) -> None:
        self.family: Family = family_of(hf.config.model_type, source)
        self.hf = hf.to(device)
        self.peft: Any = None
        self.flash = False  # whether flash-attn computes the attention of a rollout's prompts
        self.tokenizer = tokenizer
        self.special: SpecialIds = special_ids(tokenizer, self.family)
        self.chat = chat
        chat.check(tokenizer, source)
        self.opened_text = opened_text(tokenizer, source, self.family, chat.template_kwargs)
        self.device = torch.device(device)
        self.bf16 = bf16
        self.source = source
        check_choice("VideoLM", "position_rule", position_rule, get_args(PositionRule))
        self.position_rule: PositionRule = position_rule
        self.compute_dtype = torch.bfloat16 if bf16 else next(hf.parameters()).dtype
        self.linear_layers = attention.share_prefixes(hf.model.language_model)
        vision.prepare(hf.model.visual)
        self._check_vocabulary()
        self._check_tower()

    @property
    def visual(self) -> Any:
        return self.hf.model.visual

    @property
    def head_weight(self) -> Tensor:
        """The head's weight [V, H] in the compute dtype."""
        return self.hf.lm_head.weight.to(self.compute_dtype)

    def vision_features(self, media: Sequence[Media], patches: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Compute the features [tokens, n * H] of each of ``media`` in one pass of the vision tower.

        The first H columns replace the embeddings of media tokens; what others are for, the model's family knows.

        Args:
            patches: 8-bit patches, one tensor per media, that replace the media's own, e.g. with frames shuffled.
        """
        if not media:
            return []
        pixels = torch.cat([m.patches for m in media] if patches is None else list(patches)).to(self.device)
        grid = torch.tensor([m.grid_thw for m in media])
        family = self.family
        if (given := pixels.shape[1]) != (columns := patch_columns(family.frames.patch_size)):
            raise ValueError(f"vision_features: expected {columns} columns a patch of {family.name}, got {given}")
        inputs = family.tower_inputs(grid, self.visual.config, self.device, self.compute_dtype)
        with self.autocast():
            output = self.visual(normalize_patches(pixels, self.compute_dtype, family.frames), grid_thw=grid, **inputs)
            features = family.features(output)
        return list(features.split([num_media_tokens(m.grid_thw) for m in media]))

    def asked(self, sample: Sample) -> Sample:
        """Return a sample as this run asks it: with the run's system prompt and arguments of the chat template, where
        it has none of its own.

        Raises:
            SampleError: ``chat_template_kwargs`` for arguments of its own that the template does not have, or with
                which it opens an answer otherwise.
        """
        return self.chat.asked(sample, self.tokenizer, self.source, self.family, self.opened_text)

    def positions(self, prompt: Prompt) -> tuple[Tensor, int]:
        """Return the M-RoPE positions [3, P] of a prompt, and the position of the first completion token."""
        if not prompt.all_media:
            return prompt_positions(prompt, None, rule=self.position_rule)
        runs, tokens = [], []
        for media in prompt.all_media:
            own = self.family.runs(media, self.hf.config.vision_config)
            runs += own
            tokens += [self.special.media_pad(media)] * len(own)
        return prompt_positions(prompt, tokens, runs, self.position_rule)

    def embeddings(self, ids: Tensor, features: Sequence[Tensor] = ()) -> tuple[Tensor, dict[str, Any]]:
        """Return the embeddings [T, H] of a packed row, its media tokens replaced by their features, and what the
        language model takes besides, in families that have it."""
        embeds: Tensor = self.hf.get_input_embeddings()(ids.to(self.device))
        if not features:
            return embeds, {}
        pads = torch.tensor([self.special.video_pad, self.special.image_pad], device=self.device)
        at = torch.isin(ids.to(self.device), pads)[:, None]
        values = torch.cat(list(features)).to(embeds.dtype)
        assert int(at.sum()) == len(values), (int(at.sum()), len(values))
        width = embeds.shape[1]
        further = self.family.layer_inputs(values.split(width, 1)[1:], at.T)
        return embeds.masked_scatter(at, values[:, :width]), further

    def hidden_states(
        self, ids: Tensor, positions: Tensor, context: attention.AttentionContext, features: Sequence[Tensor] = ()
    ) -> Tensor:
        """Compute the last hidden states [T, H] of one packed row, in the compute dtype.

        Args:
            ids: int64 [T].
            positions: int64 [3, 1, T], positions in time, height and width.
            context: defines what each token attends to.
            features: vision features of the row's media, in the row's order; they replace its media tokens.
        """
        embeds, further = self.embeddings(ids, features)
        with self.autocast():
            output = self.hf.model.language_model(
                inputs_embeds=embeds[None],
                position_ids=positions.to(self.device),
                use_cache=False,
                videor1_context=context,
                **further,
            )
        return output.last_hidden_state[0].to(self.compute_dtype)  # The last norm returns fp32 under autocast.

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context for a forward pass: autocast to bf16 in a bf16 run, else no change."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def without_autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context that computes in the dtypes of the operands, also inside of :meth:`autocast`."""
        return torch.autocast(self.device.type, enabled=False) if self.bf16 else contextlib.nullcontext()

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Return a context without gradients, dropout and gradient checkpointing."""
        was_training = self.hf.training
        self.hf.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.hf.train(was_training)

    @contextlib.contextmanager
    def as_reference(self, frozen: VideoLM | None) -> Iterator[VideoLM]:
        """Return a context with the reference model: the frozen copy, or this model with its adapters off."""
        if frozen is None and self.peft is None:
            raise ValueError("a reference policy needs a frozen copy, or LoRA adapters to switch off")
        model = frozen or self
        with model.inference(), contextlib.nullcontext() if frozen else self.peft.disable_adapter():
            yield model

    def frozen_copy(self) -> VideoLM:
        """Return a copy for the KL term, in the compute dtype, without gradients."""
        hf = copy.deepcopy(self.hf).to(self.compute_dtype).requires_grad_(False)
        set_checkpointing(hf, False)
        rule, chat = self.position_rule, self.chat
        return VideoLM(hf, self.tokenizer, device=self.device, source=self.source, position_rule=rule, chat=chat)

    def add_lora(self, config: LoraConfig, seed: int) -> None:
        """Add LoRA adapters to the language model's linear layers; only they stay trainable.

        Raises:
            ConfigError: ``lora.target_modules`` match no layer.
        """
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model

        targets = [self.family.lora_targets if name == "default" else (name,) for name in config.target_modules]
        names = "|".join(itertools.chain(*targets))
        options = PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=rf".*language_model.*\.({names})",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(derive_seed(seed, "lora"))
            # peft uses the old name of what newer transformers call is_activation_checkpointing.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            try:
                self.peft = get_peft_model(self.hf, options)
            except ValueError as error:
                raise ConfigError(f"lora.target_modules: {config.target_modules}: {error}") from error
        use_lean_lora(self.hf)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name, in the model's order."""
        return {name: p for name, p in self.hf.named_parameters() if p.requires_grad}

    def _check_vocabulary(self) -> None:
        """Check that model and tokenizer agree on the media tokens and the size of the vocabulary.

        Raises:
            ConfigError: they do not.
        """
        config, special = self.hf.config, self.special
        for name, model_id, token_id in (
            ("video_token_id", config.video_token_id, special.video_pad),
            ("image_token_id", config.image_token_id, special.image_pad),
        ):
            if model_id != token_id:
                raise ConfigError(f"{self.source}: the model's {name} is {model_id}, its tokenizer's {token_id}")
        if len(self.tokenizer) > config.text_config.vocab_size:
            tokens, vocabulary = len(self.tokenizer), config.text_config.vocab_size
            raise ConfigError(f"{self.source}: the tokenizer has {tokens} tokens, the model {vocabulary}")

    def _check_tower(self) -> None:
        """Check that the tower takes the patches that frames are cut into. Raises ConfigError."""
        tower, family = self.hf.config.vision_config, self.family
        sizes = {"patch_size": family.frames.patch_size, "spatial_merge_size": 2, "temporal_patch_size": 2}
        for name, size in sizes.items():
            if (given := getattr(tower, name)) != size:
                raise ConfigError(
                    f"{self.source}: its vision_config's {name} is {given}, expected {size} ({family.name})"
                )


def set_checkpointing(hf: Any, on: bool, layers: int | None = None) -> None:
    """Switch gradient checkpointing on or off; the methods' names differ between the supported transformers.

    Args:
        layers: how many of the language model's layers, the first ones, recompute their activations; default: all.
    """
    if hasattr(hf, "activation_checkpointing_enable"):
        hf.activation_checkpointing_enable({"use_reentrant": False}) if on else hf.activation_checkpointing_disable()
    elif on:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        hf.gradient_checkpointing_disable()
    if on and layers is not None:
        for layer in hf.model.language_model.layers[layers:]:
            layer.gradient_checkpointing = False
