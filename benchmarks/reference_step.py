"""A T-GRPO step as the reference code computes it: one prompt after the other, its completions by transformers'
``generate`` in rows that repeat it, each row through the whole model again, padded, with the logits of all positions.

Written from the algorithm, on the same model, data, options and lengths of completions as ours. Where the code could be
read either way it is taken at its fastest: the frames are decoded once for both orders, completions are generated with
a KV cache and without checkpointing, the optimizer steps once for all prompts. The rows of ``generate`` are repeated
before it, with their pixels, as ``generate`` repeated them when that code was written; today it encodes them first.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig

from benchmarks.phases import Phases
from benchmarks.repeated_rows import RepeatedRows
from benchmarks.whole_inputs import WholeInputs
from videor1.model.prompts import build_input_ids
from videor1.rewards import accuracy_reward, score
from videor1.training.optim import guarded_step, make_optimizer
from videor1.training.passes import Packed, pack
from videor1.types import Media, Prompt, Sample
from videor1.video import read_image, sample_indices, smart_resize, video_pixel_cap
from videor1.video.shuffle import draw_permutation
from videor1_kernels.frames_to_patches.reference import MEAN, STD


@dataclass(frozen=True)
class Update:
    """What became of a prompt's completions, which the gate compares with ours."""

    packed: Packed
    advantages: Tensor  # [G]
    rewards: tuple[Tensor, Tensor, Tensor]  # accuracy [G], format [G], shuffled accuracy [Gs]
    logp: Tensor  # [N]
    ref_logp: Tensor | None
    loss: float


class ReferenceStep:
    """Call it for an optimizer step; ``updates`` are the last one's."""

    def __init__(self, inputs: WholeInputs, phases: Phases) -> None:
        self.inputs, self.phases, self.config = inputs, phases, inputs.config
        self.model = inputs.make_model()
        self.frozen = self.model.frozen_copy() if self.config.beta and not self.config.lora.rank else None
        self.optimizer = make_optimizer(self.model.trainable(), self.config)
        self.rows = RepeatedRows(self.model)
        self.reference = RepeatedRows(self.frozen) if self.frozen else self.rows
        self.samples: Iterator[tuple[int, Sample]] = enumerate(itertools.cycle(inputs.samples))
        self.updates: list[Update] = []
        self.rows.hf.model.language_model.register_forward_hook(self._after_prefill)

    def __call__(self) -> None:
        self.updates = [self._prompt(draw, sample) for draw, sample in self._next()]
        with self.phases("optimizer"):
            guarded_step(self.optimizer, self.model.trainable(), self.config.learning_rate, self.config.max_grad_norm)

    def first_prompt(self) -> Prompt:
        """The first prompt of the last step."""
        return self.updates[0].packed.prompts[0]

    def close(self) -> None:
        """Nothing is open."""

    def _next(self) -> list[tuple[int, Sample]]:
        return list(itertools.islice(self.samples, self.inputs.setting.prompts))

    def prompt_of(self, sample: Sample, draw: int = 0) -> tuple[Prompt, Media | None]:
        """The prompt with its frames in order, and the frames shuffled."""
        with self.phases("decode"):
            ordered, shuffled = self._read(sample, draw)
        limit = self.config.max_prompt_length
        ids = build_input_ids(self.model.tokenizer, sample, ordered, max_prompt_length=limit)
        return Prompt(sample, ids, ordered, draw), shuffled

    def _prompt(self, draw: int, sample: Sample) -> Update:
        config, model, setting = self.config, self.model, self.inputs.setting
        prompt, shuffled = self.prompt_of(sample, draw)
        with self.phases("prefill"):  # the hook says when it becomes the rollout
            completions = self._generate(prompt, prompt.media, setting.generations)
        others: list[Tensor] = []
        if shuffled is not None:
            with self.phases("prefill"):
                others = self._generate(prompt, shuffled, setting.shuffled)
        packed = pack(model, [prompt], [completions])
        with self.phases("policy"):
            logp = self.rows.logp(packed, temperature=config.temperature)
        ref_logp = None
        if config.beta:
            with self.phases("reference"):
                ref_logp = self._reference_logp(packed)
        with self.phases("rewards"):
            rewards = self._rewards(sample, completions, others)
            advantages = self._advantages(*rewards, lengths=[len(ids) for ids in completions]).to(logp.device)
        with self.phases("policy"):
            loss = self._loss(logp, ref_logp, advantages) / setting.prompts
            loss.backward()
        return Update(packed, advantages, rewards, logp.detach(), ref_logp, float(loss.detach()) * setting.prompts)

    def _read(self, sample: Sample, draw: int) -> tuple[Media, Media | None]:
        """Pixel values as the processor gives them, from frames in order and from shuffled ones."""
        video = self.config.video
        assert sample.path is not None
        if sample.data_type == "image":
            clip = read_image(sample.path, max_pixels=video.image_max_pixels, min_pixels=video.image_min_pixels)
            assert isinstance(clip.frames, Tensor)
            return _processed(_resized(clip.frames, clip.size), "image", 0.0), None
        frames, fps = _decoded(str(sample.path), video.max_frames, video.fps)
        least = video.max_pixels if video.min_pixels is None else video.min_pixels
        most = video_pixel_cap(least, video.max_pixels)
        frames = _resized(frames, smart_resize(*frames.shape[1:3], min_pixels=least, max_pixels=most))
        ordered = _processed(frames, "video", 2 / fps)
        order = draw_permutation(Prompt(sample, torch.empty(0), ordered, draw), "frame", self.config.seed)
        return ordered, _processed(frames[list(order)], "video", 2 / fps) if order else None

    def _generate(self, prompt: Prompt, media: Media | None, number: int) -> list[Tensor]:
        assert media is not None
        config, device, hf = self.config, self.model.device, self.rows.hf
        new = config.max_completion_length
        ids = prompt.input_ids.to(device).expand(number, -1)
        kind = 2 if media.kind == "video" else 1
        pads = self.model.special.video_pad if media.kind == "video" else self.model.special.image_pad
        pixels = {"video": "pixel_values_videos", "image": "pixel_values"}[media.kind]
        arguments = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": kind * (ids == pads).long(),
            pixels: media.patches.to(device, self.model.compute_dtype).repeat(number, 1),
            f"{media.kind}_grid_thw": torch.tensor([media.grid_thw] * number, device=device),
        }
        if media.kind == "video":
            arguments["second_per_grid_ts"] = torch.tensor([media.second_per_grid] * number)
        options = GenerationConfig(
            do_sample=True,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=new,
            min_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=list(self.model.special.vision),
        )
        hf.eval()  # in training mode checkpointing would switch the KV cache off
        with torch.no_grad(), self.model.autocast():
            rows = hf.generate(**arguments, generation_config=options)
        return list(rows[:, ids.shape[1] :].cpu())

    def _after_prefill(self, _module: Any, _arguments: Any, output: Any) -> None:
        if self.phases.current == "prefill" and output.last_hidden_state.shape[1] > 1:
            self.phases.become("rollout")

    def _reference_logp(self, packed: Packed) -> Tensor:
        with torch.no_grad():
            if self.frozen is not None:
                return self.reference.logp(packed, temperature=self.config.temperature)
            with self.rows.peft.disable_adapter():
                return self.rows.logp(packed, temperature=self.config.temperature)

    def _rewards(
        self, sample: Sample, completions: list[Tensor], others: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        decode = self.model.tokenizer.batch_decode
        texts = decode([completion.tolist() for completion in completions], skip_special_tokens=True)
        accuracy, form = score(texts, [sample] * len(texts), self.config.reward)
        shuffled = [
            accuracy_reward(text, sample.solution, sample.problem_type)
            for text in decode([other.tolist() for other in others], skip_special_tokens=True)
        ]
        return torch.tensor(accuracy), torch.tensor(form), torch.tensor(shuffled)

    def _advantages(self, accuracy: Tensor, form: Tensor, shuffled: Tensor, *, lengths: list[int]) -> Tensor:
        config, reward = self.config, self.config.reward
        total, right = accuracy + form, accuracy > reward.correct_above
        if len(shuffled) and accuracy.mean() >= config.temporal.mu * shuffled.mean():
            total = total + config.temporal.alpha * right
        if right.sum() > 1:
            low, high = reward.length_range
            total = total + reward.length_bonus * (right & torch.tensor([low <= n <= high for n in lengths]))
        return (total - total.mean()) / (total.std() + config.advantage_eps)

    def _loss(self, logp: Tensor, ref_logp: Tensor | None, advantages: Tensor) -> Tensor:
        """All completions are of one length: a mean over their tokens, then over them."""
        own = logp.unflatten(0, (len(advantages), -1))
        tokens = (own - own.detach()).exp() * advantages[:, None]
        if ref_logp is not None:
            x = (ref_logp.view_as(own) - own).clamp(-self.config.kl_clamp, self.config.kl_clamp)
            tokens = tokens - self.config.beta * (x.exp() - x - 1)
        return -tokens.mean(1).mean()


def as_8_bit(media: Media) -> Media:
    """Pixel values back as the 8-bit patches that our passes take."""
    mean, std = (torch.tensor(values).repeat_interleave(media.patches.shape[1] // 3) for values in (MEAN, STD))
    pixels = (media.patches.float() * std + mean) * 255
    return dataclasses.replace(media, patches=pixels.round().to(torch.uint8))


def _decoded(path: str, max_frames: int, fps: float) -> tuple[Tensor, float]:
    """uint8 RGB [F, H, W, 3] of the sampled frames by decord, or by PyAV where it is missing; frames a second."""
    try:
        import decord
    except ImportError:
        return _decoded_by_pyav(path, max_frames, fps)
    reader = decord.VideoReader(path)
    total, rate = len(reader), float(reader.get_avg_fps())
    indices = sample_indices(total, rate, max_frames=max_frames, fps=fps)
    return torch.from_numpy(reader.get_batch(indices).asnumpy()), len(indices) / total * rate


def _decoded_by_pyav(path: str, max_frames: int, fps: float) -> tuple[Tensor, float]:
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames = list(container.decode(stream))
        rate = float(stream.average_rate or 1)
    indices = sample_indices(len(frames), rate, max_frames=max_frames, fps=fps)
    pixels = [torch.from_numpy(frames[i].to_ndarray(format="rgb24")) for i in indices]
    return torch.stack(pixels), len(indices) / len(frames) * rate


def _resized(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [F, 3, height, width], as torchvision resizes a tensor."""
    pixels = F.interpolate(frames.permute(0, 3, 1, 2).float(), size, mode="bicubic", antialias=True)
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _processed(frames: Tensor, kind: Any, seconds: float) -> Media:
    """Normalised fp32 patches, frame by frame through the processor's chain."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = (frames.float() / 255 - mean) / std
    if len(pixels) % 2:
        pixels = torch.cat([pixels, pixels[-1:]])
    T, (h, w) = len(pixels) // 2, (side // 14 for side in pixels.shape[2:])
    parts = pixels.reshape(T, 2, 3, h // 2, 2, 14, w // 2, 2, 14)
    patches = parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(T * h * w, 1176)
    return Media(kind, patches, (T, h, w), seconds, 0.0)
