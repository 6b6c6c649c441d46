"""Build the inputs of a memory plan: a model of the real sizes without weights, and the prompts of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoConfig, Qwen2_5_VLConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from videor1.config import TrainConfig
from videor1.demo.model import make_config
from videor1.demo.tokenizer import make_tokenizer
from videor1.errors import ConfigError
from videor1.model import VideoLM
from videor1.model.families import QWEN2_5_VL, family_of
from videor1.model.load import make_trainable
from videor1.model.positions import POSITIONS_KEY, PositionRule, trained_rule
from videor1.model.prompts import special_ids
from videor1.model.weights import check_config
from videor1.training.passes import Packed, pack
from videor1.types import Media, Prompt, Sample
from videor1.video import QWEN2_RULES, FrameRules
from videor1.video.patches import num_media_tokens
from videor1_kernels import plan_rows
from videor1_kernels.frames_to_patches import patch_columns

TEXT_TOKENS = 200  # text tokens of a prompt: the chat template, the question with its options, the instruction
LONGEST_SECONDS = 7200.0  # longest video; its duration sets the largest position and so the size of rotary tables
FRAMES = ((1080, 1920), (1920, 1080), (480, 640), (240, 320), (720, 720))  # usual frame sizes (height, width)

# (hidden size, layers, heads, key heads, intermediate size, vocabulary, whether the head is tied to the embedding)
SIZES = {"3b": (2048, 36, 16, 2, 11008, 151936, True), "7b": (3584, 28, 28, 4, 18944, 152064, False)}
KNOWN = {"Qwen/Qwen2.5-VL-3B-Instruct": "3b", "Qwen/Qwen2.5-VL-7B-Instruct": "7b"}


def shape_of(source: str | None) -> Qwen2_5_VLConfig:
    """Return the configuration of a model.

    Args:
        source: a folder or hub id, of which only config.json is read; ``3b`` or ``7b`` or their published names, for
            which nothing is read; or None for the demonstration's model.

    Raises:
        ConfigError: there is no such model, or it is not a Qwen2.5-VL, or quantised.
    """
    if source is None:
        return make_config(make_tokenizer())
    name = KNOWN.get(source, source.lower())
    if name in SIZES and not Path(source).is_dir():
        return _qwen(*SIZES[name])
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # A damaged config raises whatever its class meets first.
        raise ConfigError(
            f"model_name_or_path: {source!r}: no config.json can be read ({str(error).splitlines()[0]}); a plan takes "
            f"a folder that holds one, a hub id, or one of {', '.join([*SIZES, *KNOWN])}"
        ) from error
    family = family_of(config.model_type, source)
    if family.model_type != QWEN2_5_VL.model_type:
        raise ConfigError(f"--plan: {source!r} is a {family.name}; what such a model takes is not planned yet")
    check_config(source, config)
    return config


def _qwen(
    hidden: int, layers: int, heads: int, key_heads: int, intermediate: int, vocabulary: int, tied: bool
) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "max_position_embeddings": 128000,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
            "tokens_per_second": 2,
        },
        tie_word_embeddings=tied,
    )


@dataclass(frozen=True)
class Target:
    """The kind of device that is planned for, and the precision that the trainer would use on it."""

    cuda: bool
    bf16: bool

    @staticmethod
    def of(config: TrainConfig) -> Target:
        """Return the target of a run: a GPU unless ``device`` is cpu, whether or not this machine has a GPU."""
        cuda = config.device != "cpu"
        return Target(cuda, cuda if config.bf16 is None else config.bf16)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the passes."""
        return torch.bfloat16 if self.bf16 else torch.float32


def build_policy(shape: Qwen2_5_VLConfig, config: TrainConfig, target: Target, device: torch.device | str) -> VideoLM:
    """Return the model as :func:`~videor1.model.load_model` does, with random weights or, on ``meta``, without any."""
    dtype = torch.bfloat16 if target.bf16 and config.lora.rank else torch.float32
    model = _wrap(shape, dtype, target.bf16, device, config.model.positions)
    with torch.device(device):
        make_trainable(model, config)
    return model


def build_reference(
    shape: Qwen2_5_VLConfig, config: TrainConfig, target: Target, device: torch.device | str
) -> VideoLM | None:
    """Return the frozen copy of the model for the KL term; None if there is no KL term, or LoRA needs no copy."""
    if not config.beta or config.lora.rank:
        return None
    model = _wrap(shape, target.compute_dtype, False, device, config.model.positions)
    model.hf.requires_grad_(False)
    return model


def make_fake(model: VideoLM, mode: FakeTensorMode) -> None:
    """Replace the meta tensors of a model by fake tensors of a CPU, because autocast does not work on meta tensors."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                empty = torch.empty_like(tensor, device="cpu")
            kind = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if kind else empty
        return made[id(tensor)]

    for module in model.hf.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is not None:
                    slots[name] = fake(tensor)
    model.device = torch.device("cpu")
    AttentionInterface.register(_WINDOWS, _window_attention)
    model.visual.set_attn_implementation(_WINDOWS)


_WINDOWS = "videor1_plan"


def _window_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    """Compute transformers' sdpa attention, or without gradients only allocate its result.

    The vision tower calls this once for each window, thousands of times in a pass. Without gradients, only the result
    stays allocated.
    """
    if torch.is_grad_enabled():
        return sdpa_attention_forward(module, query, key, value, *args, **options)
    _, heads, tokens, width = query.shape
    return query.new_empty(1, tokens, heads, width), None


def _wrap(
    shape: Qwen2_5_VLConfig, dtype: torch.dtype, bf16: bool, device: torch.device | str, chosen: PositionRule | None
) -> VideoLM:
    tokenizer = make_tokenizer()
    config, ids = type(shape).from_dict(shape.to_dict()), special_ids(tokenizer)
    # The demonstration's tokenizer stands for the model's own, so the model gets its token ids.
    config.video_token_id, config.image_token_id = ids.video_pad, ids.image_pad
    with torch.device(device):
        model_class = family_of(config.model_type).transformers_class()
        hf = model_class._from_config(config, dtype=dtype, attn_implementation="sdpa")
    rule = chosen or trained_rule("plan", getattr(shape, POSITIONS_KEY, None)) or "paper"
    return VideoLM(hf, tokenizer, device=device, bf16=bf16, source="plan", position_rule=rule)


@dataclass(frozen=True)
class Work:
    """The work of one optimizer step: its prompts, and the longest of its packed rows."""

    prompts: tuple[Prompt, ...]
    row: Packed  # the longest row
    row_groups: tuple[int, ...]  # indices of the prompts in that row
    rows: int  # number of packed rows
    batch_tokens: int  # tokens of all completions

    @property
    def prompt_tokens(self) -> int:
        """The tokens of a prompt."""
        return len(self.prompts[0].input_ids)

    @property
    def media_tokens(self) -> int:
        """The tokens of a prompt that stand for its video."""
        media = self.prompts[0].media
        return 0 if media is None else num_media_tokens(media.grid_thw)


def make_work(
    config: TrainConfig, model: VideoLM, patches: Callable[[int, int], Tensor], text_tokens: int = TEXT_TOKENS
) -> Work:
    """Return the largest usual work of a step.

    Every video has ``video.max_frames`` frames over two hours, at the usual frame size that gives the most patches.
    Every completion has ``max_completion_length`` tokens.

    Args:
        config: the options of the run.
        model: the model, whose token ids and positions the packed row uses.
        patches: makes a uint8 tensor [n, columns] of n patches.
        text_tokens: text tokens of a prompt.

    Raises:
        ConfigError: the options reject prompts of that length.
    """
    rules = model.family.frames
    grid = largest_grid(config, rules)
    media_tokens = num_media_tokens(grid)
    length, longest = text_tokens + media_tokens, config.max_prompt_length
    if config.max_tokens_per_row is not None:
        longest = min(longest, config.max_tokens_per_row - config.max_completion_length)
    if length > longest:
        raise ConfigError(
            f"--plan: a prompt of {media_tokens} video tokens (video.max_frames, video.max_pixels) and {text_tokens} "
            f"of text is longer than the {longest} that max_prompt_length and max_tokens_per_row let through"
        )
    ids = torch.full((length,), 5)
    before = text_tokens // 2
    ids[before : before + media_tokens] = model.special.video_pad
    sample = Sample(0, "0", "", "video", "free-form", "<answer></answer>", Path("video.mp4"))
    seconds = LONGEST_SECONDS / grid[0]
    count = config.per_device_train_batch_size * config.gradient_accumulation_steps
    prompts = tuple(
        Prompt(
            sample,
            ids,
            Media("video", patches(math.prod(grid), patch_columns(rules.patch_size)), grid, seconds, 0.0),
            draw,
        )
        for draw in range(count)
    )
    completion_lengths = [config.max_completion_length] * config.num_generations
    groups = config.per_device_train_batch_size
    rows = plan_rows([length] * groups, [completion_lengths] * groups, config.max_tokens_per_row)

    def tokens(row: list[Any]) -> int:
        return sum(length + len(part.completions) * config.max_completion_length for part in row)

    longest_row = max(rows, key=tokens)
    completion = torch.full((config.max_completion_length,), 5)
    row = pack(model, [prompts[p.group] for p in longest_row], [[completion] * len(p.completions) for p in longest_row])
    return Work(
        prompts,
        row,
        tuple(p.group for p in longest_row),
        len(rows) * config.gradient_accumulation_steps,
        count * sum(completion_lengths),
    )


def largest_grid(config: TrainConfig, rules: FrameRules = QWEN2_RULES) -> tuple[int, int, int]:
    """Return the grid (T, h, w) in patches of the longest video, at the usual frame size with the most patches."""
    video = config.video
    limits = rules.limits(video.min_pixels, video.max_pixels, video.total_pixels)
    sizes = [rules.video_size(video.max_frames, *frame, limits, rules.block) for frame in FRAMES]
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    return video.max_frames // 2, height // rules.patch_size, width // rules.patch_size
