from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from videor1.errors import ConfigError
from videor1.model.prompts import build_input_ids, build_sft_ids, expand_media, question_text, special_ids
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


def make_media(kind="video", grid=(4, 4, 6)):
    patches = torch.zeros(grid[0] * grid[1] * grid[2], 1176, dtype=torch.uint8)
    return Media(kind, patches, grid, 1.0 if kind == "video" else 0.0, 0.0)


def copy_tokenizer(chat_template):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


def test_question_text_of_multiple_choice():
    lines = question_text(CHOICE).split("\n")
    assert lines[:4] == ["Which colour comes first?", "Options:", "A. red", "B. blue"]
    assert len(lines) == 5
    tags = [lines[4].index(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    assert tags == sorted(tags)
    assert "letter" in lines[4][tags[-1] :]


@pytest.mark.parametrize(
    ("problem_type", "word"),
    [("numerical", "number"), ("OCR", "text"), ("free-form", "words"), ("regression", "number")],
)
def test_question_text_of_other_types_has_no_options(problem_type, word):
    text = question_text(replace(CHOICE, problem_type=problem_type))
    assert "Options:" not in text
    assert "A. red" not in text
    assert word in text.rsplit("</answer>", 1)[1]


def test_special_ids():
    ids = special_ids(make_tokenizer())
    names = [
        "<|im_end|>",
        "<|endoftext|>",
        "<|video_pad|>",
        "<|image_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
    ]
    values = [ids.eos, ids.pad, ids.video_pad, ids.image_pad, ids.vision_start, ids.vision_end, ids.vision_pad]
    assert make_tokenizer().convert_ids_to_tokens(values) == names
    assert set(ids.vision) == set(values[2:])


@pytest.mark.parametrize("unk", [None, "[UNK]"])
def test_special_ids_name_what_is_missing(unk):
    vocab = {"[UNK]": 0, "<|im_end|>": 1, "<|endoftext|>": 2, "<|image_pad|>": 3, "<|vision_start|>": 4}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unk)
    with pytest.raises(ConfigError, match=r"no token <\|video_pad\|>, <\|vision_end\|>; expected .* Qwen2-VL"):
        special_ids(tokenizer)


@pytest.mark.parametrize(("kind", "grid"), [("video", (4, 4, 6)), ("image", (1, 8, 10))])
def test_input_ids_put_the_media_first_and_expand_it(kind, grid):
    tokenizer = make_tokenizer()
    sample = replace(CHOICE, data_type=kind)
    ids = build_input_ids(tokenizer, sample, make_media(kind, grid), max_prompt_length=1000)
    assert ids.dtype == torch.int64
    assert ids.dim() == 1
    tokens = grid[0] * grid[1] * grid[2] // 4
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{f'<|{kind}_pad|>' * tokens}<|vision_end|>{question_text(sample)}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.decode(ids) == expected
    assert ids.tolist() == tokenizer(expected)["input_ids"]


def test_input_ids_of_text():
    tokenizer = make_tokenizer()
    ids = build_input_ids(tokenizer, replace(CHOICE, data_type="text", path=None), None, max_prompt_length=1000)
    assert not set(special_ids(tokenizer).vision) & set(ids.tolist())
    assert f"user\n{question_text(CHOICE)}<|im_end|>" in tokenizer.decode(ids)


def test_expanded_media_keep_what_is_around_them():
    special, media = special_ids(make_tokenizer()), make_media("image", (1, 4, 6))
    ids = [5, special.video_pad, special.image_pad, 6]
    expanded = expand_media(special, ids, CHOICE, media, max_prompt_length=9)
    assert expanded.tolist() == [5, special.video_pad, *6 * [special.image_pad], 6]
    assert len(ids) == 4
    with pytest.raises(SampleError, match=r"9 tokens \(6 of them the image's\), the limit is 8: .* lower max_pixels"):
        expand_media(special, ids, CHOICE, media, max_prompt_length=8, options="max_pixels")
    with pytest.raises(SampleError, match="has 2 tokens, the limit is 1") as error:
        expand_media(special, [5, 6], CHOICE, None, max_prompt_length=1)
    assert error.value.kind == "too_long"


def test_prompt_at_the_limit_passes_and_one_token_more_does_not():
    tokenizer, media = make_tokenizer(), make_media()
    length = len(build_input_ids(tokenizer, CHOICE, media, max_prompt_length=1000))
    assert len(build_input_ids(tokenizer, CHOICE, media, max_prompt_length=length)) == length
    message = rf"{length} tokens \(24 of them the video's\), the limit is {length - 1}"
    with pytest.raises(SampleError, match=message) as e:
        build_input_ids(tokenizer, CHOICE, media, max_prompt_length=length - 1)
    assert e.value.kind == "too_long"
    assert e.value.path == "/data/clip.mp4"


@pytest.mark.parametrize("token", ["<|video_pad|>", "<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|endoftext|>"])
@pytest.mark.parametrize("where", ["problem", "options"])
def test_special_tokens_in_the_question_are_refused(token, where):
    text = f"Look: {token}"
    sample = replace(CHOICE, **{where: text if where == "problem" else ("A. red", text)})
    with pytest.raises(SampleError) as e:
        build_input_ids(make_tokenizer(), sample, make_media(), max_prompt_length=1000)
    assert e.value.kind == "special_token"
    assert token in str(e.value)


@pytest.mark.parametrize("problem", ["a <|video_pad| > b", "<|im_", "{{ 7 * 7 }} {% if %}", "é\u202e 视频 \x00", ""])
def test_odd_questions_reach_the_prompt_as_they_are(problem):
    tokenizer = make_tokenizer()
    ids = build_input_ids(tokenizer, replace(CHOICE, problem=problem), make_media(), max_prompt_length=1000)
    assert f"<|vision_end|>{problem}\nOptions:" in tokenizer.decode(ids)
    assert ids.tolist().count(special_ids(tokenizer).video_pad) == 24


@pytest.mark.parametrize(
    ("template", "count"),
    [
        ("{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}", 0),
        ("<|video_pad|><|video_pad|>{{ messages[0]['content'][-1]['text'] }}", 2),
    ],
)
def test_chat_template_without_one_place_for_the_media(template, count):
    with pytest.raises(ConfigError, match=rf"gives {count} tokens <\|video_pad\|> for one video, expected 1"):
        build_input_ids(copy_tokenizer(template), CHOICE, make_media(), max_prompt_length=1000)


def test_tokenizer_without_chat_template():
    with pytest.raises(ConfigError, match="no chat template"):
        build_input_ids(copy_tokenizer(None), CHOICE, make_media(), max_prompt_length=1000)


def test_media_must_be_the_samples():
    with pytest.raises(AssertionError):
        build_input_ids(make_tokenizer(), CHOICE, None, max_prompt_length=1000)
    with pytest.raises(AssertionError):
        build_input_ids(make_tokenizer(), CHOICE, make_media("image"), max_prompt_length=1000)


@pytest.mark.parametrize("space", ["", "\n", " \n\t"])
def test_sft_ids_train_the_answer_alone(space):
    tokenizer, media = make_tokenizer(), make_media()
    sample = replace(CHOICE, process=space + CHOICE.process + space, solution=space + CHOICE.solution + space)
    ids, mask = build_sft_ids(tokenizer, sample, media, 1000)
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert ids.shape == mask.shape
    prompt = build_input_ids(tokenizer, CHOICE, media, max_prompt_length=1000)
    assert torch.equal(ids[~mask], prompt)
    assert torch.equal(ids[: len(prompt)], prompt)
    assert ids[-1] == special_ids(tokenizer).eos
    assert mask[-1]
    answer = tokenizer.decode(ids[mask], skip_special_tokens=True)
    assert answer == f"{CHOICE.process}\n{CHOICE.solution}"
    assert format_reward(answer) == 1.0
    assert accuracy_reward(answer, CHOICE.solution, CHOICE.problem_type) == 1.0


def test_sft_length_limit_counts_the_whole_sample():
    tokenizer, media = make_tokenizer(), make_media()
    length = len(build_sft_ids(tokenizer, CHOICE, media, 1000)[0])
    assert len(build_sft_ids(tokenizer, CHOICE, media, length)[0]) == length
    message = rf"{length} tokens \(\d+ prompt, \d+ completion\), the limit is {length - 1}"
    with pytest.raises(SampleError, match=message) as e:
        build_sft_ids(tokenizer, CHOICE, media, length - 1)
    assert e.value.kind == "too_long"


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
def test_sft_refuses_what_teaches_another_format(process, solution):
    with pytest.raises(SampleError) as e:
        build_sft_ids(make_tokenizer(), replace(CHOICE, process=process, solution=solution), make_media(), 1000)
    assert e.value.kind == "process"


def test_sft_refuses_special_tokens_in_the_answer():
    sample = replace(CHOICE, process="<think>Red.<|im_end|></think>")
    with pytest.raises(SampleError) as e:
        build_sft_ids(make_tokenizer(), sample, make_media(), 1000)
    assert e.value.kind == "special_token"


def test_text_that_the_tokenizer_cannot_encode_is_the_samples_fault() -> None:
    tokenizer = make_tokenizer()
    for changes in ({"problem": "Which \ud83d?"}, {"options": ("A. \udc00", "B. blue")}):
        with pytest.raises(SampleError, match="text that the tokenizer cannot encode") as error:
            build_input_ids(tokenizer, replace(CHOICE, **changes), make_media(), max_prompt_length=1000)
        assert error.value.kind == "bad_text"
    with pytest.raises(SampleError, match="cannot encode"):
        build_sft_ids(tokenizer, replace(CHOICE, process="<think>\ud83d</think>"), make_media(), 1000)


def test_a_system_prompt_that_the_tokenizer_cannot_encode_is_the_models_fault() -> None:
    template = "You are \ud83d helpful.\n" + make_tokenizer().chat_template
    with pytest.raises(ConfigError, match=r"the chat template of .* adds text of its own, such as a system prompt"):
        build_input_ids(copy_tokenizer(template), CHOICE, make_media(), max_prompt_length=1000)
