"""Tokenised prompts: one user turn with the media first, in the chat template of the model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from videor1.answer import follows_format, left_to_write
from videor1.errors import ConfigError
from videor1.model.families import FAMILIES, QWEN2_5_VL, Family
from videor1.types import Media, Sample, SampleError
from videor1.video.patches import num_media_tokens

INSTRUCTION = "Reason between <think> and </think>, then answer between <answer> and </answer>."
_BY_TYPE = {
    "multiple choice": "Answer with the letter of one option.",
    "numerical": "Answer with a number alone.",
    "OCR": "Answer with the text you read.",
    "free-form": "Answer in words.",
    "regression": "Answer with a number alone.",
    "temporal grounding": 'Answer with the time span in seconds, as JSON alone: {"time": [12.3, 25.7]}',
    "spatial grounding": "Answer with the box [x1, y1, x2, y2], as JSON alone: " + '{"boxes": [35, 227, 437, 932]}',
    "spatial-temporal grounding": (
        "Answer with the time span in seconds and the box [x1, y1, x2, y2] at each whole second in it, as JSON alone: "
        '{"time": [8.1, 10.5], "boxes": {"9": [317, 422, 582, 997], "10": [332, 175, 442, 369]}}'
    ),
    "tracking": (
        "Answer with the box [x1, y1, x2, y2] at each second, up to 32 of them, as JSON alone: "
        '{"boxes": {"1": [405, 230, 654, 463], "2": [435, 223, 678, 446]}}'
    ),
    "boolean": "Answer with yes or no.",
    "math": "Answer with the result alone, a number or LaTeX, as in $-\\frac{3}{2}$.",
    "open-ended": "Answer in words.",
}


@dataclass(frozen=True)
class SpecialIds:
    """Ids of Qwen's special tokens, which all families have."""

    eos: int  # <|im_end|>
    pad: int  # <|endoftext|>
    video_pad: int
    image_pad: int
    vision_start: int
    vision_end: int
    vision_pad: int | None = None  # <|vision_pad|>, which Qwen's tokenizers have but no prompt uses

    @property
    def vision(self) -> tuple[int, ...]:
        """The tokens that represent or enclose media, which must never be sampled."""
        pads = () if self.vision_pad is None else (self.vision_pad,)
        return self.vision_start, self.vision_end, self.video_pad, self.image_pad, *pads

    def media_pad(self, media: Media) -> int:
        """Return the token that represents a part of ``media``."""
        return self.video_pad if media.kind == "video" else self.image_pad


_TOKENS = {
    "eos": "<|im_end|>",
    "pad": "<|endoftext|>",
    "video_pad": "<|video_pad|>",
    "image_pad": "<|image_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
EOS = _TOKENS["eos"]
VIDEO = _TOKENS["vision_start"] + _TOKENS["video_pad"] + _TOKENS["vision_end"]  # a video in a chat template's text
_VISION_PAD = "<|vision_pad|>"


def special_ids(tokenizer: Any, family: Family | None = None) -> SpecialIds:
    """Return the ids of the special tokens.

    Args:
        tokenizer: the model's.
        family: the model's, whose further tokens are looked for; None: what all families have is enough.

    Raises:
        ConfigError: the tokenizer lacks one of them as a single token, or is another family's.
    """
    further = family.tokens if family else ()
    missing = [token for token in (*_TOKENS.values(), *further) if _token_id(tokenizer, token) is None]
    if missing:
        names = family.name if family else " or ".join(f.name for f in FAMILIES.values())
        raise ConfigError(
            f"the tokenizer ({type(tokenizer).__name__} of {tokenizer.name_or_path or 'no path'}) has no token "
            f"{', '.join(missing)}; expected the tokenizer of a {names} model"
        )
    foreign = family.foreign_tokens if family else ()
    found = [_token_id(tokenizer, token) for token in foreign]
    if family and found and found[0] is not None and found == [found[0] + i for i in range(len(found))]:
        raise ConfigError(
            f"the tokenizer ({type(tokenizer).__name__} of {tokenizer.name_or_path or 'no path'}) has the tokens "
            f"{', '.join(foreign)} of another family in its order, and {family.name} has never seen them; expected the "
            f"tokenizer of a {family.name} model"
        )
    ids: dict[str, Any] = {name: _token_id(tokenizer, token) for name, token in _TOKENS.items()}
    return SpecialIds(**ids, vision_pad=_token_id(tokenizer, _VISION_PAD))


def _token_id(tokenizer: Any, token: str) -> int | None:
    """Return the id of a single token; None where there is none."""
    found = tokenizer.convert_tokens_to_ids(token)
    # A tokenizer maps a token it does not know to its unknown token, or to None.
    return found if found is not None and tokenizer.convert_ids_to_tokens(found) == token else None


def question_text(sample: Sample) -> str:
    """Return the text of the user turn.

    It is the problem; for multiple choice a line "Options:" and one line per option; then the instruction to think and
    to answer inside tags, and the form of the answer, by problem type.
    """
    lines = [sample.problem]
    if sample.problem_type == "multiple choice":
        lines += ["Options:", *sample.options]
    return "\n".join([*lines, f"{INSTRUCTION} {_BY_TYPE[sample.problem_type]}"])


def build_input_ids(
    tokenizer: Any, sample: Sample, media: Media | None, *, max_prompt_length: int, family: Family = QWEN2_5_VL
) -> Tensor:
    """Return the token ids of a prompt, int64 [P], with its media expanded as by :func:`expand_media`.

    They end where the completion begins.

    Args:
        media: the sample's media; None for data_type text.
        max_prompt_length: most tokens of the prompt.
        family: the model's, which says how a video stands in the text.

    Raises:
        SampleError: ``too_long`` for more tokens; ``special_token`` for a text that the tokenizer would read as a
            special token; ``bad_text`` for one that it cannot encode.
        ConfigError: the chat template has no place for the media, or text of its own (such as a system prompt) that the
            tokenizer cannot encode.
    """
    assert (media.kind if media else "text") == sample.data_type, (media and media.kind, sample.data_type)
    text = question_text(sample)
    _check_no_special_tokens(tokenizer, sample, text)
    content: list[dict[str, str]] = [{"type": media.kind}] if media else []
    content.append({"type": "text", "text": text})
    if tokenizer.chat_template is None:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path or 'no path'} has no chat template")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    try:
        ids = encode(tokenizer, place_media(rendered, media, family, tokenizer), sample)
    except SampleError as error:
        encode(tokenizer, text, sample)  # This raises where the question is at fault.
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} adds text of its own, such as a system "
            f"prompt, that cannot be used: {error.message}"
        ) from None
    special, expected = special_ids(tokenizer), rendered_pads(media, family) if media else 0
    if media and (count := ids.count(pad := special.media_pad(media))) != expected:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} gives {count} tokens "
            f"{tokenizer.convert_ids_to_tokens(pad)} for one {media.kind}, expected {expected}; "
            f"use the template of a {family.name} model"
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
    """Repeat each of the media's pad tokens, to T * h * w / 4 together: the tokens that the vision tower returns.

    Args:
        options: the caller's names of the options that make media smaller, for the error message.

    Returns:
        The prompt's token ids, int64 [P].

    Raises:
        SampleError: ``too_long`` for more than ``max_prompt_length`` tokens; a prompt is never truncated.
    """
    expanded, media_tokens = list(ids), ""
    if media is not None:
        pad, count = special.media_pad(media), num_media_tokens(media.grid_thw)
        each, left = divmod(count, expanded.count(pad))
        assert not left, (media.grid_thw, expanded.count(pad))
        expanded = [token for i in expanded for token in ([pad] * each if i == pad else [i])]
        media_tokens = f" ({count} of them the {media.kind}'s)"
    if len(expanded) > max_prompt_length:
        raise SampleError(
            "too_long",
            f"problem {sample.problem_id}: the prompt has {len(expanded)} tokens{media_tokens}, the limit is "
            f"{max_prompt_length}: raise it, or lower {options}",
            sample.path,
        )
    return torch.tensor(expanded, dtype=torch.int64)


def place_media(text: str, media: Media | None, family: Family, tokenizer: Any) -> str:
    """Return a chat template's text with a video as its family has it: one pad token a run.

    Raises:
        ConfigError: the text has no such place for a video.
    """
    if media is None or media.kind != "video" or family.video_text is None:
        return text
    if (count := text.count(VIDEO)) != 1:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} gives {VIDEO} {count} times for one "
            f"video, expected once, where the times of its frames can stand; use the template of a {family.name} model"
        )
    return text.replace(VIDEO, family.video_text(media, VIDEO))


def rendered_pads(media: Media, family: Family) -> int:
    """Return the number of pad tokens, one a run, that stand for media in the text of a prompt."""
    if media.kind != "video" or family.video_text is None:
        return 1
    return family.video_text(media, VIDEO).count(_TOKENS["video_pad"])


def build_sft_ids(
    tokenizer: Any,
    sample: Sample,
    media: Media | None,
    max_length: int,
    *,
    max_prompt_length: int | None = None,
    family: Family = QWEN2_5_VL,
    opened: str = "",
) -> tuple[Tensor, Tensor]:
    """Return the token ids and the loss mask of a sample for SFT.

    The prompt's ids are exactly those of :func:`build_input_ids`. The whole answer is ``process``, a newline and
    ``solution``, without white space around both, so that it earns the format reward. The target is what the model has
    to write of it: all of it, or what follows the text that the chat template opens it with; then EOS.

    Args:
        opened: what the chat template opens an answer with (``VideoLM.opened_text``). The answer must begin with its
            tags: after an opened and closed ``<think>`` the process must hold no reasoning.

    Returns:
        (token ids int64 [L], loss mask bool [L], which is True on the target, EOS included).

    Raises:
        SampleError: ``process`` if the answer cannot earn the format reward, or does not begin as the template does;
            ``too_long`` for more than ``max_length`` tokens together or ``max_prompt_length`` in the prompt;
            ``special_token`` and ``bad_text`` as :func:`build_input_ids`.
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
    target = left_to_write(opened, answer)
    if target is None or not follows_format(target, opened):
        raise SampleError(
            "process",
            f"problem {sample.problem_id}: the chat template opens an answer with {opened!r}, so that the process must "
            f"begin with it and open <think> but once, got {sample.process[:60]!r}",
            sample.path,
        )
    _check_no_special_tokens(tokenizer, sample, answer)
    limit = min(max_length, max_prompt_length or max_length)
    prompt = build_input_ids(tokenizer, sample, media, max_prompt_length=limit, family=family)
    # Encoded separately from the prompt, since in a rollout no token spans the boundary between them.
    completion = torch.tensor([*encode(tokenizer, target, sample), special_ids(tokenizer).eos], dtype=torch.int64)
    length = len(prompt) + len(completion)
    if length > max_length:
        raise SampleError(
            "too_long",
            f"problem {sample.problem_id}: {length} tokens ({len(prompt)} prompt, {len(completion)} completion), the "
            f"limit is {max_length}",
            sample.path,
        )
    return torch.cat([prompt, completion]), torch.arange(length) >= len(prompt)


def encode(tokenizer: Any, text: str, sample: Sample) -> list[int]:
    """Return the token ids of a sample's text, without special tokens around it.

    Raises:
        SampleError: ``bad_text`` for a text that the tokenizer cannot encode, such as half of a surrogate pair.
    """
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception as error:  # Which kind it is depends on the tokenizer: TypeError, UnicodeEncodeError, Exception.
        reason = f"text that the tokenizer cannot encode ({type(error).__name__}: {str(error)[:200]})"
        raise SampleError("bad_text", f"problem {sample.problem_id}: {reason}", sample.path) from None


def _check_no_special_tokens(tokenizer: Any, sample: Sample, text: str) -> None:
    """Check that a data file's text holds no special token, which could end a turn or represent media.

    Raises:
        SampleError: ``special_token`` if it holds one.
    """
    tokens = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    # Encoding takes longer than the rest of a prompt, so it is done only if the text may give a special token: it holds
    # one, or the tokenizer normalises text before it looks for one.
    if not any(token.normalized or str(token) in text for token in tokens.values()):
        return
    special = {i: str(token) for i, token in tokens.items()}
    found = sorted({special[i] for i in encode(tokenizer, text, sample) if i in special})
    if found:
        raise SampleError(
            "special_token",
            f"problem {sample.problem_id}: its text holds the special token {', '.join(found)}; reword it",
            sample.path,
        )
