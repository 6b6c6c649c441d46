"""Tokenised prompts, in the chat template of the model's tokenizer: a question with its media first or where its
placeholders stand, or a conversation that ends with one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor

from videor1.answer import follows_format, left_to_write
from videor1.errors import ConfigError
from videor1.model.families import FAMILIES, QWEN2_5_VL, Family
from videor1.model.turns import STAND_IN, assistant_spans, written
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
    """Return the turns of a prompt, each its role and its parts in order; the last one of the user asks the question.

    The turns of a sample that is not ``instructed`` are as the data have them.

    The media of a sample that lists them stand where the placeholders of its texts are. Without any, and for a sample
    that names one file, all stand before the first text of the user.
    """
    told: list[tuple[str, str]] = [("system", sample.system)] if sample.system is not None else []
    told += [(message.role, message.content) for message in sample.messages] or [("user", sample.problem)]
    if sample.instructed:
        asks = max(place for place, (role, _) in enumerate(told) if role == "user")
        told[asks] = ("user", question_text(sample))
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
    return _input_ids(tokenizer, sample, media, max_prompt_length=max_prompt_length, family=family)[0]


def _input_ids(
    tokenizer: Any,
    sample: Sample,
    media: PromptMedia,
    *,
    max_prompt_length: int,
    family: Family,
    learn: bool = False,
    opened: str = "",
) -> tuple[Tensor, Tensor]:
    """Return the token ids of a prompt and which of them SFT learns, bool [P]; see :func:`build_input_ids`.

    Args:
        learn: whether the assistant's earlier turns are learned. Each is then encoded by itself, as it is written: no
            token spans its beginning.
        opened: what the chat template opens an answer with.
    """
    kinds = [one.kind for one in listed(media)]
    assert kinds == [item.kind for item in sample.items], (kinds, sample.data_type, sample.items)
    turns = conversation(sample)
    texts = [text for _, parts in turns for kind, text in parts if kind == "text"]
    for text in texts:
        check_no_special_tokens(tokenizer, sample, text)
    rendered = _render(tokenizer, sample, turns)
    if sample.media or sample.messages:
        _check_rendered(tokenizer, sample, rendered, kinds)
    placed = place_media(rendered, media, family, tokenizer)
    spans = _learned_spans(tokenizer, sample, turns, placed, opened) if learn else []
    cuts = [0, *(cut for span in spans for cut in span), len(placed)]
    try:
        pieces = [encode(tokenizer, placed[first:last], sample) for first, last in itertools.pairwise(cuts)]
    except SampleError as error:
        for text in texts:
            encode(tokenizer, text, sample)  # This raises where the sample's own text is at fault.
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} adds text of its own, such as a system "
            f"prompt, that cannot be used: {error.message}"
        ) from None
    ids = [token for piece in pieces for token in piece]
    learned = torch.tensor([bool(number % 2) for number, piece in enumerate(pieces) for _ in piece])
    special = special_ids(tokenizer)
    if isinstance(media, Media):
        expected = rendered_pads(media, family)
        if (count := ids.count(pad := special.media_pad(media))) != expected:
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} gives {count} tokens "
                f"{tokenizer.convert_ids_to_tokens(pad)} for one {media.kind}, expected {expected}; "
                f"use the template of a {family.name} model"
            )
    expanded = expand_media(special, ids, sample, media, max_prompt_length=max_prompt_length, family=family)
    # Only pad tokens are repeated, and none of them is learned: the other tokens keep their order.
    pads = torch.tensor([special.video_pad, special.image_pad])
    mask = torch.zeros(len(expanded), dtype=torch.bool)
    mask[~torch.isin(expanded, pads)] = learned[~torch.isin(torch.tensor(ids), pads)]
    return expanded, mask


def _render(tokenizer: Any, sample: Sample, turns: Sequence[tuple[str, Sequence[Part]]], *, ask: bool = True) -> str:
    """Return turns in the chat template; with ``ask``, up to where the next answer begins.

    Raises:
        SampleError: ``chat_template``.
        ConfigError: there is no chat template.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path or 'no path'} has no chat template")
    try:
        return tokenizer.apply_chat_template(
            template_messages(turns), add_generation_prompt=ask, tokenize=False, **sample.chat_template_kwargs
        )
    except RENDER_ERRORS as error:
        reason = f"the chat template cannot render it: {type(error).__name__}: {str(error)[:300]}"
        raise SampleError("chat_template", f"problem {sample.problem_id}: {reason}", sample.path) from error


def _learned_spans(
    tokenizer: Any, sample: Sample, turns: Sequence[tuple[str, Sequence[Part]]], text: str, opened: str
) -> list[tuple[int, int]]:
    """Return where the assistant's turns stand in the text of a prompt, see :func:`assistant_spans`.

    Raises:
        SampleError: ``chat_template`` where they are not found; ``placeholders`` for media in such a turn.
    """
    contents: list[str | None] = []
    for role, parts in turns:
        if role != "user" and any(kind != "text" for kind, _ in parts):
            reason = f"expected placeholders in the user's turns only, got one in the {role}'s"
            raise SampleError("placeholders", f"problem {sample.problem_id}: {reason}", sample.path)
        contents.append(parts[0][1] if role == "assistant" else None)
    if not any(contents):
        return []
    stand_in: Sequence[Part] = [("text", STAND_IN)]
    bare = [(role, stand_in if role == "assistant" else parts) for role, parts in turns]
    try:
        return assistant_spans(text, _render(tokenizer, sample, bare), contents, eos=EOS, opened=opened)
    except ValueError as error:
        reason = f"the chat template cannot be learned from: {error}"
        raise SampleError("chat_template", f"problem {sample.problem_id}: {reason}", sample.path) from None


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

    The whole answer is ``process``, a newline and ``solution``, without white space around both, so that it earns the
    format reward; or it is the assistant's turn that ends ``messages``. The target is what the model has to write of
    it: all of it, or what follows the text that the chat template opens it with; then EOS. The assistant's earlier
    turns are learned too, each as the chat template gives it there, with its EOS.

    The prompt's ids are exactly those of :func:`build_input_ids`, but that no token spans the beginning of an earlier
    turn of the assistant.

    Args:
        opened: what the chat template opens an answer with (``VideoLM.opened_text``). The answer must begin with its
            tags: after an opened and closed ``<think>`` the process must hold no reasoning. The last turn of a sample
            that is not ``instructed`` may lack them, where the template writes an empty pair of tags itself.

    Returns:
        (token ids int64 [L], loss mask bool [L], which is True on what the assistant writes, EOS included).

    Raises:
        SampleError: ``process`` if the answer cannot earn the format reward (of a sample that is ``instructed``), or
            does not begin as the template does; ``too_long`` for more than ``max_length`` tokens together or
            ``max_prompt_length`` before the last answer; ``placeholders`` for media outside of the user's turns;
            ``special_token``, ``bad_text`` and ``chat_template`` as :func:`build_input_ids`, the last also where the
            template changes what the assistant wrote.
    """
    ends = bool(sample.messages) and sample.messages[-1].role == "assistant"
    asked = replace(sample, messages=sample.messages[:-1]) if ends else sample
    answer = sample.messages[-1].content.strip() if ends else f"{sample.process.strip()}\n{sample.solution.strip()}"
    if sample.instructed and not follows_format(answer):
        got = f"process {sample.process[:60]!r} and solution {sample.solution[:60]!r}"
        if ends:
            got = f"{answer[:60]!r} as the last turn; without problem_type a conversation is learned as it stands"
        raise SampleError(
            "process",
            f"problem {sample.problem_id}: expected a process of <think>...</think> and a solution of "
            f"<answer>...</answer> with nothing outside the tags, got {got}",
            sample.path,
        )
    own, target = "", left_to_write(opened, answer)
    if not sample.instructed:
        own, target = _last_turn(tokenizer, sample, asked, opened) or (own, target)
    if target is None or (sample.instructed and not follows_format(target, opened)):
        raise SampleError(
            "process",
            f"problem {sample.problem_id}: the chat template opens an answer with {opened!r}, so that the "
            f"{'last turn' if ends else 'process'} must begin with it and open <think> but once, got "
            f"{(answer if ends else sample.process)[:60]!r}",
            sample.path,
        )
    check_no_special_tokens(tokenizer, sample, answer)
    limit = min(max_length, max_prompt_length or max_length)
    prompt, learned = _input_ids(
        tokenizer, asked, media, max_prompt_length=limit, family=family, learn=True, opened=opened
    )
    if own:
        added = torch.tensor(encode(tokenizer, own, sample), dtype=torch.int64)
        prompt, learned = torch.cat([prompt, added]), torch.cat([learned, torch.zeros(len(added), dtype=torch.bool)])
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
    mask = torch.arange(length) >= len(prompt)
    mask[: len(prompt)] |= learned
    return torch.cat([prompt, completion]), mask


def _last_turn(tokenizer: Any, sample: Sample, asked: Sample, opened: str) -> tuple[str, str] | None:
    """Return what the chat template writes of its own before the last turn's content, and what is left to write of it.

    None where the template gives a finished turn otherwise than it begins one.
    """
    before = _render(tokenizer, sample, conversation(asked))
    whole = _render(tokenizer, sample, conversation(sample), ask=False)
    body, ended, _ = whole.removeprefix(before).partition(EOS)
    if not whole.startswith(before) or not ended:
        return None
    try:
        start, end = written(opened + body, sample.messages[-1].content, opened)
    except ValueError:
        return None
    return (opened + body)[len(opened) : start], (opened + body)[start:end]


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
