"""Qwen2.5-VL as the trainer sees it: vision features of a prompt, hidden states of a packed row, and the head's weight.

The classes are transformers' own, unpatched. The language model runs with the attention ``videor1_prefix``; what a
pass attends to is told by its context (``videor1_kernels.integrations.transformers``).
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from videor1.config import CommonConfig, LoraConfig, ModelConfig
from videor1.errors import ConfigError, install
from videor1.liger import use_liger
from videor1.patches import normalize_patches
from videor1.positions import RECORD, PositionRule, prompt_positions, trained_rule
from videor1.prompts import SpecialIds, special_ids
from videor1.seeding import derive_seed
from videor1.types import Media, Prompt
from videor1_kernels.checks import check_choice
from videor1_kernels.integrations import transformers as attention


class VideoLM:
    """A Qwen2.5-VL with its tokenizer, on one device.

    Attributes:
        hf: ``Qwen2_5_VLForConditionalGeneration``, adapters inside where LoRA is on.
        peft: the peft wrapper, or None.
        tokenizer, special: the tokenizer and its special ids.
        compute_dtype: bf16 under autocast, or the parameters' own dtype.
        position_rule: where text after media goes on, see :mod:`videor1.positions`.
    """

    def __init__(
        self,
        hf: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Any,
        *,
        device: torch.device | str = "cpu",
        bf16: bool = False,
        source: str = "",
        position_rule: PositionRule = "paper",
    ) -> None:
        self.hf = hf.to(device)
        self.peft: Any = None
        self.flash = False  # prompts of a rollout by flash-attn
        self.tokenizer = tokenizer
        self.special: SpecialIds = special_ids(tokenizer)
        self.device = torch.device(device)
        self.bf16 = bf16
        self.source = source
        check_choice("VideoLM", "position_rule", position_rule, get_args(PositionRule))
        self.position_rule: PositionRule = position_rule
        self.compute_dtype = torch.bfloat16 if bf16 else next(hf.parameters()).dtype
        hf.model.language_model.set_attn_implementation(attention.register())
        self._vocabulary_check()

    @property
    def visual(self) -> Any:
        return self.hf.model.visual

    @property
    def head_weight(self) -> Tensor:
        """[V, H] in the compute dtype."""
        return self.hf.lm_head.weight.to(self.compute_dtype)

    def vision_features(self, media: Sequence[Media], patches: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Features [tokens, H] of each media in one pass of the vision tower.

        ``patches`` (8-bit, one per media) replace the media's own, e.g. with frames shuffled.
        """
        if not media:
            return []
        pixels = torch.cat([m.patches for m in media] if patches is None else list(patches)).to(self.device)
        grid = torch.tensor([m.grid_thw for m in media], device=self.device)
        with self.autocast():
            tower = self.visual(normalize_patches(pixels, self.compute_dtype), grid_thw=grid)
        merge = self.visual.spatial_merge_size**2
        return list(tower.pooler_output.split([m.grid_thw[0] * m.grid_thw[1] * m.grid_thw[2] // merge for m in media]))

    def positions(self, prompt: Prompt) -> tuple[Tensor, int]:
        """M-RoPE positions [3, P] of a prompt and the position of the first answer token."""
        vision = self.hf.config.vision_config
        return prompt_positions(
            prompt,
            self._media_token(prompt.media),
            tokens_per_second=vision.tokens_per_second,
            merge=vision.spatial_merge_size,
            rule=self.position_rule,
        )

    def hidden_states(
        self,
        ids: Tensor,
        positions: Tensor,
        context: attention.AttentionContext,
        features: Sequence[Tensor] = (),
    ) -> Tensor:
        """Last hidden states [T, H] of one packed row, in the compute dtype.

        Args:
            ids: int64 [T].
            positions: int64 [3, 1, T], of time, height and width.
            context: what the row attends to.
            features: of the row's media, in the row's order; they take the places of its media tokens.
        """
        embeds = self.hf.get_input_embeddings()(ids.to(self.device))
        if features:
            pads = torch.tensor([self.special.video_pad, self.special.image_pad], device=self.device)
            at = torch.isin(ids.to(self.device), pads)[:, None]
            values = torch.cat(list(features)).to(embeds.dtype)
            assert int(at.sum()) == len(values), (int(at.sum()), len(values))
            embeds = embeds.masked_scatter(at, values)
        with self.autocast():
            output = self.hf.model.language_model(
                inputs_embeds=embeds[None],
                position_ids=positions.to(self.device),
                use_cache=False,
                videor1_context=context,
            )
        return output.last_hidden_state[0].to(self.compute_dtype)  # the last norm gives fp32 under autocast

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def exactly(self) -> contextlib.AbstractContextManager[Any]:
        """In the dtypes of the operands, inside :meth:`autocast` too."""
        return torch.autocast(self.device.type, enabled=False) if self.bf16 else contextlib.nullcontext()

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients, and dropout and checkpointing off."""
        was_training = self.hf.training
        self.hf.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.hf.train(was_training)

    @contextlib.contextmanager
    def as_reference(self, frozen: VideoLM | None) -> Iterator[VideoLM]:
        """The reference policy: the frozen copy, or this model with its adapters off."""
        if frozen is None and self.peft is None:
            raise ValueError("a reference policy needs a frozen copy, or LoRA adapters to switch off")
        model = frozen or self
        with model.inference(), contextlib.nullcontext() if frozen else self.peft.disable_adapter():
            yield model

    def frozen_copy(self) -> VideoLM:
        """A copy for the KL term, in the compute dtype, without gradients."""
        hf = copy.deepcopy(self.hf).to(self.compute_dtype).requires_grad_(False)
        set_checkpointing(hf, False)
        return VideoLM(hf, self.tokenizer, device=self.device, source=self.source, position_rule=self.position_rule)

    def add_lora(self, config: LoraConfig, seed: int) -> None:
        """Wrap the language model's linear layers in adapters; nothing else stays trainable."""
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model

        names = "|".join(config.target_modules)
        options = PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=rf".*language_model.*\.({names})",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(derive_seed(seed, "lora"))
            # peft asks for it by the name that newer transformers call is_activation_checkpointing.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            try:
                self.peft = get_peft_model(self.hf, options)
            except ValueError as error:
                raise ConfigError(f"lora.target_modules: {config.target_modules}: {error}") from error

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in the model's order."""
        return {name: p for name, p in self.hf.named_parameters() if p.requires_grad}

    def _media_token(self, media: Media | None) -> int | None:
        if media is None:
            return None
        return self.special.video_pad if media.kind == "video" else self.special.image_pad

    def _vocabulary_check(self) -> None:
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


def load_model(config: CommonConfig) -> VideoLM:
    """The model that the options name, ready to train: dtype, device, freezing, adapters, gradient checkpointing."""
    source = config.model_name_or_path
    if not source:
        raise ConfigError("model_name_or_path: expected a Qwen2.5-VL folder or hub id, got nothing")
    if not Path(source).is_dir() and (source.count("/") != 1 or source[0] in "./~"):
        raise ConfigError(f"model_name_or_path: there is no folder {source!r}, and a hub id is of the form owner/name")
    device = pick_device(config.device)
    bf16 = device.type == "cuda" if config.bf16 is None else config.bf16
    transformers_logging.disable_progress_bar()  # the run's own bar is enough
    # Trained weights are kept in fp32, bf16 runs compute under autocast; weights that only carry adapters need not be,
    # and ZeRO keeps fp32 copies itself.
    zero = config.distributed.engine == "deepspeed"
    hf, tokenizer = _from_pretrained(source, torch.bfloat16 if bf16 and (config.lora.rank or zero) else torch.float32)
    _use_libraries(hf, config.model, device)
    rule = config.model.positions or trained_rule(source, getattr(hf.config, RECORD, None)) or "paper"
    model = VideoLM(hf, tokenizer, device=device, bf16=bf16 and not zero, source=source, position_rule=rule)
    model.flash = config.model.attention == "flash_attention_2"
    make_trainable(model, config)
    if not model.trainable():
        raise ConfigError("no parameter is left to train")
    return model


def make_trainable(model: VideoLM, config: CommonConfig) -> None:
    """What the options freeze, adapt and recompute."""
    if config.freeze_vision:
        model.visual.requires_grad_(False)
    if config.lora.rank:
        model.add_lora(config.lora, config.seed)
    if config.gradient_checkpointing:
        set_checkpointing(model.hf, True)
    model.hf.train()


def _use_libraries(hf: Any, options: ModelConfig, device: torch.device) -> None:
    """Attention of the tower by flash-attn, and Liger's kernels, where they are asked for."""
    if device.type == "cpu" and (options.liger or options.attention != "sdpa"):
        raise ConfigError("model.liger, model.attention flash_attention_2: they run on a GPU, and this run is on a CPU")
    if options.attention == "flash_attention_2":
        try:
            hf.model.visual.set_attn_implementation("flash_attention_2")
        except (ImportError, ValueError) as error:
            raise ConfigError(f"model.attention: {error}; {install('flash-attn')}") from error
    if options.liger:
        use_liger(hf)


def set_checkpointing(hf: Any, on: bool) -> None:
    """Switch gradient checkpointing; the method's name differs between the supported transformers."""
    if hasattr(hf, "activation_checkpointing_enable"):
        hf.activation_checkpointing_enable({"use_reentrant": False}) if on else hf.activation_checkpointing_disable()
    elif on:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        hf.gradient_checkpointing_disable()


def pick_device(name: str) -> torch.device:
    """``auto`` takes the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # no device that is asked for
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise ConfigError(f"device: {name!r} asked for; number of GPUs that torch {torch.__version__} sees: {seen}")
    return device


def _from_pretrained(source: str, dtype: torch.dtype) -> tuple[Qwen2_5_VLForConditionalGeneration, Any]:
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model_name_or_path: cannot load {source!r}: {error}") from error
    if config.model_type != "qwen2_5_vl":
        raise ConfigError(f"model_name_or_path: expected a qwen2_5_vl model, {source!r} is {config.model_type!r}")
    try:
        hf, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, SafetensorError) as error:  # damaged files raise what they like
        raise ConfigError(f"model_name_or_path: cannot load {source!r}: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            names = sorted(map(str, report[problem]))
            kind = problem.replace("_", " ")
            raise ConfigError(f"{source}: {kind} in its weights: {names[:5]} ({len(names)} in all)")
    return hf, tokenizer


PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def processor_files(source: str) -> dict[str, str]:
    """Contents of the processor's JSON files beside a model, to be written with every checkpoint."""
    from transformers.utils import cached_file

    files = {}
    for name in PROCESSOR_FILES:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            files[name] = Path(path).read_text(encoding="utf-8")
    return files
