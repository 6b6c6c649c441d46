"""Prompts in the chat template of Qwen2.5-VL's tokenizer, the ids that SFT trains on, and refused templates."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHAT_TEMPLATE, make_media, make_tokenizer
from tiny_families import opening
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from videor1.errors import ConfigError
from videor1.model.families import QWEN2_5_VL
from videor1.model.prompts import build_input_ids, build_sft_ids, expand_media, question_text, special_ids
from videor1.model.template import check_template, opened_text
from videor1.rewards import accuracy_reward, format_reward
from videor1.types import Media, Sample, SampleError

RED = "<think>Red is there from the start.</think>"
CHOICE = Sample(
    *(0, "q1", "Which colour comes first?", "video", "multiple choice", "<answer>A</answer>"),
    path=Path("/data/clip.mp4"),
    options=("A. red", "B. blue"),
    process=RED,
)
VIDEO = make_media("video", (4, 4, 6))
TOKENIZER = make_tokenizer()


def ids_of(sample: Sample = CHOICE, media: Media | None = VIDEO, limit: int = 1000, tokenizer: Any = None) -> Any:
    return build_input_ids(tokenizer or TOKENIZER, sample, media, max_prompt_length=limit)


def sft_ids(limit: int = 1000, **changes: Any) -> Any:
    return build_sft_ids(TOKENIZER, replace(CHOICE, **changes), VIDEO, limit)


@contextmanager
def refused(kind: str, message: str = "") -> Iterator[Any]:
    with pytest.raises(SampleError, match=message) as raised:
        yield raised
    assert raised.value.kind == kind


def copy_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


WORD = {"multiple choice": "letter", "numerical": "number", "regression": "number", "OCR": "text", "free-form": "words"}
WORD |= {"temporal grounding": '{"time": [12.3, 25.7]}', "spatial grounding": '{"boxes": [35, 227, 437, 932]}'}
WORD |= {"spatial-temporal grounding": '"boxes": {"9": [', "tracking": '{"boxes": {"1": [', "boolean": "yes or no"}
WORD |= {"math": "LaTeX", "open-ended": "words"}


@pytest.mark.parametrize(("problem_type", "word"), WORD.items())
def test_question_text(problem_type: Any, word: str) -> None:
    lines = question_text(replace(CHOICE, problem_type=problem_type)).split("\n")
    options = ["Options:", "A. red", "B. blue"] if problem_type == "multiple choice" else []
    assert lines[:-1] == ["Which colour comes first?", *options]
    tags = [lines[-1].index(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    assert tags == sorted(tags)
    assert word in lines[-1][tags[-1] :]


def test_special_ids() -> None:
    ids = special_ids(TOKENIZER)
    names = ["<|im_end|>", "<|endoftext|>", "<|video_pad|>", "<|image_pad|>"]
    names += ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
    values = [ids.eos, ids.pad, ids.video_pad, ids.image_pad, ids.vision_start, ids.vision_end, ids.vision_pad]
    assert TOKENIZER.convert_ids_to_tokens(values) == names
    assert set(ids.vision) == set(values[2:])
    vocab = {"[UNK]": 0, "<|im_end|>": 1, "<|endoftext|>": 2, "<|image_pad|>": 3, "<|vision_start|>": 4}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    for unk in (None, "[UNK]"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unk)
        with pytest.raises(ConfigError, match=r"no token <\|video_pad\|>, <\|vision_end\|>; expected .* Qwen2-VL"):
            special_ids(tokenizer)


@pytest.mark.parametrize(("kind", "grid"), [("video", (4, 4, 6)), ("image", (1, 8, 10)), ("text", None)])
def test_input_ids_put_the_media_first_and_expand_it(kind: Any, grid: tuple[int, int, int] | None) -> None:
    sample = replace(CHOICE, data_type=kind)
    ids = ids_of(sample, make_media(kind, grid) if grid else None)
    assert (ids.dtype, ids.dim()) == (torch.int64, 1)
    pads = f"<|{kind}_pad|>" * (grid[0] * grid[1] * grid[2] // 4) if grid else ""
    media = f"<|vision_start|>{pads}<|vision_end|>" if grid else ""
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{media}{question_text(sample)}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert TOKENIZER.decode(ids) == expected
    assert ids.tolist() == TOKENIZER(expected)["input_ids"]


def test_lengths_and_their_limits() -> None:
    length = len(ids_of())
    assert len(ids_of(limit=length)) == length
    told = rf"{length} tokens \(24 of them the video's\), the limit is {length - 1}"
    with refused("too_long", told) as raised:
        ids_of(limit=length - 1)
    assert raised.value.path == "/data/clip.mp4"
    length = len(sft_ids()[0])
    assert len(sft_ids(length)[0]) == length
    with refused("too_long", rf"{length} tokens \(\d+ prompt, \d+ completion\), the limit is {length - 1}"):
        sft_ids(length - 1)
    # Expanded media keep what is around them.
    special, media = special_ids(TOKENIZER), make_media("image", (1, 4, 6))
    ids = [5, special.video_pad, special.image_pad, 6]
    expanded = expand_media(special, ids, CHOICE, media, max_prompt_length=9)
    assert expanded.tolist() == [5, special.video_pad, *6 * [special.image_pad], 6]
    assert len(ids) == 4
    with refused("too_long", r"9 tokens \(6 of them the image's\), the limit is 8: .* lower max_pixels"):
        expand_media(special, ids, CHOICE, media, max_prompt_length=8, options="max_pixels")
    with refused("too_long", "has 2 tokens, the limit is 1"):
        expand_media(special, [5, 6], CHOICE, None, max_prompt_length=1)
    for other in (None, make_media("image", (4, 4, 6))):  # not the sample's
        with pytest.raises(AssertionError):
            ids_of(media=other)


@pytest.mark.parametrize("token", ["<|video_pad|>", "<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|endoftext|>"])
def test_special_tokens_are_refused(token: str) -> None:
    for changes in ({"problem": f"Look: {token}"}, {"options": ("A. red", f"Look: {token}")}):
        with refused("special_token", re.escape(token)):
            ids_of(replace(CHOICE, **changes))
    with refused("special_token"):
        sft_ids(process=f"<think>Red.{token}</think>")


def test_odd_questions() -> None:
    """They reach the prompt as they are, unless the tokenizer cannot encode them."""
    for problem in ("a <|video_pad| > b", "<|im_", "{{ 7 * 7 }} {% if %}", "é\u202e 视频 \x00", ""):
        ids = ids_of(replace(CHOICE, problem=problem))
        assert f"<|vision_end|>{problem}\nOptions:" in TOKENIZER.decode(ids)
        assert ids.tolist().count(special_ids(TOKENIZER).video_pad) == 24
    for changes in ({"problem": "Which \ud83d?"}, {"options": ("A. \udc00", "B. blue")}):
        with refused("bad_text", "text that the tokenizer cannot encode"):
            ids_of(replace(CHOICE, **changes))
    with refused("bad_text", "cannot encode"):
        sft_ids(process="<think>\ud83d</think>")
    # SFT refuses what teaches another format.
    for process in ("", "Red is first.", "<think>Red.", "<think>Red.</think> So:"):
        with refused("process"):
            sft_ids(process=process)
    with refused("process"):
        sft_ids(solution="<answer>A</answer>.")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'][-1]['text'] }}", r"gives 0 tokens <\|video_pad\|> for one video, expected 1"),
        ("<|video_pad|><|video_pad|>{{ messages[0]['content'][-1]['text'] }}", r"gives 2 tokens <\|video_pad\|>"),
        (None, "no chat template"),
        (
            "You are \ud83d helpful.\n" + TOKENIZER.chat_template,
            r"the chat template of .* adds text of its own, such as a system prompt",
        ),
    ],
)
def test_a_chat_template_that_does_not_serve(template: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ids_of(tokenizer=copy_tokenizer(template))


@pytest.mark.parametrize("space", ["", "\n", " \n\t"])
def test_sft_ids_train_the_answer_alone(space: str) -> None:
    ids, mask = sft_ids(process=space + CHOICE.process + space, solution=space + CHOICE.solution + space)
    assert (ids.dtype, mask.dtype, ids.shape) == (torch.int64, torch.bool, mask.shape)
    prompt = ids_of()
    assert torch.equal(ids[~mask], prompt)
    assert torch.equal(ids[: len(prompt)], prompt)
    assert ids[-1] == special_ids(TOKENIZER).eos
    assert mask[-1]
    answer = TOKENIZER.decode(ids[mask], skip_special_tokens=True)
    assert answer == f"{CHOICE.process}\n{CHOICE.solution}"
    assert format_reward(answer) == 1.0
    assert accuracy_reward(answer, CHOICE.solution, CHOICE.problem_type) == 1.0


THINK, CLOSED = "<think>\n", "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("space", ["", "\n", " \n\t"])
@pytest.mark.parametrize(
    ("opened", "process", "left"),
    [
        (THINK, "<think>{}Red first.</think>", "Red first.</think>\n<answer>A</answer>"),
        (THINK, "<think>{}</think>", "</think>\n<answer>A</answer>"),
        (CLOSED, "<think>{}</think>", "<answer>A</answer>"),
    ],
)
def test_sft_ids_after_an_answer_that_the_template_opens(opened: str, process: str, left: str, space: str) -> None:
    """The opened tags stand in the prompt, once; the loss is on what the model has to write."""
    tokenizer = opening(TOKENIZER, opened)
    sample = replace(CHOICE, process=process.format(space))
    ids, mask = build_sft_ids(tokenizer, sample, VIDEO, 1000, opened=opened)
    assert torch.equal(ids[~mask], ids_of(tokenizer=tokenizer))
    assert tokenizer.decode(ids[~mask]).endswith(f"<|im_start|>assistant\n{opened}")
    assert tokenizer.decode(ids[mask]) == f"{left}<|im_end|>"
    assert tokenizer.decode(ids).rpartition("<|im_start|>")[2].count("<think>") == 1
    assert format_reward(left, opened=opened) == 1.0


@pytest.mark.parametrize(
    ("opened", "process"),
    [
        (THINK, "Red first.</think>"),
        (THINK, "Red first."),
        (THINK, "<think>Red first."),
        (THINK, "<think>Red <think>first.</think>"),
        (CLOSED, RED),
        ("Well: <think>", RED),
    ],
)
def test_sft_data_that_do_not_begin_as_the_template_does(opened: str, process: str) -> None:
    with refused("process", f"problem q1: .*got .*{process[:10]}"):
        build_sft_ids(opening(TOKENIZER, opened), replace(CHOICE, process=process), VIDEO, 1000, opened=opened)


def changed(part: str, other: str) -> str:
    """The template with another part in the place of one."""
    assert part in CHAT_TEMPLATE
    return CHAT_TEMPLATE.replace(part, other)


def ending(text: str) -> str:
    """The template with a Jinja text at the end of a prompt."""
    return CHAT_TEMPLATE.removesuffix(END) + text + END


PART, TYPE = "{{ part['text'] }}", "{{ part['type'] }}_pad"
PAD = f"<|vision_start|><|{TYPE}|><|vision_end|>"
END = "{% endif %}"
ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
CHANGES = ("", "| trim | lower", "| e", "[:200]", ".split('\\n')[0]", "| replace('\\n', ' ')")
TEMPLATES: list[tuple[str | None, str]] = [
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
    *((changed(PART, f"{{{{ part['text'] {how} }}}}" if how else ""), "leaves out or changes") for how in CHANGES),
    (changed(PART, PART + PART), "repeats the question"),
    (changed(PAD, ""), r"gives 0 tokens <\|video_pad\|> for a prompt with video, expected 1"),
    (changed(PAD, PAD + PAD), r"gives 2 tokens <\|video_pad\|> for a prompt with video"),
    (changed(TYPE, "video_pad"), r"0 tokens <\|image_pad\|>|1 tokens <\|video_pad"),
    (changed(PART, PART + "<|image_pad|>"), r"gives 1 tokens <\|image_pad\|> for a prompt with text"),
    (changed(ANSWER, ""), "opens no turn for the answer"),
    *(
        (ending(f"{{{{ {opened!r} }}}}"), rf"opens an answer with {re.escape(repr(opened))}, .*: nothing\. ")
        for opened in (THINK, CLOSED, "<answer>", "Sure! ")
    ),
    (changed("assistant{{ '\\n' }}", "assistant<think>"), "ends a prompt with text by .*cannot be told"),
    (changed("<|im_start|>assistant", "<|im_start|>model"), "begins an earlier answer by .*cannot be told"),
    (changed("{% for message in messages %}", "{% for message in messages[:1] %}"), "leaves out an earlier answer"),
    (ending("{{ '<think>' if messages[0]['content'][1] }}"), "differently by the kind of prompt"),
]


@pytest.mark.parametrize(("template", "message"), TEMPLATES)
def test_a_template_that_loses_something_is_refused(template: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=f"chat template.*{message}|{message}") as raised:
        check_template(copy_tokenizer(template), "MODEL")
    assert "MODEL" in str(raised.value)
    check_template(copy_tokenizer(CHAT_TEMPLATE), "MODEL")


# Templates of thinking models put reasoning before the last answer of a conversation, and some before every one.
HEAD = "<|im_start|>{{ message['role'] }}{{ '\\n' }}"
LAST = changed(HEAD, HEAD + "{% if HERE %}{{ EMPTY }}{% endif %}")
ASSISTANT = "message['role'] == 'assistant'"


@pytest.mark.parametrize("here", ["false", f"{ASSISTANT} and loop.last", ASSISTANT])
@pytest.mark.parametrize("opened", ["", THINK, CLOSED])
def test_what_a_template_opens_an_answer_with(opened: str, here: str) -> None:
    family = replace(QWEN2_5_VL, opened=(CLOSED, THINK))
    template = LAST.replace("HERE", here).replace("EMPTY", repr(CLOSED))
    tokenizer = opening(copy_tokenizer(template), opened)
    check_template(tokenizer, "MODEL", family)
    assert opened_text(tokenizer, "MODEL", family) == opened
    for known in ((), ("<think>",), (CLOSED + THINK,)):
        if opened:
            with pytest.raises(ConfigError, match=r"opens an answer with .<think>.* remove that text from the end"):
                opened_text(tokenizer, "MODEL", replace(QWEN2_5_VL, opened=known))
