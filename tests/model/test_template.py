"""Chat templates that fail, or that lose something, are told when the model is loaded."""

from __future__ import annotations

import copy

import pytest
from tiny import CHAT_TEMPLATE, make_tokenizer

from videor1.errors import ConfigError
from videor1.model.template import check_template

PART = "{{ part['text'] }}"
PAD = "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"


def check(template: str | None) -> None:
    tokenizer = copy.copy(make_tokenizer())
    tokenizer.chat_template = template
    check_template(tokenizer, "MODEL")


def test_the_usual_template_passes() -> None:
    assert all(part in CHAT_TEMPLATE for part in (PART, PAD, ANSWER))
    check(CHAT_TEMPLATE)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("", "has no chat template"),
        ("{% for", "cannot render .*TemplateSyntaxError"),
        ("{{ messages[3].content }}", "cannot render .*UndefinedError"),
        ("{{ raise_exception('only for tools') }}", "cannot render .*only for tools"),
        ("{{ messages | no_such_filter }}", "cannot render .*TemplateAssertionError"),
        ("{{ 1 / 0 }}", "cannot render .*ZeroDivisionError"),
        ("{{ messages + 1 }}", "cannot render .*TypeError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render .*SecurityError"),
        ("{% include 'other.jinja' %}", "cannot render .*TypeError"),
        ("<|im_start|>user hello<|im_end|><|im_start|>assistant", "leaves out or changes the question"),
        (CHAT_TEMPLATE.replace(PART, ""), "leaves out or changes the question"),
        (CHAT_TEMPLATE.replace(PART, "{{ part['text'] | trim | lower }}"), "leaves out or changes the question"),
        (CHAT_TEMPLATE.replace(PART, "{{ part['text'] | e }}"), "leaves out or changes the question"),
        (CHAT_TEMPLATE.replace(PART, "{{ part['text'][:200] }}"), "leaves out or changes the question"),
        (CHAT_TEMPLATE.replace(PART, "{{ part['text'].split('\\n')[0] }}"), "leaves out or changes the question"),
        (CHAT_TEMPLATE.replace(PART, "{{ part['text'] | replace('\\n', ' ') }}"), "leaves out or changes"),
        (CHAT_TEMPLATE.replace(PART, PART + PART), "repeats the question"),
        (CHAT_TEMPLATE.replace(PAD, ""), r"gives 0 tokens <\|video_pad\|> for a prompt with video, expected 1"),
        (CHAT_TEMPLATE.replace(PAD, PAD + PAD), r"gives 2 tokens <\|video_pad\|> for a prompt with video"),
        (
            CHAT_TEMPLATE.replace("{{ part['type'] }}_pad", "video_pad"),
            r"0 tokens <\|image_pad\|>|1 tokens <\|video_pad",
        ),
        (CHAT_TEMPLATE.replace(PART, PART + "<|image_pad|>"), r"gives 1 tokens <\|image_pad\|> for a prompt with text"),
        (CHAT_TEMPLATE.replace(ANSWER, ""), "opens no turn for the answer"),
    ],
)
def test_a_template_that_loses_something_is_refused(template: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=f"chat template.*{message}|{message}") as raised:
        check(template)
    assert "MODEL" in str(raised.value)
