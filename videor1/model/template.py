"""The check of a tokenizer's chat template, by a prompt of each kind, before anything is trained or asked."""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import TemplateError

from videor1.errors import ConfigError
from videor1.model.families import QWEN2_5_VL, Family
from videor1.model.prompts import VIDEO, special_ids

# Several lines, as a question with options has, and characters that a template may escape or that are Jinja's own.
_QUESTION = (
    'Which happens first? It\'s <before> & "after", {{ here }}.\nOptions:\nA. a red square\nB.  two spaces\n\n'
    + " ".join(f"word{number}" for number in range(200))
    + "\nReason between <think> and </think>, then answer between <answer> and </answer>."
)

# What a template raises: Jinja's errors, and those of the operators and filters in it.
_RAISED = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


def check_template(tokenizer: Any, source: str, family: Family = QWEN2_5_VL) -> None:
    """Check that the chat template renders prompts with a video, an image and text alone, with the question in each.

    Raises:
        ConfigError: there is no template, it fails, it leaves out or changes the question, or it has no place for the
            media or for the answer.
    """
    advice = f"use the template of a {family.name} model (chat_template.jinja or tokenizer_config.json)"
    if not tokenizer.chat_template:
        raise ConfigError(f"model_name_or_path: the tokenizer of {source} has no chat template; {advice}")
    special = special_ids(tokenizer, family)
    for kind, pad in (("text", None), ("video", special.video_pad), ("image", special.image_pad)):
        rendered = _render(tokenizer, source, kind, advice)
        if rendered.count(_QUESTION) != 1:
            happened = "repeats" if _QUESTION in rendered else "leaves out or changes"
            raise ConfigError(
                f"model_name_or_path: the chat template of {source} {happened} the question of a prompt with {kind}: "
                f"it gives {_short(rendered)}; {advice}"
            )
        if kind == "text" and (whose := family.foreign_template(rendered, _with_tool(tokenizer))):
            raise ConfigError(f"model_name_or_path: the chat template of {source} is that of {whose}; {advice}")
        eos = str(tokenizer.convert_ids_to_tokens(special.eos))
        if not rendered.partition(_QUESTION)[2].rpartition(eos)[2].strip():
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


def _render(tokenizer: Any, source: str, kind: str, advice: str) -> str:
    content = [*([{"type": kind}] if kind != "text" else []), {"type": "text", "text": _QUESTION}]
    messages = [{"role": "user", "content": content}]
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except _RAISED as error:
        raise ConfigError(
            f"model_name_or_path: the chat template of {source} cannot render a prompt with {kind}: "
            f"{type(error).__name__}: {str(error)[:300]}; {advice}"
        ) from error


def _with_tool(tokenizer: Any) -> str:
    """Render a conversation in which a tool answers; "" where the template has no tools."""
    turns = [("user", _QUESTION), ("assistant", "It depends."), ("tool", "red")]
    try:
        return tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in turns], tokenize=False)
    except _RAISED:
        return ""


def check_answer(tokenizer: Any, source: str) -> None:
    """Check that a model writes the whole of its answer itself, as training needs it.

    Raises:
        ConfigError: the chat template opens the reasoning, so that no answer could earn the format reward.
    """
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": _QUESTION}], add_generation_prompt=True, tokenize=False
    )
    if rendered.rstrip().endswith("<think>"):
        raise ConfigError(
            f"model_name_or_path: the chat template of {source} ends a prompt with <think>, as Thinking models' do; an "
            "answer must open it itself to earn the format reward, and targets of SFT do. Take the Instruct model, or "
            "remove <think> from the end of the template"
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:60]} ... {text[-40:]}")
