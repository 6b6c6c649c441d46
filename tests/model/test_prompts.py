"""Prompts in the chat template of Qwen2.5-VL's tokenizer, the ids that SFT trains on, and refused templates."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHAT_TEMPLATE, make_media, make_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from videor1.errors import ConfigError
from videor1.model.prompts import build_input_ids, build_sft_ids, expand_media, question_text, special_ids
from videor1.model.template import check_template
from videor1.rewards import accuracy_reward, format_reward
from videor1.types import Media, Sample, SampleError

CHOICE = Sample(
    index=0,
    problem_id="q1",
    problem="Which colour comes first?",
    data_type="video",
    problem_type="multiple choice",
    solution="<answer>A</answer>",
    path=Path("/data/clip.mp4"),
    options=("A. red", "B. blue"),
    process="<think>Red is there from the start.</think>",
)
VIDEO = make_media("video", (4, 4, 6))
TOKENIZER = make_tokenizer()


def ids_of(sample: Sample = CHOICE, media: Media | None = VIDEO, limit: int = 1000, tokenizer: Any = None) -> Any:
    return build_input_ids(tokenizer or TOKENIZER, sample, media, max_prompt_length=limit)


def copy_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.mark.parametrize(
    ("problem_type", "word"),
    [
        ("multiple choice", "letter"),
        ("numerical", "number"),
        ("OCR", "text"),
        ("free-form", "words"),
        ("regression", "number"),
    ],
)
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


@pytest.mark.parametrize("unk", [None, "[UNK]"])
def test_special_ids_name_what_is_missing(unk: str | None) -> None:
    vocab = {"[UNK]": 0, "<|im_end|>": 1, "<|endoftext|>": 2, "<|image_pad|>": 3, "<|vision_start|>": 4}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
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


def test_expanded_media_keep_what_is_around_them() -> None:
    special, media = special_ids(TOKENIZER), make_media("image", (1, 4, 6))
    ids = [5, special.video_pad, special.image_pad, 6]
    expanded = expand_media(special, ids, CHOICE, media, max_prompt_length=9)
    assert expanded.tolist() == [5, special.video_pad, *6 * [special.image_pad], 6]
    assert len(ids) == 4
    with pytest.raises(SampleError, match=r"9 tokens \(6 of them the image's\), the limit is 8: .* lower max_pixels"):
        expand_media(special, ids, CHOICE, media, max_prompt_length=8, options="max_pixels")
    with pytest.raises(SampleError, match="has 2 tokens, the limit is 1") as error:
        expand_media(special, [5, 6], CHOICE, None, max_prompt_length=1)
    assert error.value.kind == "too_long"


def test_a_prompt_at_the_limit_passes_and_one_token_more_does_not() -> None:
    length = len(ids_of())
    assert len(ids_of(limit=length)) == length
    with pytest.raises(
        SampleError, match=rf"{length} tokens \(24 of them the video's\), the limit is {length - 1}"
    ) as e:
        ids_of(limit=length - 1)
    assert (e.value.kind, e.value.path) == ("too_long", "/data/clip.mp4")
    length = len(build_sft_ids(TOKENIZER, CHOICE, VIDEO, 1000)[0])
    assert len(build_sft_ids(TOKENIZER, CHOICE, VIDEO, length)[0]) == length
    message = rf"{length} tokens \(\d+ prompt, \d+ completion\), the limit is {length - 1}"
    with pytest.raises(SampleError, match=message) as e:
        build_sft_ids(TOKENIZER, CHOICE, VIDEO, length - 1)
    assert e.value.kind == "too_long"


@pytest.mark.parametrize("token", ["<|video_pad|>", "<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|endoftext|>"])
def test_special_tokens_are_refused(token: str) -> None:
    for where, text in (("problem", f"Look: {token}"), ("options", ("A. red", f"Look: {token}"))):
        with pytest.raises(SampleError) as e:
            ids_of(replace(CHOICE, **{where: text}))
        assert e.value.kind == "special_token"
        assert token in str(e.value)
    with pytest.raises(SampleError) as e:
        build_sft_ids(TOKENIZER, replace(CHOICE, process=f"<think>Red.{token}</think>"), VIDEO, 1000)
    assert e.value.kind == "special_token"


@pytest.mark.parametrize("problem", ["a <|video_pad| > b", "<|im_", "{{ 7 * 7 }} {% if %}", "é\u202e 视频 \x00", ""])
def test_odd_questions_reach_the_prompt_as_they_are(problem: str) -> None:
    ids = ids_of(replace(CHOICE, problem=problem))
    assert f"<|vision_end|>{problem}\nOptions:" in TOKENIZER.decode(ids)
    assert ids.tolist().count(special_ids(TOKENIZER).video_pad) == 24


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


def test_media_must_be_the_samples() -> None:
    for media in (None, make_media("image", (4, 4, 6))):
        with pytest.raises(AssertionError):
            ids_of(media=media)


@pytest.mark.parametrize("space", ["", "\n", " \n\t"])
def test_sft_ids_train_the_answer_alone(space: str) -> None:
    sample = replace(CHOICE, process=space + CHOICE.process + space, solution=space + CHOICE.solution + space)
    ids, mask = build_sft_ids(TOKENIZER, sample, VIDEO, 1000)
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


@pytest.mark.parametrize(
    ("process", "solution"),
    [
        ("", "<answer>A</answer>"),
        ("Red is first.", "<answer>A</answer>"),
        ("<think>Red.", "<answer>A</answer>"),
        ("<think>Red.</think> So:", "<answer>A</answer>"),
        ("<think>Red.</think>", "<answer>A</answer>."),
    ],
)
def test_sft_refuses_what_teaches_another_format(process: str, solution: str) -> None:
    with pytest.raises(SampleError) as e:
        build_sft_ids(TOKENIZER, replace(CHOICE, process=process, solution=solution), VIDEO, 1000)
    assert e.value.kind == "process"


def test_text_that_the_tokenizer_cannot_encode_is_the_samples_fault() -> None:
    for changes in ({"problem": "Which \ud83d?"}, {"options": ("A. \udc00", "B. blue")}):
        with pytest.raises(SampleError, match="text that the tokenizer cannot encode") as error:
            ids_of(replace(CHOICE, **changes))
        assert error.value.kind == "bad_text"
    with pytest.raises(SampleError, match="cannot encode"):
        build_sft_ids(TOKENIZER, replace(CHOICE, process="<think>\ud83d</think>"), VIDEO, 1000)


PART = "{{ part['text'] }}"
PAD = "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"


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
        check_template(copy_tokenizer(template), "MODEL")
    assert "MODEL" in str(raised.value)
    check_template(copy_tokenizer(CHAT_TEMPLATE), "MODEL")
