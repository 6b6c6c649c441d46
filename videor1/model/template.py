"""The check of a tokenizer's chat template, by a prompt of each kind, before anything is trained or asked; and what the
template opens an answer with."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from videor1.errors import ConfigError
from videor1.model.families import QWEN2_5_VL, Family
from videor1.model.prompts import EOS, RENDER_ERRORS, VIDEO, special_ids

# Several lines, as a question with options has, and characters that a template may escape or that are Jinja's own.
_QUESTION = (
    'Which happens first? It\'s <before> & "after", {{ here }}.\nOptions:\nA. a red square\nB.  two spaces\n\n'
    + " ".join(f"word{number}" for number in range(200))
    + "\nReason between <think> and </think>, then answer between <answer> and </answer>."
)

_ANSWER = "It is a red square."
_THEN = "And what happens then?"
_KINDS = ("text", "video", "image")
_NO_KWARGS: Mapping[str, Any] = MappingProxyType({})


def check_template(tokenizer: Any, source: str, family: Family = QWEN2_5_VL) -> None:
    """Check that the chat template renders prompts with a video, an image and text alone, with the question in each.

    Raises:
        ConfigError: there is no template, it fails, it leaves out or changes the question, it has no place for the
            media or for the answer, or it opens answers as :func:`opened_text` refuses it.
    """
    advice = _advice(family)
    if not tokenizer.chat_template:
        raise ConfigError(f"model_name_or_path: the tokenizer of {source} has no chat template; {advice}")
    special = special_ids(tokenizer, family)
    for kind, pad in zip(_KINDS, (None, special.video_pad, special.image_pad), strict=True):
        rendered = _render(tokenizer, source, kind, advice)
        if rendered.count(_QUESTION) != 1:
            happened = "repeats" if _QUESTION in rendered else "leaves out or changes"
            raise ConfigError(
                f"model_name_or_path: the chat template of {source} {happened} the question of a prompt with {kind}: "
                f"it gives {_short(rendered)}; {advice}"
            )
        if kind == "text" and (whose := family.foreign_template(rendered, _with_tool(tokenizer))):
            raise ConfigError(f"model_name_or_path: the chat template of {source} is that of {whose}; {advice}")
        if not _opening(rendered).strip():
            raise ConfigError(
                f"model_name_or_path: the chat template of {source} opens no turn for the answer after the question; "
                f"{advice}"
            )
        ids = list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        for token in (special.video_pad, special.image_pad):
            if ids.count(token) != (token == pad):
                name = tokenizer.convert_ids_to_tokens(token)
                raise ConfigError(
                    f"model_name_or_path: the chat template of {source} gives {ids.count(token)} tokens {name} for a "
                    f"prompt with {kind}, expected {int(token == pad)}; {advice}"
                )
        if kind == "video" and family.video_text is not None and rendered.count(VIDEO) != 1:
            raise ConfigError(
                f"model_name_or_path: the chat template of {source} does not put a video as {VIDEO}, where the times "
                f"of its frames can stand: it gives {_short(rendered)}; {advice}"
            )
    opened_text(tokenizer, source, family)


def opened_text(
    tokenizer: Any, source: str, family: Family = QWEN2_5_VL, template_kwargs: Mapping[str, Any] = _NO_KWARGS
) -> str:
    """Return what the chat template opens an answer with, behind the head of the assistant's turn; "" for most.

    The head is what stands before an earlier answer of a conversation, to which thinking models' templates add no
    reasoning. Blanks alone count as nothing.

    Args:
        template_kwargs: arguments of the chat template.

    Raises:
        ConfigError: the template opens an answer with a text that the family's record does not list, or with different
            texts for different kinds of prompts; or it begins a prompt's answer otherwise than an earlier one.
    """
    head = _head(tokenizer, source, family, template_kwargs)
    found = {}
    for kind in _KINDS:
        end = _opening(_render(tokenizer, source, kind, _advice(family), template_kwargs))
        if not (end.startswith(head) or end.strip() == head.strip()):
            raise ConfigError(
                f"model_name_or_path: the chat template of {source} ends a prompt with {kind} by {_short(end)}, but "
                f"begins an earlier answer by {_short(head)}: what it opens an answer with cannot be told; "
                f"{_advice(family)}"
            )
        found[kind] = end.removeprefix(head) if end.strip() != head.strip() else ""
    opened = found["text"]
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"model_name_or_path: the chat template of {source} opens an answer differently by the kind of prompt: "
            f"{found}; expected the same for all"
        )
    if opened and opened not in family.opened:
        listed = ", ".join(["nothing", *map(repr, family.opened)])
        raise ConfigError(
            f"model_name_or_path: the chat template of {source} opens an answer with {_short(opened)}, so that the "
            f"model does not write it itself; expected of a {family.name} model: {listed}. Take another model, or "
            "remove that text from the end of the template"
        )
    return opened


def _head(tokenizer: Any, source: str, family: Family, template_kwargs: Mapping[str, Any]) -> str:
    """Return the head of an assistant's turn, from the question's end to the answer.

    It is taken from a conversation that goes on after the answer: templates of thinking models put reasoning before the
    last one. What one puts before every answer all the same is no part of the head.
    """
    turns = [("user", _QUESTION), ("assistant", _ANSWER), ("user", _THEN)]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    what = "a conversation with an answer"
    rendered = _apply(tokenizer, source, messages, what, _advice(family), template_kwargs)
    before, answer, _ = rendered.partition(_ANSWER)
    if not answer:
        raise ConfigError(
            f"model_name_or_path: the chat template of {source} leaves out an earlier answer: it gives "
            f"{_short(rendered)}; {_advice(family)}"
        )
    return _opening(before).partition("<think>")[0]


def _opening(rendered: str) -> str:
    """Return what stands behind the end of the question's turn."""
    return rendered.partition(_QUESTION)[2].rpartition(EOS)[2]


def _advice(family: Family) -> str:
    return f"use the template of a {family.name} model (chat_template.jinja or tokenizer_config.json)"


def _render(
    tokenizer: Any, source: str, kind: str, advice: str, template_kwargs: Mapping[str, Any] = _NO_KWARGS
) -> str:
    content = [*([{"type": kind}] if kind != "text" else []), {"type": "text", "text": _QUESTION}]
    messages = [{"role": "user", "content": content}]
    return _apply(tokenizer, source, messages, f"a prompt with {kind}", advice, template_kwargs)


def _apply(
    tokenizer: Any,
    source: str,
    messages: list[dict[str, Any]],
    what: str,
    advice: str,
    template_kwargs: Mapping[str, Any],
) -> str:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template_kwargs)
    except RENDER_ERRORS as error:
        raise ConfigError(
            f"model_name_or_path: the chat template of {source} cannot render {what}: "
            f"{type(error).__name__}: {str(error)[:300]}; {advice}"
        ) from error


def _with_tool(tokenizer: Any) -> str:
    """Render a conversation in which a tool answers; "" where the template has no tools."""
    turns = [("user", _QUESTION), ("assistant", "It depends."), ("tool", "red")]
    try:
        return tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in turns], tokenize=False)
    except RENDER_ERRORS:
        return ""


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:60]} ... {text[-40:]}")
