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
from transformers import AttentionInterface, AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from videor1.config import TrainConfig
from videor1.demo import DEFAULT
from videor1.demo.model import make_config
from videor1.demo.tokenizer import make_tokenizer
from videor1.errors import ConfigError
from videor1.model import VideoLM
from videor1.model.families import family_of
from videor1.model.load import make_trainable
from videor1.model.positions import POSITIONS_KEY, PositionRule, trained_rule
from videor1.model.prompts import VIDEO, expand_media, special_ids
from videor1.model.weights import check_config
from videor1.plan.published import PUBLISHED, published
from videor1.training.passes import Packed, pack
from videor1.types import Media, Prompt, Sample
from videor1.video import QWEN2_RULES, FrameRules
from videor1.video.patches import num_media_tokens
from videor1_kernels import plan_rows
from videor1_kernels.frames_to_patches import patch_columns

TEXT_TOKENS = 200  # text tokens of a prompt: the chat template, the question with its options, the instruction
LONGEST_SECONDS = 7200.0  # longest video; its duration sets the largest position and so the size of rotary tables
FRAMES = ((1080, 1920), (1920, 1080), (480, 640), (240, 320), (720, 720))  # usual frame sizes (height, width)
_SAMPLE = Sample(0, "0", "", "video", "free-form", "<answer></answer>", Path("video.mp4"))


def shape_of(source: str | None, demo: str | None = None) -> Any:
    """Return the configuration of a model.

    Args:
        source: a folder or hub id, of which only config.json is read; a name in ``PUBLISHED``, for which nothing is
            read; or None for the demonstration's model.
        demo: the option of that name, the family of the demonstration's model.

    Raises:
        ConfigError: there is no such model, or it is of no family, or quantised.
    """
    if source is None:
        return make_config(make_tokenizer(demo or DEFAULT), demo or DEFAULT)
    if (made := published(source)) is not None and not Path(source).is_dir():
        return made
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # A damaged config raises whatever its class meets first.
        raise ConfigError(
            f"model_name_or_path: {source!r}: no config.json can be read ({str(error).splitlines()[0]}); a plan takes "
            f"a folder that holds one, a hub id, or one of {', '.join(PUBLISHED)}"
        ) from error
    family_of(config.model_type, source)
    check_config(source, config)
    return config


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


def build_policy(shape: Any, config: TrainConfig, target: Target, device: torch.device | str) -> VideoLM:
    """Return the model as :func:`~videor1.model.load_model` does, with random weights or, on ``meta``, without any."""
    dtype = torch.bfloat16 if target.bf16 and config.lora.rank else torch.float32
    model = _wrap(shape, dtype, target.bf16, device, config.model.positions)
    with torch.device(device):
        make_trainable(model, config)
    return model


def build_reference(shape: Any, config: TrainConfig, target: Target, device: torch.device | str) -> VideoLM | None:
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
    shape: Any, dtype: torch.dtype, bf16: bool, device: torch.device | str, chosen: PositionRule | None
) -> VideoLM:
    kind = family_of(shape.model_type)
    tokenizer = make_tokenizer(kind.model_type)
    config, ids = type(shape).from_dict(shape.to_dict()), special_ids(tokenizer)
    # The demonstration's tokenizer stands for the model's own, so the model gets its token ids.
    config.video_token_id, config.image_token_id = ids.video_pad, ids.image_pad
    with torch.device(device):
        model_class = kind.transformers_class()
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
        return sum(num_media_tokens(media.grid_thw) for media in self.prompts[0].all_media)


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
    ids = _prompt_ids(model, grid, text_tokens)
    length, longest, media_tokens = len(ids), config.max_prompt_length, num_media_tokens(grid)
    if config.max_tokens_per_row is not None:
        longest = min(longest, config.max_tokens_per_row - config.max_completion_length)
    if length > longest:
        raise ConfigError(
            f"--plan: a prompt of {media_tokens} video tokens (video.max_frames, video.max_pixels) and "
            f"{length - media_tokens} of text is longer than the {longest} that max_prompt_length and "
            "max_tokens_per_row let through"
        )
    seconds = LONGEST_SECONDS / grid[0]
    count = config.per_device_train_batch_size * config.gradient_accumulation_steps
    prompts = tuple(
        Prompt(
            _SAMPLE,
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


def _prompt_ids(model: VideoLM, grid: tuple[int, int, int], text_tokens: int) -> Tensor:
    """Return the ids of a prompt with a video, and with its times where the family writes them as text."""
    T, text = grid[0], VIDEO
    times = tuple(LONGEST_SECONDS * (t + 0.5) / T for t in range(T))
    media = Media("video", torch.empty(0), grid, LONGEST_SECONDS / T, 0.0, times=times)
    if model.family.video_text is not None:  # Its words are in the tokenizer.
        text = model.family.video_text(media, VIDEO)
    special, before = model.special, text_tokens // 2 - 1
    video = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [5] * before + video + [5] * (text_tokens - 2 - before)  # 2: the start and the end of one video
    return expand_media(special, ids, _SAMPLE, media, max_prompt_length=len(ids) + num_media_tokens(grid))


def largest_grid(config: TrainConfig, rules: FrameRules = QWEN2_RULES) -> tuple[int, int, int]:
    """Return the grid (T, h, w) in patches of the longest video, at the usual frame size with the most patches."""
    video = config.video
    limits = rules.limits(video.min_pixels, video.max_pixels, video.total_pixels)
    sizes = [rules.video_size(video.max_frames, *frame, limits, rules.block) for frame in FRAMES]
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    return video.max_frames // 2, height // rules.patch_size, width // rules.patch_size
