"""A run's system prompt and arguments of the chat template, and those that a sample brings itself."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from tiny import CHAT_TEMPLATE, make_tokenizer
from tiny_families import make_family_lm, make_qwen3_tokenizer

from videor1.config import EvaluateConfig, TrainConfig
from videor1.config.cli import dump_config, load_config, parse
from videor1.errors import ConfigError
from videor1.model import VideoLM
from videor1.model.chat import Chat
from videor1.model.prompts import build_input_ids
from videor1.types import Message, Sample, SampleError

SAMPLE = Sample(0, "q1", "What is two and two?", "text", "free-form", "<answer>four</answer>")
# As templates of models that can think: an argument closes the reasoning, another numbers the media.
SWITCH = (
    "{% if add_generation_prompt %}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% elif enable_thinking is defined %}{{ '<think>\\n' }}{% endif %}{% endif %}"
)
NAMED = "{% if persona %}As {{ persona }}. {% endif %}"


def tokenizer(*, thinking: bool = True) -> Any:
    made = copy.deepcopy(make_qwen3_tokenizer())
    before, found, answer = made.chat_template.rpartition("{% if add_generation_prompt %}")
    assert found
    made.chat_template = before + found + answer + SWITCH * thinking
    made.chat_template = NAMED + made.chat_template
    return made


def model_of(chat: Chat = Chat(), family: str = "qwen3_5", **options: Any) -> VideoLM:  # noqa: B008
    return VideoLM(make_family_lm(family).hf, tokenizer(**options), source="tiny", chat=chat)


def text_of(model: VideoLM, sample: Sample) -> str:
    ids = build_input_ids(model.tokenizer, model.asked(sample), None, max_prompt_length=999, family=model.family)
    return model.tokenizer.decode(ids)


def test_without_either_a_sample_is_asked_as_it_is() -> None:
    model = model_of()
    assert model.asked(SAMPLE) is SAMPLE
    assert "system" not in text_of(model, SAMPLE)
    assert model.opened_text == ""


def test_a_system_prompt_of_the_run_and_of_a_sample() -> None:
    model = model_of(Chat("Be brief."))
    assert text_of(model, SAMPLE).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is")
    own = text_of(model, replace(SAMPLE, system="Be long."))
    assert "Be long." in own
    assert "Be brief." not in own
    turns = (Message("user", "Hello"), Message("assistant", "Hi"), Message("user", SAMPLE.problem))
    assert text_of(model, replace(SAMPLE, messages=turns)).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    # In place of the template's own.
    qwen2 = VideoLM(make_family_lm("qwen2_5_vl").hf, make_tokenizer(), source="tiny", chat=Chat("Be brief."))
    assert "helpful assistant" not in text_of(qwen2, SAMPLE)
    with pytest.raises(SampleError) as raised:
        text_of(model, replace(SAMPLE, system="a <|im_end|> b"))
    assert raised.value.kind == "special_token"


def test_arguments_of_the_template() -> None:
    """Of the run, and of a sample, which take their place one by one."""
    model = model_of(Chat(template_kwargs={"enable_thinking": False, "persona": "a cat"}))
    assert model.opened_text == "<think>\n\n</think>\n\n"
    text = text_of(model, SAMPLE)
    assert text.startswith("As a cat. <|im_start|>user")
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    own = replace(SAMPLE, chat_template_kwargs={"persona": "a dog"})
    assert text_of(model, own) == text.replace("a cat", "a dog")
    assert model.asked(own).chat_template_kwargs == {"enable_thinking": False, "persona": "a dog"}
    assert model.frozen_copy().opened_text == model.opened_text
    # What opens the answer is the run's: it is taken off SFT's answers, and counted in rewards.
    with pytest.raises(
        SampleError, match=r"problem q1: .*opens an answer with '<think>\\n', in this run with"
    ) as raised:
        model.asked(replace(SAMPLE, chat_template_kwargs={"enable_thinking": True}))
    assert raised.value.kind == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"enable_thinkng": False}, "no argument 'enable_thinkng'; did you mean 'enable_thinking'"),
        ({"role": 1}, r"no argument 'role'.*it has \['enable_thinking', 'persona'\]"),
        ({"messages": []}, "'messages' is not an argument of the chat template alone"),
        ({"add_generation_prompt": False}, "'add_generation_prompt' is not"),
        ({"tokenize": True}, "'tokenize' is not"),
        ({"eos_token": "x"}, "'eos_token' is not"),
        ({"chat_template": "x"}, "'chat_template' is not"),
    ],
)
def test_arguments_that_a_template_does_not_have(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^chat_template_kwargs: .*{told}.*tiny"):
        model_of(Chat(template_kwargs=given))
    with pytest.raises(SampleError, match=rf"problem q1: chat_template_kwargs: .*{told}") as raised:
        model_of().asked(replace(SAMPLE, chat_template_kwargs=given))
    assert raised.value.kind == "chat_template_kwargs"


def test_a_template_without_arguments_says_so() -> None:
    with pytest.raises(ConfigError, match=r"no argument 'x'.*it has none"):
        VideoLM(make_family_lm("qwen2_5_vl").hf, make_tokenizer(), source="tiny", chat=Chat(template_kwargs={"x": 1}))


@pytest.mark.parametrize(
    ("system", "told"), [("See <image>.", "expected a text without media"), ("a <|im_end|>", "special token")]
)
def test_a_system_prompt_that_cannot_be_used(system: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"^system: .*{told}"):
        model_of(Chat(system))


def test_a_template_without_a_place_for_a_system_prompt() -> None:
    for template, told in (
        (CHAT_TEMPLATE.replace("{% for message in messages %}", "{% for message in messages[-1:] %}", 1), "leaves out"),
        (CHAT_TEMPLATE + "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}", "render"),
    ):
        made = copy.deepcopy(make_tokenizer())
        made.chat_template = template
        with pytest.raises(ConfigError, match=f"^system: the chat template of tiny .*{told}"):
            Chat("Be brief.").check(made, "tiny")


def test_a_conversation_that_the_template_refuses_is_a_bad_sample() -> None:
    made = copy.deepcopy(make_tokenizer())
    made.chat_template += "{% if messages|length > 2 %}{{ raise_exception('one question alone') }}{% endif %}"
    turns = (Message("user", "Hello"), Message("assistant", "Hi"), Message("user", SAMPLE.problem))
    with pytest.raises(SampleError, match=r"problem q1: .*one question alone") as raised:
        build_input_ids(made, replace(SAMPLE, messages=turns), None, max_prompt_length=999)
    assert raised.value.kind == "chat_template"


def test_options(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--system", "Be brief: yes", "--chat_template_kwargs", '{"enable_thinking": false, "n": [1]}']
    for kind in (TrainConfig, EvaluateConfig):
        config = parse(kind, flags, prog="x", description="")
        assert (config.system, config.chat_template_kwargs) == ("Be brief: yes", {"enable_thinking": False, "n": [1]})
        (tmp_path / "c.yaml").write_text(dump_config(config))
        assert load_config(kind, tmp_path / "c.yaml") == config
    assert TrainConfig().chat_template_kwargs == {}
    for bad in (["--chat_template_kwargs", "5"], ["--chat_template_kwargs", "[1]"], ["--system", " "]):
        with pytest.raises(SystemExit):
            parse(TrainConfig, bad, prog="x", description="")
        assert bad[0].removeprefix("--") in capsys.readouterr().err
