"""What rollouts.jsonl holds of a step, token by token where it is asked for."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import run_lines, trainer

from videor1.config import TrainConfig
from videor1.demo.assets import Assets
from videor1.demo.tokenizer import make_tokenizer
from videor1.errors import ConfigError
from videor1.training.rollout_log import token_strings

tokenizer = functools.cache(make_tokenizer)


def ids_of(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_a_character_of_several_tokens_belongs_to_its_last() -> None:
    assert token_strings(tokenizer(), ids_of("é")) == ["", "é"]
    assert token_strings(tokenizer(), ids_of("h😀<answer>")) == ["h", "", "", "", "😀", "<answer>"]


def test_bytes_that_are_no_character_stay_where_they_are() -> None:
    (first, *_), (x,) = ids_of("😀"), ids_of("x")
    assert token_strings(tokenizer(), [first, x]) == ["�", "x"]
    assert token_strings(tokenizer(), [x, first]) == ["x", "�"]
    assert token_strings(tokenizer(), []) == []


def test_special_tokens_are_written_out() -> None:
    assert token_strings(tokenizer(), ids_of("B<|im_end|>")) == ["B", "<|im_end|>"]


@given(st.lists(st.integers(0, 10**6), max_size=24))
def test_end_to_end_they_are_the_text_whatever_the_tokens(numbers: list[int]) -> None:
    ids = [number % len(tokenizer()) for number in numbers]
    strings = token_strings(tokenizer(), ids)
    assert len(strings) == len(ids)
    assert "".join(strings) == tokenizer().decode(ids)


@given(st.text(max_size=30))
def test_any_text_comes_back(text: str) -> None:
    ids = ids_of(text)
    assert "".join(token_strings(tokenizer(), ids)) == tokenizer().decode(ids)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_first_prompts_of_each_step_have_their_tokens(count: int, assets: Assets, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "log_tokens": count}
    trainer(assets, tmp_path, **options).train()
    rows = run_lines(tmp_path, "rollouts.jsonl")
    assert [("tokens" in row, "logps" in row) for row in rows] == [(i % 2 < count,) * 2 for i in range(4)]
    for row in rows:
        assert row["data_type"] == ("image" if row["permutation"] is None else "video")
        assert row["problem"] in row["prompt"]
        assert len(row["finished"]) == 2
        for answer, tokens in enumerate(row.get("tokens", [])):
            assert len(tokens) == len(row["logps"][answer]) == row["lengths"][answer]
            end = "<|im_end|>" if row["finished"][answer] else ""
            assert "".join(tokens).removesuffix(end) == row["completions"][answer]
            assert all(logp <= 0 and logp == round(logp, 4) for logp in row["logps"][answer])


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"log_tokens: expected 0 \(none\) or more, got -1"):
        TrainConfig(log_tokens=-1)
