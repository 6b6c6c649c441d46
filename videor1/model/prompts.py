"""Tokenised prompts, in the chat template of the model's tokenizer: a question with its media first or where its
placeholders stand, or a conversation that ends with one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor

from videor1.answer import follows_format, left_to_write
from videor1.errors import ConfigError
from videor1.model.families import FAMILIES, QWEN2_5_VL, Family
from videor1.placeholders import divided, placeholders
from videor1.types import Media, PromptMedia, Sample, SampleError, listed
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
# What a template raises: Jinja's errors, and those of the operators and filters in it.
RENDER_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
Part = tuple[Literal["text", "video", "image"], str]  # of a turn: a text, or the place of the next medium


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


def conversation(sample: Sample) -> list[tuple[str, list[Part]]]:
    """Return the turns of a prompt, each its role and its parts in order; the last one asks the question.

    The media of a sample that lists them stand where the placeholders of its texts are. Without any, and for a sample
    that names one file, all stand before the first text of the user.
    """
    turns = [(message.role, message.content) for message in sample.messages[:-1]]
    told: list[tuple[str, str]] = [("system", sample.system)] if sample.system is not None else []
    told += [*turns, ("user", question_text(sample))]
    if (sample.media or sample.messages) and any(placeholders(text) for _, text in told):
        return [(role, list(divided(text))) for role, text in told]
    first = next(place for place, (role, _) in enumerate(told) if role == "user")
    media: list[Part] = [(item.kind, "") for item in sample.items]
    return [(role, [*(media if place == first else ()), ("text", text)]) for place, (role, text) in enumerate(told)]


def template_messages(turns: Sequence[tuple[str, Sequence[Part]]]) -> list[dict[str, Any]]:
    """Return turns as chat templates take them: the user's as a list of parts, others as text where they are."""
    messages: list[dict[str, Any]] = []
    for role, parts in turns:
        if role != "user" and [kind for kind, _ in parts] == ["text"]:
            messages.append({"role": role, "content": parts[0][1]})
            continue
        content = [{"type": kind, "text": text} if kind == "text" else {"type": kind} for kind, text in parts]
        messages.append({"role": role, "content": content})
    return messages


def build_input_ids(
    tokenizer: Any, sample: Sample, media: PromptMedia, *, max_prompt_length: int, family: Family = QWEN2_5_VL
) -> Tensor:
    """Return the token ids of a prompt, int64 [P], with its media expanded as by :func:`expand_media`.

    They end where the completion begins. The sample is as the run asks it (``VideoLM.asked``).

    Args:
        media: the sample's media; None for data_type text.
        max_prompt_length: most tokens of the prompt.
        family: the model's, which says how a video stands in the text.

    Raises:
        SampleError: ``too_long`` for more tokens; ``special_token`` for a text that the tokenizer would read as a
            special token; ``bad_text`` for one that it cannot encode; ``chat_template`` for a conversation that the
            chat template cannot render, or loses media of.
        ConfigError: the chat template has no place for the media, or text of its own (such as a system prompt) that the
            tokenizer cannot encode.
    """
    kinds = [one.kind for one in listed(media)]
    assert kinds == [item.kind for item in sample.items], (kinds, sample.data_type, sample.items)
    turns = conversation(sample)
    texts = [text for _, parts in turns for kind, text in parts if kind == "text"]
    for text in texts:
        check_no_special_tokens(tokenizer, sample, text)
    if tokenizer.chat_template is None:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path or 'no path'} has no chat template")
    try:
        rendered = tokenizer.apply_chat_template(
            template_messages(turns), add_generation_prompt=True, tokenize=False, **sample.chat_template_kwargs
        )
    except RENDER_ERRORS as error:
        reason = f"the chat template cannot render it: {type(error).__name__}: {str(error)[:300]}"
        raise SampleError("chat_template", f"problem {sample.problem_id}: {reason}", sample.path) from error
    if sample.media or sample.messages:
        _check_rendered(tokenizer, sample, rendered, kinds)
    try:
        ids = encode(tokenizer, place_media(rendered, media, family, tokenizer), sample)
    except SampleError as error:
        for text in texts:
            encode(tokenizer, text, sample)  # This raises where the sample's own text is at fault.
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} adds text of its own, such as a system "
            f"prompt, that cannot be used: {error.message}"
        ) from None
    special = special_ids(tokenizer)
    if isinstance(media, Media):
        expected = rendered_pads(media, family)
        if (count := ids.count(pad := special.media_pad(media))) != expected:
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} gives {count} tokens "
                f"{tokenizer.convert_ids_to_tokens(pad)} for one {media.kind}, expected {expected}; "
                f"use the template of a {family.name} model"
            )
    return expand_media(special, ids, sample, media, max_prompt_length=max_prompt_length, family=family)


def _check_rendered(tokenizer: Any, sample: Sample, rendered: str, kinds: Sequence[str]) -> None:
    """Check that a chat template has put every medium into its text, in order: it may have no place in some turns.

    Raises:
        SampleError: ``chat_template``.
    """
    pads = {_TOKENS[f"{kind}_pad"]: kind for kind in ("video", "image")}
    found = [pads[token] for token in re.findall("|".join(map(re.escape, pads)), rendered)]
    if found != list(kinds):
        reason = f"the chat template gives places for the media {found}, expected {list(kinds)}"
        raise SampleError("chat_template", f"problem {sample.problem_id}: {reason}", sample.path)


def expand_media(
    special: SpecialIds,
    ids: Sequence[int],
    sample: Sample,
    media: PromptMedia,
    *,
    max_prompt_length: int,
    options: str = "video.max_pixels, video.image_max_pixels or video.max_frames",
    family: Family = QWEN2_5_VL,
) -> Tensor:
    """Repeat the pad tokens of each medium, to T * h * w / 4 together: the tokens that the vision tower returns.

    Args:
        options: the caller's names of the options that make media smaller, for the error message.
        family: the model's, which says how many pad tokens each of several media has in ``ids``.

    Returns:
        The prompt's token ids, int64 [P].

    Raises:
        SampleError: ``too_long`` for more than ``max_prompt_length`` tokens; a prompt is never truncated.
    """
    expanded, media_tokens = list(ids), ""
    if every := listed(media):
        pads = {special.media_pad(one) for one in every}
        found = sum(token in pads for token in expanded)
        runs = [found] if len(every) == 1 else [rendered_pads(one, family) for one in every]
        counts = [num_media_tokens(one.grid_thw) for one in every]
        assert sum(runs) == found, (runs, found)
        assert not any(count % run for count, run in zip(counts, runs, strict=True)), (counts, runs)
        lengths = iter([count // run for count, run in zip(counts, runs, strict=True) for _ in range(run)])
        expanded = [token for i in expanded for token in ([i] * next(lengths) if i in pads else [i])]
        whose = f"the {every[0].kind}'s" if len(every) == 1 else f"those of its {len(every)} media"
        media_tokens = f" ({sum(counts)} of them {whose})"
    if len(expanded) > max_prompt_length:
        raise SampleError(
            "too_long",
            f"problem {sample.problem_id}: the prompt has {len(expanded)} tokens{media_tokens}, the limit is "
            f"{max_prompt_length}: raise it, or lower {options}",
            sample.path,
        )
    return torch.tensor(expanded, dtype=torch.int64)


def place_media(text: str, media: PromptMedia, family: Family, tokenizer: Any) -> str:
    """Return a chat template's text with each video as its family has it: one pad token a run.

    Raises:
        ConfigError: the text has no such places for the videos.
    """
    videos = [one for one in listed(media) if one.kind == "video"]
    if not videos or family.video_text is None:
        return text
    first, *others = text.split(VIDEO)
    if (count := len(others)) != len(videos):
        what, expected = ("one video", "once") if len(videos) == 1 else (f"{len(videos)} videos", "once for each")
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} gives {VIDEO} {count} times for {what}, "
            f"expected {expected}, where the times of its frames can stand; use the template of a {family.name} model"
        )
    placed = [family.video_text(video, VIDEO) + after for video, after in zip(videos, others, strict=True)]
    return "".join([first, *placed])


def rendered_pads(media: Media, family: Family) -> int:
    """Return the number of pad tokens, one a run, that stand for media in the text of a prompt."""
    if media.kind != "video" or family.video_text is None:
        return 1
    return family.video_text(media, VIDEO).count(_TOKENS["video_pad"])


def build_sft_ids(
    tokenizer: Any,
    sample: Sample,
    media: PromptMedia,
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
    check_no_special_tokens(tokenizer, sample, answer)
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


def check_no_special_tokens(tokenizer: Any, sample: Sample, text: str) -> None:
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
