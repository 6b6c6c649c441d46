"""What rollouts.jsonl holds of a step, token by token where it is asked for."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import Lab, run_lines

from videor1.demo.tokenizer import make_tokenizer
from videor1.training.rollout_log import token_strings

tokenizer = functools.cache(make_tokenizer)


def ids_of(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_token_strings() -> None:
    """A character of several tokens belongs to its last; bytes that are no character stay where they are; special
    tokens are written out."""
    (first, *_), (x,) = ids_of("😀"), ids_of("x")
    expected = [
        (ids_of("é"), ["", "é"]),
        (ids_of("h😀<answer>"), ["h", "", "", "", "😀", "<answer>"]),
        ([first, x], ["�", "x"]),
        ([x, first], ["x", "�"]),
        ([], []),
        (ids_of("B<|im_end|>"), ["B", "<|im_end|>"]),
    ]
    assert [token_strings(tokenizer(), ids) for ids, _ in expected] == [strings for _, strings in expected]


@given(st.lists(st.integers(0, 10**6), max_size=24) | st.text(max_size=30))
def test_end_to_end_they_are_the_text_whatever_the_tokens(given_ids: list[int] | str) -> None:
    ids = ids_of(given_ids) if isinstance(given_ids, str) else [number % len(tokenizer()) for number in given_ids]
    strings = token_strings(tokenizer(), ids)
    assert len(strings) == len(ids)
    assert "".join(strings) == tokenizer().decode(ids)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_first_prompts_of_each_step_have_their_tokens(count: int, lab: Lab) -> None:
    lab.make(max_steps=2, per_device_train_batch_size=2, log_tokens=count).train()
    rows = run_lines(lab.folder, "rollouts.jsonl")
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
