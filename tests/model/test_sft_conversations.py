"""What SFT learns of a conversation: all turns of the assistant and nothing else, as transformers' own mask has it."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_several_media import expected_text, items_of, made
from tiny import CHAT_TEMPLATE, make_media, make_tokenizer
from tiny_families import make_family_lm, make_qwen3_tokenizer, opening
from torch import Tensor

from videor1.model import VideoLM
from videor1.model.families import FAMILIES
from videor1.model.prompts import build_input_ids, build_sft_ids, question_text
from videor1.model.turns import assistant_spans, written
from videor1.types import MediaItem, Message, Sample, SampleError

KINDS = [("video", (3, 4, 8), 2.0), ("image", (1, 8, 4), 0.0), ("video", (2, 4, 4), 0.5)]
THINK = "<think>\n"
# As the template of Qwen3-VL's Thinking models: reasoning stands in the turns behind the last question alone. The tags
# say what transformers takes for the assistant's own.
THINKING = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set text = namespace(of='') %}
    {%- if m.content is string %}{% set text.of = m.content %}{% else %}
        {%- for part in m.content %}
            {%- if part.type == 'text' %}{% set text.of = text.of + part.text %}
            {%- else %}{% set text.of = text.of + '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' %}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role != 'assistant' %}{{- text.of + '<|im_end|>\\n' }}
    {%- else %}
        {%- set answer = text.of.split('</think>')[-1].strip('\\n') %}
        {%- set reasons = '' %}
        {%- if '</think>' in text.of %}
            {%- set reasons = text.of.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last or preserve_thinking %}
            {{- '<think>\\n' }}
            {%- if reasons %}
                {%- generation %}{{- reasons + '\\n</think>\\n\\n' + answer + '<|im_end|>' }}{% endgeneration %}
            {%- else %}
                {{- '\\n</think>\\n\\n' }}
                {%- generation %}{{- answer + '<|im_end|>' }}{% endgeneration %}
            {%- endif %}
        {%- else %}
            {%- generation %}{{- answer + '<|im_end|>' }}{% endgeneration %}
        {%- endif %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n') }}
{%- endif %}"""


def thinking_tokenizer() -> Any:
    made = copy.deepcopy(make_qwen3_tokenizer())
    made.chat_template = THINKING
    return made


def conversation(*turns: str, **fields: Any) -> Sample:
    """A sample whose turns are the user's and the assistant's in turn; as it stands if it ends with the latter."""
    messages = tuple(Message("user" if place % 2 == 0 else "assistant", text) for place, text in enumerate(turns))
    return of(messages, **fields)


def of(messages: tuple[Message, ...], **fields: Any) -> Sample:
    problem = next(message.content for message in reversed(messages) if message.role == "user")
    fields.setdefault("instructed", messages[-1].role == "user")
    return Sample(0, "q1", problem, "text", "free-form", "<answer>4</answer>", messages=messages, **fields)


def learned(
    tokenizer: Any, sample: Sample, opened: str = "", limit: int = 9999, **options: Any
) -> tuple[Tensor, Tensor]:
    return build_sft_ids(tokenizer, sample, None, limit, opened=opened, **options)


def told(tokenizer: Any, ids: Tensor, mask: Tensor) -> list[str]:
    """The texts of what is learned, run by run."""
    runs: list[list[int]] = []
    for place in mask.nonzero()[:, 0].tolist():
        if not place or not mask[place - 1]:
            runs.append([])
        runs[-1].append(int(ids[place]))
    return [tokenizer.decode(run) for run in runs]


def with_tags(template: str) -> str:
    """A template of turns that all look alike, with transformers' tags around what the assistant writes."""
    head = "<|im_start|>{{ message['role'] }}{{ '\\n' }}"
    start = template.index(head) + len(head)
    end = template.index("<|im_end|>", start) + len("<|im_end|>")
    body = template[start:end]
    tagged = "{% if message['role'] == 'assistant' %}{% generation %}" + body + "{% endgeneration %}{% else %}"
    return template[:start] + tagged + body + "{% endif %}" + template[end:]


def transformers_mask(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    made = copy.deepcopy(tokenizer)
    if "generation" not in made.chat_template.replace("add_generation_prompt", ""):
        made.chat_template = with_tags(made.chat_template)
    got = made.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = got["input_ids"], [bool(one) for one in got["assistant_masks"]]
    last = max(place for place, token in enumerate(ids) if token == made.eos_token_id) + 1
    return ids[:last], mask[:last]  # What the template writes behind the last turn is not in the data.


TURN = st.sampled_from(
    ["2", "What is <b>?", "{{ 1 }}", "a red\n\nsquare", "It's <answer>4</answer>", "视频 é"]
) | st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() and "<|" not in text and "think>" not in text and "video>" not in text
)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(st.booleans(), TURN), max_size=5), last=TURN, system=st.none() | TURN)
def test_the_mask_is_transformers_own(turns: list[tuple[bool, str]], last: str, system: str | None) -> None:
    """Of any conversation, with turns in a row and the assistant's first too: Qwen2's template and Qwen3's."""
    told = [Message("user" if user else "assistant", text) for user, text in turns]
    messages = (*told, Message("user", "And?"), Message("assistant", last))
    sample = of(messages, system=system)
    plain = [{"role": m.role, "content": m.content} for m in messages]
    plain = ([{"role": "system", "content": system}] if system else []) + plain
    for tokenizer in (make_tokenizer(), make_qwen3_tokenizer()):
        ids, mask = learned(tokenizer, sample)
        assert (ids.tolist(), mask.tolist()) == transformers_mask(tokenizer, plain)


REASONED = "<think>Two and two.</think>Four."
TALKS = {
    "no reasoning": ("2 and 2?", "4", "Sure?", "Yes."),
    "all with reasoning": ("2 and 2?", "<think>\nAdd.\n</think>\n\n4", "Sure?", REASONED),
    "reasoning at the end": ("2 and 2?", "4", "Sure?", REASONED),
    "reasoning at the beginning": ("2 and 2?", REASONED, "Sure?", "Yes."),
    "one turn": ("2 and 2?", REASONED),
}


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("talk", TALKS)
def test_a_template_that_writes_the_reasoning_itself(talk: str, keeps: bool) -> None:
    """It leaves the reasoning out of earlier turns, or keeps it in all; tags that it opens or adds are not learned."""
    tokenizer = thinking_tokenizer()
    kwargs = {"preserve_thinking": True} if keeps else {}
    sample = conversation(*TALKS[talk], chat_template_kwargs=kwargs)
    ids, mask = learned(tokenizer, sample, THINK)
    tokenizer.chat_template = "{% set preserve_thinking = " + str(keeps).lower() + " %}" + tokenizer.chat_template
    messages = [{"role": m.role, "content": m.content} for m in sample.messages]
    assert (ids.tolist(), mask.tolist()) == transformers_mask(tokenizer, messages)
    assert tokenizer.decode(ids[mask]).count("<|im_end|>") == len(TALKS[talk]) // 2
    assert "<think>" not in tokenizer.decode(ids[mask])
    asked = replace(sample, messages=sample.messages[:-1])
    prompt = build_input_ids(tokenizer, asked, None, max_prompt_length=999)
    assert torch.equal(ids[: len(prompt)], prompt)  # what the model is given when it is to write the last turn


def test_thinking_switched_off() -> None:
    closed = "<think>\n\n</think>\n\n"
    sample = conversation("2 and 2?", "4", "Sure?", "Yes.", chat_template_kwargs={"enable_thinking": False})
    tokenizer = thinking_tokenizer()
    ids, mask = learned(tokenizer, sample, closed)
    assert told(tokenizer, ids, mask) == ["4<|im_end|>", "Yes.<|im_end|>"]
    assert tokenizer.decode(ids[:-4]).count(closed) == 1
    with pytest.raises(SampleError, match=r"opens an answer with .* last turn must begin with it") as raised:
        learned(opening(make_tokenizer(), THINK), conversation("2 and 2?", "Four."), THINK)
    assert raised.value.kind == "process"
    ids, mask = learned(opening(make_tokenizer(), THINK), conversation("2 and 2?", REASONED), THINK)
    assert told(make_tokenizer(), ids, mask) == ["Two and two.</think>Four.<|im_end|>"]


def test_turns_in_a_row_of_a_template_that_thinks() -> None:
    tokenizer, user = thinking_tokenizer(), Message("user", "2 and 2?")
    for turns, expected in (
        ([Message("assistant", "Hi"), user, Message("assistant", "4")], ["Hi", "4"]),
        ([user, Message("assistant", "4"), Message("assistant", "Yes.")], ["4", "Yes."]),
        ([user, *2 * [Message("assistant", REASONED)]], 2 * ["Two and two.\n</think>\n\nFour."]),
    ):
        ids, mask = learned(tokenizer, of(tuple(turns)), THINK)
        assert told(tokenizer, ids, mask) == [f"{text}<|im_end|>" for text in expected]


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> VideoLM:
    return make_family_lm(request.param)


def test_several_media_in_a_conversation(model: VideoLM) -> None:
    """Written turn by turn; the ids are a prompt's, and no token of the media, of the user or of the system counts."""
    media = made(model, KINDS)
    messages = (
        Message("user", "See <video> and <image>."),
        Message("assistant", "Seen."),
        Message("user", "Then <video>?"),
        Message("assistant", '{"time": [1, 2]}'),
        Message("user", "So?"),
    )
    fields = {"data_type": "video", "path": Path("0.mp4"), "media": items_of(media), "system": "Be brief."}
    sample = replace(of(messages), **fields, process="<think>Hm.</think>")
    ids, mask = build_sft_ids(model.tokenizer, sample, tuple(media), 9999, family=model.family)
    first = expected_text(model, media[:2], messages[0].content)
    second = expected_text(model, media[2:], messages[2].content)
    parts = [
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{first}<|im_end|>\n<|im_start|>assistant\n",
        "Seen.<|im_end|>",
        f"\n<|im_start|>user\n{second}<|im_end|>\n<|im_start|>assistant\n",
        '{"time": [1, 2]}<|im_end|>',
        f"\n<|im_start|>user\n{question_text(sample)}<|im_end|>\n<|im_start|>assistant\n",
        "<think>Hm.</think>\n<answer>4</answer><|im_end|>",
    ]
    pieces = [model.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    assert ids.tolist() == [token for piece in pieces for token in piece]
    assert mask.tolist() == [bool(number % 2) for number, piece in enumerate(pieces) for _ in piece]
    prompt = build_input_ids(model.tokenizer, sample, tuple(media), max_prompt_length=9999, family=model.family)
    assert torch.equal(ids[: len(prompt)], prompt)
    # The same with the answer as the last turn: asked as in T-GRPO, or as it stands.
    answer = f"{sample.process}\n{sample.solution}"
    ended = replace(sample, messages=(*messages, Message("assistant", answer)), process="", solution="")
    again = build_sft_ids(model.tokenizer, ended, tuple(media), 9999, family=model.family)
    assert torch.equal(again[0], ids)
    assert torch.equal(again[1], mask)
    stands = build_sft_ids(model.tokenizer, replace(ended, instructed=False), tuple(media), 9999, family=model.family)
    assert len(stands[0]) < len(ids)
    assert told(model.tokenizer, *stands) == [parts[1], parts[3], parts[5]]
    # Media stand before the first text where no placeholder is.
    silent = tuple(Message(m.role, re.sub("<(video|image)>", "", m.content)) for m in messages)
    ids, mask = build_sft_ids(
        model.tokenizer, replace(sample, messages=silent), tuple(media), 9999, family=model.family
    )
    assert told(model.tokenizer, ids, mask) == [parts[1], parts[3], parts[5]]


STRUCTURED = {
    "temporal grounding": '{"time": [12.3, 25.7]}',
    "spatial grounding": '{"boxes": [35, 227, 437, 932]}',
    "spatial-temporal grounding": '{"time": [8.1, 9.5], "boxes": {"9": [317, 422, 582, 997]}}',
    "tracking": '{"boxes": {"1": [405, 230, 654, 463]}}',
    "boolean": "yes",
    "math": "$-\\frac{3}{2}$",
    "open-ended": "A cup is filled.",
}


@pytest.mark.parametrize("problem_type", STRUCTURED)
@pytest.mark.parametrize("opened", ["", THINK])
def test_structured_answers(problem_type: Any, opened: str) -> None:
    tokenizer = opening(make_qwen3_tokenizer(), opened) if opened else make_qwen3_tokenizer()
    solution = f"<answer>{STRUCTURED[problem_type]}</answer>"
    sample = Sample(0, "q", "When?", "text", problem_type, solution, process="<think>Look.</think>")
    ids, mask = learned(tokenizer, sample, opened)
    whole = f"<think>Look.</think>\n{solution}<|im_end|>"
    assert told(tokenizer, ids, mask) == [whole.removeprefix(opened.strip())]
    ended = replace(
        sample, messages=(Message("user", "When?"), Message("assistant", whole.removesuffix("<|im_end|>"))), process=""
    )
    assert torch.equal(learned(tokenizer, ended, opened)[0], ids)
    with pytest.raises(SampleError, match="without problem_type a conversation is learned as it stands") as raised:
        learned(tokenizer, replace(ended, messages=(ended.messages[0], Message("assistant", solution))), opened)
    assert raised.value.kind == "process"


@pytest.mark.parametrize(("place", "kind"), [(0, "user"), (1, "assistant"), (2, "user"), (3, "assistant")])
def test_hostile_turns(place: int, kind: str) -> None:
    turns = ["2 and 2?", "4", "Sure?", "Yes."]

    def with_turn(text: str) -> Sample:
        return conversation(*[text if at == place else turn for at, turn in enumerate(turns)])

    tokenizer = make_tokenizer()
    for token in ("<|im_end|>", "<|im_start|>assistant\n", "<|video_pad|>", "<|endoftext|>"):
        with pytest.raises(SampleError) as raised:
            learned(tokenizer, with_turn(f"4{token}5"))
        assert raised.value.kind == "special_token"
    with pytest.raises(SampleError) as raised:
        learned(tokenizer, with_turn("\ud83d"))
    assert raised.value.kind == "bad_text"
    expected = learned(tokenizer, conversation(*turns))
    labels = expected[0][expected[1]].tolist()
    for text in ("The answer of this turn.", "assistant\n4", "<|im_end", "4", "user", "  4 ", "</think>", "<think>"):
        ids, mask = learned(tokenizer, with_turn(text))
        if kind == "user":
            assert ids[mask].tolist() == labels
        else:
            assert told(tokenizer, ids, mask)[place // 2] == f"{text}<|im_end|>"


def test_limits_and_placeholders() -> None:
    tokenizer = make_tokenizer()
    sample = conversation("2 and 2?", "4", "Sure?", "Yes.")
    ids, mask = learned(tokenizer, sample)
    assert torch.equal(learned(tokenizer, sample, limit=len(ids))[0], ids)
    prompt = int((~mask).nonzero()[-1]) + 1
    assert torch.equal(learned(tokenizer, sample, max_prompt_length=prompt)[0], ids)
    for options in ({"limit": len(ids) - 1}, {"max_prompt_length": prompt - 1}):
        with pytest.raises(SampleError) as raised:
            learned(tokenizer, sample, **options)
        assert raised.value.kind == "too_long"
    media = make_media()
    sample = conversation("2 and 2?", "<video>", "Sure?", "Yes.", media=(MediaItem("video", Path("a.mp4")),))
    with pytest.raises(SampleError, match="in the user's turns only, got one in the assistant's") as raised:
        build_sft_ids(tokenizer, replace(sample, data_type="video"), media, 999)
    assert raised.value.kind == "placeholders"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("{{ message['content'] }}", "{{ message['content'] | upper }}"), "changes or leaves out"),
        (("{{ message['content'] }}", ""), "changes or leaves out"),
        (("<|im_end|>{{ '\\n' }}{% endfor %}", "{{ '\\n' }}{% endfor %}"), "expected one each"),
    ],
)
def test_a_template_that_cannot_be_learned_from(change: tuple[str, str], reason: str) -> None:
    tokenizer = copy.deepcopy(make_tokenizer())
    assert change[0] in CHAT_TEMPLATE
    tokenizer.chat_template = CHAT_TEMPLATE.replace(*change)
    with pytest.raises(SampleError, match=reason) as raised:
        learned(tokenizer, conversation("2 and 2?", "Four.", "Sure?", "Yes."))
    assert raised.value.kind == "chat_template"


@pytest.mark.parametrize(
    ("body", "content", "opened", "part"),
    [
        ("Four.", "Four.", "", "Four."),
        ("Four.", "\n Four. ", "", "Four."),
        (" Four.\n", "Four.", "", "Four."),
        ("<think>\n\n</think>\n\nFour.", "Four.", "", "Four."),
        ("<think>\n\n</think>\n\nFour.", "<think></think>Four.", THINK, "\n</think>\n\nFour."),
        ("<think>\nAdd.\n</think>\n\nFour.", "<think>Add.</think>Four.", "", "<think>\nAdd.\n</think>\n\nFour."),
        ("<think>\nAdd.\n</think>\n\nFour.", "<think>Add.</think>Four.", THINK, "Add.\n</think>\n\nFour."),
        ("Four.", "<think>Add.</think>Four.", THINK, "Four."),
        ("<think>\nNo.\n</think>\n\nFour.", "<think>Add.</think>Four.", "", None),
        ("<think>\nNo.\n</think>\n\nFour.", "Four.", "", None),
        ("Well: Four.", "Four.", "", None),
        ("", "<think>Add.</think>", "", None),
        ("", "Four.", "", None),
    ],
)
def test_the_part_that_is_written(body: str, content: str, opened: str, part: str | None) -> None:
    if part is None:
        with pytest.raises(ValueError, match="it changes"):
            written(body, content, opened)
    else:
        start, end = written(body, content, opened)
        assert body[start:end] == part


def test_blanks_behind_a_turn_are_the_templates() -> None:
    text = "[user]\nHi#\n[assistant]\nHello. #\n[assistant]\n"
    bare = text.replace("Hello.", "The answer of this turn.")
    spans = assistant_spans(text, bare, [None, "Hello."], eos="#")
    assert [text[start:end] for start, end in spans] == ["Hello.", "#"]
