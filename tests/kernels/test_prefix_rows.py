"""plan_rows: nothing lost, nothing over the bound, few rows."""

import random

import pytest

from videor1_kernels import PrefixLayout, RowPart, plan_rows


def tokens(row, prompts, completions):
    layout = PrefixLayout(
        [prompts[p.group] for p in row], [[completions[p.group][c] for c in p.completions] for p in row]
    )
    return layout.total_tokens


def test_one_row_without_a_bound():
    assert plan_rows([3, 5], [[1, 2], []]) == [[RowPart(0, (0, 1)), RowPart(1, ())]]
    assert plan_rows([], []) == plan_rows([], [], 10) == []


def test_groups_share_rows_first_fit_decreasing():
    # 8, 5, 4 and 3 tokens under 12: 8 with 4, 5 with 3.
    assert plan_rows([2, 4, 2, 2], [[6], [1], [2], [1]], 12) == [
        [RowPart(0, (0,)), RowPart(2, (0,))],
        [RowPart(1, (0,)), RowPart(3, (0,))],
    ]


def test_a_group_over_the_bound_is_split_and_its_prompt_repeated():
    assert plan_rows([4], [[3, 3, 3, 6]], 10) == [[RowPart(0, (0, 1))], [RowPart(0, (2,))], [RowPart(0, (3,))]]


@pytest.mark.parametrize("seed", range(20))
def test_everything_once_and_nothing_over_the_bound(seed):
    draw = random.Random(seed)
    prompts = [draw.randint(1, 50) for _ in range(draw.randint(1, 8))]
    completions = [[draw.randint(1, 40) for _ in range(draw.randint(0, 6))] for _ in prompts]
    bound = 90 + draw.randint(0, 200)
    rows = plan_rows(prompts, completions, bound)
    assert all(tokens(row, prompts, completions) <= bound for row in rows)
    found = sorted((p.group, c) for row in rows for p in row for c in p.completions)
    assert found == [(g, c) for g, group in enumerate(completions) for c in range(len(group))]
    assert {p.group for row in rows for p in row} == set(range(len(prompts)))
    for row in rows:
        assert len({p.group for p in row}) == len(row)
        assert [p.group for p in row] == sorted(p.group for p in row)
    assert rows == plan_rows(prompts, completions, bound)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3], [[1], [2]]), "completion_lengths: expected 1 lists, one per prompt, got 2"),
        (([3, 8], [[1], [2, 3]], 10), r"max_tokens_per_row: expected at least 11 \(the prompt and completion 1 of"),
        (([3, 18], [[1], []], 10), r"max_tokens_per_row: expected at least 18 \(the prompt of group 1\), got 10"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=f"plan_rows: {message}"):
        plan_rows(*arguments)
