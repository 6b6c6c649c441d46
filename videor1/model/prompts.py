"""Questions as token ids: one user turn, media first, in the chat template of Qwen2.5-VL's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from videor1.answer import follows_format
from videor1.errors import ConfigError
from videor1.types import Media, Sample, SampleError
from videor1.video.patches import num_media_tokens

INSTRUCTION = "Reason between <think> and </think>, then answer between <answer> and </answer>."
_BY_TYPE = {
    "multiple choice": "Answer with the letter of one option.",
    "numerical": "Answer with a number alone.",
    "OCR": "Answer with the text you read.",
    "free-form": "Answer in words.",
    "regression": "Answer with a number alone.",
}


@dataclass(frozen=True)
class SpecialIds:
    """Ids of Qwen2.5-VL's special tokens."""

    eos: int  # <|im_end|>
    pad: int  # <|endoftext|>
    video_pad: int
    image_pad: int
    vision_start: int
    vision_end: int
    vision_pad: int | None = None  # <|vision_pad|>, which Qwen's tokenizers have and no prompt uses

    @property
    def vision(self) -> tuple[int, ...]:
        """The tokens that stand for or enclose media: never to be sampled."""
        pads = () if self.vision_pad is None else (self.vision_pad,)
        return self.vision_start, self.vision_end, self.video_pad, self.image_pad, *pads

    def media_pad(self, media: Media) -> int:
        """The token that stands for a part of ``media``."""
        return self.video_pad if media.kind == "video" else self.image_pad


_TOKENS = {
    "eos": "<|im_end|>",
    "pad": "<|endoftext|>",
    "video_pad": "<|video_pad|>",
    "image_pad": "<|image_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
_VISION_PAD = "<|vision_pad|>"


def special_ids(tokenizer: Any) -> SpecialIds:
    """The ids of Qwen2.5-VL's special tokens. Raises ConfigError where the tokenizer lacks one as a single token."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _TOKENS.items()}
    # A tokenizer maps a token it does not know to its unknown token, or to None.
    missing = [t for name, t in _TOKENS.items() if ids[name] is None or tokenizer.convert_ids_to_tokens(ids[name]) != t]
    if missing:
        raise ConfigError(
            f"the tokenizer ({type(tokenizer).__name__} of {tokenizer.name_or_path or 'no path'}) has no token "
            f"{', '.join(missing)}; expected the tokenizer of a Qwen2-VL or Qwen2.5-VL model"
        )
    unused = tokenizer.convert_tokens_to_ids(_VISION_PAD)
    known = unused is not None and tokenizer.convert_ids_to_tokens(unused) == _VISION_PAD
    return SpecialIds(**ids, vision_pad=unused if known else None)


def question_text(sample: Sample) -> str:
    """The text of the user turn: the problem; for multiple choice a line "Options:" and one option a line; then the
    instruction to think and to answer inside tags, and what to answer with, by problem type."""
    lines = [sample.problem]
    if sample.problem_type == "multiple choice":
        lines += ["Options:", *sample.options]
    return "\n".join([*lines, f"{INSTRUCTION} {_BY_TYPE[sample.problem_type]}"])


def build_input_ids(tokenizer: Any, sample: Sample, media: Media | None, *, max_prompt_length: int) -> Tensor:
    """Token ids of the prompt, int64 [P], up to where the answer begins, its media expanded (:func:`expand_media`).

    ``media`` is the sample's (None for data_type text). Raises SampleError ``too_long`` for more than
    ``max_prompt_length`` tokens and ``special_token`` for a text that would be read as a special token of the
    tokenizer; ConfigError for a chat template that has no place for the media.
    """
    assert (media.kind if media else "text") == sample.data_type, (media and media.kind, sample.data_type)
    text = question_text(sample)
    _refuse_special(tokenizer, sample, text)
    content: list[dict[str, str]] = [{"type": media.kind}] if media else []
    content.append({"type": "text", "text": text})
    if tokenizer.chat_template is None:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path or 'no path'} has no chat template")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    ids, special = _encode(tokenizer, rendered), special_ids(tokenizer)
    if media and (count := ids.count(pad := special.media_pad(media))) != 1:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} gives {count} tokens "
            f"{tokenizer.convert_ids_to_tokens(pad)} for one {media.kind}, expected 1; "
            "use the template of a Qwen2-VL or Qwen2.5-VL model"
        )
    return expand_media(special, ids, sample, media, max_prompt_length=max_prompt_length)


def expand_media(
    special: SpecialIds,
    ids: Sequence[int],
    sample: Sample,
    media: Media | None,
    *,
    max_prompt_length: int,
    options: str = "video.max_pixels, video.image_max_pixels or video.max_frames",
) -> Tensor:
    """A prompt's token ids, int64 [P], the media's one pad token made the T * h * w / 4 that the vision tower gives.

    Args:
        options: how the caller calls what makes media smaller, for the error message.

    Raises:
        SampleError: ``too_long`` for more than ``max_prompt_length`` tokens: nothing is ever cut.
    """
    expanded, media_tokens = list(ids), ""
    if media is not None:
        pad, count = special.media_pad(media), num_media_tokens(media.grid_thw)
        at = expanded.index(pad)
        expanded[at : at + 1] = [pad] * count
        media_tokens = f" ({count} of them the {media.kind}'s)"
    if len(expanded) > max_prompt_length:
        raise SampleError(
            "too_long",
            f"problem {sample.problem_id}: the prompt has {len(expanded)} tokens{media_tokens}, the limit is "
            f"{max_prompt_length}: raise it, or lower {options}",
            sample.path,
        )
    return torch.tensor(expanded, dtype=torch.int64)


def build_sft_ids(
    tokenizer: Any, sample: Sample, media: Media | None, max_length: int, *, max_prompt_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """(token ids int64 [L], loss mask bool [L]) of the prompt, then ``process``, a newline, ``solution`` and EOS; the
    mask is True on the answer, EOS included.

    The prompt's ids are those of :func:`build_input_ids` exactly, and the decoded answer earns the format reward:
    white space around process and solution is dropped. Raises SampleError ``process`` where they cannot earn it,
    ``too_long`` (``max_length`` for both together, ``max_prompt_length`` for the prompt alone) and ``special_token``.
    """
    answer = f"{sample.process.strip()}\n{sample.solution.strip()}"
    if not follows_format(answer):
        raise SampleError(
            "process",
            f"problem {sample.problem_id}: expected a process of <think>...</think> and a solution of "
            "<answer>...</answer> with nothing outside the tags, "
            f"got process {sample.process[:60]!r} and solution {sample.solution[:60]!r}",
            sample.path,
        )
    _refuse_special(tokenizer, sample, answer)
    limit = min(max_length, max_prompt_length or max_length)
    prompt = build_input_ids(tokenizer, sample, media, max_prompt_length=limit)
    # Encoded apart from the prompt, as a rollout sees it: no token may span the border.
    completion = torch.tensor([*_encode(tokenizer, answer), special_ids(tokenizer).eos], dtype=torch.int64)
    length = len(prompt) + len(completion)
    if length > max_length:
        raise SampleError(
            "too_long",
            f"problem {sample.problem_id}: {length} tokens ({len(prompt)} prompt, {len(completion)} answer), the limit "
            f"is {max_length}",
            sample.path,
        )
    return torch.cat([prompt, completion]), torch.arange(length) >= len(prompt)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _refuse_special(tokenizer: Any, sample: Sample, text: str) -> None:
    """A data file's text must not be able to end a turn or to stand for media."""
    tokens = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    # Encoding takes longer than the rest of a prompt: only where a token may come out (of normalised text, any may).
    if not any(token.normalized or str(token) in text for token in tokens.values()):
        return
    special = {i: str(token) for i, token in tokens.items()}
    found = sorted({special[i] for i in _encode(tokenizer, text) if i in special})
    if found:
        raise SampleError(
            "special_token",
            f"problem {sample.problem_id}: its text holds the special token {', '.join(found)}; reword it",
            sample.path,
        )
