"""What whole T-GRPO steps are measured on: data files of made videos or images, options, models of random weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from benchmarks.rollout_inputs import demo_model
from benchmarks.step_inputs import COMPARED_RULE, SHAPES, random_model
from benchmarks.video_files import made_video
from videor1.config import TrainConfig
from videor1.config.cli import parse
from videor1.data import load_samples
from videor1.model import VideoLM
from videor1.model.load import make_trainable
from videor1.types import Sample

SECONDS = 20  # of a made video
# Pixels of a frame for tiny: 16 frames and the question are then 1.5 times the 128 tokens of a completion. Video-R1's
# prompts of 1,224 tokens are about as much longer than its completions of 768.
TINY_PIXELS = 112 * 112
QUESTION = "What does the person put on the table after the cup, and which hand is used for it? "


@dataclass(frozen=True)
class Setting:
    """Sizes of a step. Every completion has ``completion`` tokens, from ordered and from shuffled frames alike."""

    model: str = "tiny"  # of rollout_inputs.MODELS
    media: Literal["video", "image"] = "video"
    frames: int = 16
    prompts: int = 4  # of one optimizer step
    generations: int = 8  # from ordered frames; half as many from shuffled ones
    completion: int = 64
    lora: int = 0  # rank; 0: everything is trained
    checkpointing: bool = False
    bf16: bool = False

    @property
    def shuffled(self) -> int:
        return self.generations // 2 if self.media == "video" else 0

    def described(self) -> dict[str, Any]:
        """As the table and the JSON file name it."""
        frames = {"frames": self.frames} if self.media == "video" else {"media": "image"}
        completions = f"{self.generations} + {self.shuffled}"
        trained = f"LoRA {self.lora}" if self.lora else "everything"
        return {
            "model": self.model,
            "prompts": self.prompts,
            **frames,
            "G": completions,
            "C": self.completion,
            "trained": trained,
            "dtype": "bfloat16" if self.bf16 else "float32",
        }


@dataclass(frozen=True, eq=False)
class WholeInputs:
    """A setting with its files."""

    setting: Setting
    device: torch.device
    folder: Path
    config: TrainConfig
    samples: tuple[Sample, ...]

    def make_model(self) -> VideoLM:
        """The same weights at each call, ready to train, as the trainer would load them; no token ends a completion."""
        setting = self.setting
        dtype = torch.bfloat16 if setting.bf16 and setting.lora else torch.float32
        if setting.model == "tiny":
            made = demo_model(dtype, self.device)
        else:
            made = random_model(dataclasses.replace(SHAPES[setting.model], dtype=dtype), self.device)
        model = VideoLM(
            made.hf,
            made.tokenizer,
            device=self.device,
            bf16=setting.bf16,
            source=setting.model,
            position_rule=COMPARED_RULE,
        )
        model.special = dataclasses.replace(model.special, eos=-1, pad=-1)
        make_trainable(model, self.config)
        return model


@contextlib.contextmanager
def whole_inputs(setting: Setting, device: torch.device) -> Iterator[WholeInputs]:
    """Write the files of a setting, which are deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="videor1-step-") as name:
        folder = Path(name)
        data = _write_data(setting, folder)
        config = parse(TrainConfig, _options(setting, device, folder, data), prog="benchmarks.step", description="")
        yield WholeInputs(setting, device, folder, config, tuple(load_samples(data).samples))


def spread(completions: list[str], samples: Sequence[Sample]) -> list[float]:
    """A reward of 0 or 1 by the text: completions of random weights are all wrong, which would leave no advantage."""
    return [float(zlib.crc32(text.encode()) % 2) for text in completions]


def _options(setting: Setting, device: torch.device, folder: Path, data: Path) -> list[str]:
    values: dict[str, Any] = {
        "compat": "video-r1",
        "model_name_or_path": "random",
        "dataset_name": data,
        "output_dir": folder / "run",
        "device": device,
        "bf16": setting.bf16,
        "max_steps": 10**6,
        "gradient_accumulation_steps": setting.prompts,  # one rollout of all, then a backward pass for each
        "num_generations": setting.generations,
        "max_completion_length": setting.completion,
        "rollout_batch_size": max(64, setting.prompts * (setting.generations + setting.shuffled)),
        "gradient_checkpointing": setting.checkpointing,
        "lora.rank": setting.lora,
        "lora.alpha": max(1, 2 * setting.lora),
        "freeze_vision": bool(setting.lora),
        "temporal.enabled": setting.media == "video",
        "temporal.skip_shuffled": False,  # all completions of random weights are wrong: all would be left out
        "reward.functions": f"{__name__}:{spread.__name__}",
        "video.max_frames": setting.frames,
        "video.fps": max(2.0, 1.01 * setting.frames / SECONDS),
        "data.cache_mb": 0,  # every video is decoded in every step
        "save_steps": 0,
        "disable_tqdm": True,
    }
    if setting.model == "tiny":
        sides = ("video.max_pixels", "video.min_pixels", "video.image_max_pixels", "video.image_min_pixels")
        values |= dict.fromkeys(sides, TINY_PIXELS)
    return [text for name, value in values.items() for text in (f"--{name}", str(value).replace("True", "true"))]


def _write_data(setting: Setting, folder: Path) -> Path:
    """A data file whose samples have files of their own: nothing that is shared between two of them is saved."""
    source = _source(setting)
    question = QUESTION * (1 if setting.model == "tiny" else 6)
    entries = []
    for number in range(max(16, 2 * setting.prompts)):
        path = folder / f"{number}{source.suffix}"
        shutil.copy(source, path)
        entries.append(
            {
                "problem_id": number,
                "problem": question,
                "data_type": setting.media,
                "problem_type": "free-form",
                "solution": "<answer>a book, with the left hand</answer>",
                "path": path.name,
                "data_source": "made",
            }
        )
    data = folder / "data.json"
    data.write_text(json.dumps(entries))
    return data


@functools.cache
def _source(setting: Setting) -> Path:
    height = 120 if setting.model == "tiny" else 360
    video = made_video(height, SECONDS, gop=48, rate=24)
    if setting.media == "video":
        return video
    picture = video.with_suffix(".png")
    pixels = np.random.default_rng(0).integers(0, 256, (height, height * 16 // 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    return picture
