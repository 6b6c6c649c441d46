"""Train a small tokenizer on the demo's own text, with the special tokens of Qwen's models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from videor1.demo.questions import all_entries
from videor1.model.families import FAMILIES
from videor1.model.prompts import question_text
from videor1.types import Media, Sample

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]  # one token each, but not special: decoding keeps them

# The template of Qwen2.5-VL without tools, and without a default system turn.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}
{{- part.text -}}
{%- elif part.type in ('image', 'video') -%}
{{- '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' -}}
{%- else -%}
{{- raise_exception('content of type ' + part.type + ': expected text, image or video') -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


# What the templates of families whose models think open an answer with.
_OPENED = {"qwen3_5": "<think>\\n"}


def make_tokenizer(family: str = "qwen2_5_vl") -> Qwen2Tokenizer:
    """Return a byte-level BPE tokenizer in which each word of the demo is one token.

    Where a family writes the times of a video's frames into the text, their words are among them.

    Any other text becomes shorter pieces, down to single bytes. ``AutoTokenizer`` can load the saved tokenizer. Its eos
    token is <|im_end|> and its pad token <|endoftext|>.
    """
    core = Tokenizer(models.BPE())
    blank = Qwen2Tokenizer().backend_tokenizer
    core.normalizer, core.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached, because merging ends when every word of the text is one token
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    between_tags = re.compile("|".join(TAGS))
    core.train_from_iterator((piece for text in _texts(family) for piece in between_tags.split(text)), trainer)
    learned = json.loads(core.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|endoftext|>", "<|im_end|>")],
        model_max_length=4096,
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    head = "<|im_start|>assistant\\n"
    tokenizer.chat_template = CHAT_TEMPLATE.replace(head, head + _OPENED.get(family, ""))
    return tokenizer


def _texts(family: str) -> Iterator[str]:
    """Yield all text of the demo, of the chat template and of the family's videos."""
    yield from ("system\n", "user\n", "assistant\n")
    if (video_text := FAMILIES[family].video_text) is not None:
        yield video_text(Media("video", torch.empty(0), (1, 2, 2), 1.0, 0.0, times=(0.25,)), "")
    for entry in all_entries():
        known = {name: entry[name] for name in ("problem_id", "problem", "data_type", "problem_type", "solution")}
        yield question_text(Sample(index=0, options=tuple(entry.get("options", ())), **known))
        yield entry["process"] + "\n" + entry["solution"]
