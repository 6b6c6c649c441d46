"""Dynamic sampling: prompts without variance in reward make room for the next ones, within a bound."""

import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Lab, assert_same_run, entries, kill, run_lines, same_weights, weights, write_data

from videor1.demo.assets import Assets
from videor1.rewards.advantages import Scored
from videor1.rollout import Rollout, RolloutStats
from videor1.training.batch import Batch, refill
from videor1.training.loop import Loop
from videor1.types import Sample
from videor1_kernels import Advantages

LIVE, DEAD = True, False
NUMBERS = itertools.count()


def some(completions: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """A reward that varies, but for questions that say so."""
    return [
        0.0 if sample.problem_id.startswith("dead") else zlib.crc32(text.encode()) % 97 / 97
        for text, sample in zip(completions, samples, strict=True)
    ]


def made(*live: bool, width: int = 1, failed: int = 0) -> Batch:
    """A batch whose every tensor tells which group a row is of. Groups are numbers here."""
    groups: list[Any] = [next(NUMBERS) for _ in live]
    column = torch.tensor(groups, dtype=torch.float32)
    pair = torch.stack([column, column], 1)
    advantages = torch.stack([(column + 1) * torch.tensor(live, dtype=torch.float32), torch.zeros(len(live))], 1)
    scored = Scored(
        pair,
        pair,
        pair.long(),
        column[:, None].expand(-1, width),
        column[:, None].expand(-1, width),
        Advantages(advantages, pair, column, column, column),
    )
    stats = RolloutStats(tokens=10, decode_steps=2, kv_bytes=100 + len(live), retries=1)
    failures = {len(live) + i: "why" for i in range(failed)}
    return Batch(groups, list(column.split(1)), scored, Rollout([*groups, *[None] * failed], stats, failures))


def play(first: Batch, size: int, *rounds: Batch) -> tuple[Batch, list[int]]:
    """The refilled batch, and how many prompts each round was asked for."""
    asked: list[int] = []

    def answer(count: int) -> Batch:
        asked.append(count)
        return rounds[len(asked) - 1]

    return refill(first, size, len(rounds), answer), asked


def test_groups_with_variance_take_the_places_of_those_without() -> None:
    first, second, third = made(LIVE, DEAD, LIVE, DEAD), made(DEAD, LIVE), made(LIVE)
    batch, asked = play(first, 4, second, third, made(LIVE))
    assert asked == [2, 1]  # as many as were missing, and no round more than is needed
    expected = [first.groups[0], second.groups[1], first.groups[2], third.groups[0]]
    assert batch.groups == expected
    assert batch.has_variance() == [LIVE] * 4
    assert batch.counts() == {"sampling/refilled": 2, "sampling/zero_variance_dropped": 3}
    column = torch.tensor(expected, dtype=torch.float32)
    pair, scored = torch.stack([column, column], 1), batch.scored
    assert torch.equal(torch.cat(batch.features), column)  # type: ignore[arg-type]
    assert all(torch.equal(values, pair) for values in (scored.accuracy, scored.format, scored.result.rewards))
    assert torch.equal(scored.lengths, pair.long())
    assert scored.lengths.dtype == torch.int64
    assert torch.equal(scored.shuffled_accuracy, column[:, None])
    assert torch.equal(scored.result.advantages, torch.stack([column + 1, torch.zeros(4)], 1))
    for values in (scored.result.temporal, scored.result.p, scored.result.p_shuffled):
        assert torch.equal(values, column)
    stats = batch.rollout.stats
    assert (stats.tokens, stats.decode_steps, stats.retries, stats.kv_bytes) == (30, 6, 3, 104)


def test_what_is_not_replaced_stays() -> None:
    first = made(DEAD, DEAD, LIVE)
    batch, asked = play(first, 3, made(DEAD, DEAD), made(DEAD, DEAD))
    assert (batch.groups, asked) == (first.groups, [2, 2])
    assert batch.counts() == {"sampling/refilled": 0, "sampling/zero_variance_dropped": 4}
    first, second = made(DEAD, DEAD), made(LIVE, DEAD)
    batch, asked = play(first, 2, second)
    assert batch.groups == [second.groups[0], first.groups[1]]
    full = made(LIVE, LIVE)
    assert play(full, 2, made(LIVE)) == (full, [])


def test_failed_prompts_are_replaced_too() -> None:
    first, second = made(DEAD, LIVE, failed=2), made(LIVE, DEAD, failed=1)
    batch, asked = play(first, 4, second)
    assert asked == [3]
    assert batch.groups == [*first.groups, *second.groups]  # an empty place comes before one that holds something
    assert batch.counts() == {"sampling/refilled": 1, "sampling/zero_variance_dropped": 0}
    assert batch.rollout.failed == {2: "why", 3: "why", 6: "why"}
    assert [i for i, group in enumerate(batch.rollout.groups) if group is None] == [2, 3, 6]


@pytest.mark.parametrize(
    ("widths", "unknown"), [((0, 3), [[False] * 3, [True] * 3]), ((2, 0), [[True] * 2, [False] * 2])]
)
def test_shuffled_answers_of_unequal_numbers(widths: tuple[int, int], unknown: list[list[bool]]) -> None:
    """A batch of images has none at all."""
    batch, _ = play(made(DEAD, LIVE, width=widths[0]), 2, made(LIVE, width=widths[1]))
    assert batch.scored.shuffled_accuracy.isnan().tolist() == unknown


def options(assets: Assets, tmp_path: Path, *kinds: str, **more: Any) -> dict[str, Any]:
    """A run over the demo's samples in file order, named after what their rewards do."""
    found = itertools.cycle(entries(assets.train))
    named = [next(found) | {"problem_id": f"{kind}-{i}"} for i, kind in enumerate(kinds)]
    own = {"dataset_name": write_data(tmp_path / "data.json", named), "data__root": "/", "data__shuffle": False}
    own |= {"max_steps": 3, "gradient_accumulation_steps": 2, "num_generations": 3}
    return own | {"reward__functions": "test_batch:some"} | more


def drawn(run_dir: Path) -> list[tuple[int, int]]:
    """(step, draw) of the answers that were trained on."""
    return [(row["step"], row["draw"]) for row in run_lines(run_dir, "rollouts.jsonl")]


def test_a_run_takes_the_next_prompts(lab: Lab) -> None:
    chosen = options(lab.assets, lab.folder, "live", "dead", "dead", "live", "live", "live", "dead")
    lab.make("run", **chosen, dynamic_sampling=2).train()
    # 0 1 | 2 | 3; then 4 5; then 6 0 (draw 7) | 1 (8) | 2 (9), and 6 stays.
    assert drawn(lab.folder / "run") == [(1, 0), (1, 3), (2, 4), (2, 5), (3, 6), (3, 7)]
    rows = lab.rows("run")
    assert [row["data/draws"] for row in rows] == [4, 6, 10]
    assert [row["sampling/refilled"] for row in rows] == [1, 0, 0]
    assert [row["sampling/zero_variance_dropped"] for row in rows] == [2, 0, 2]
    assert [row["frac_reward_zero_std"] for row in rows] == [0, 0, 0.5]
    assert all(row["num_tokens"] > 0 for row in rows)
    lab.make("plain", **chosen).train()
    assert drawn(lab.folder / "plain") == [(1, 0), (1, 1), (2, 2), (2, 3), (3, 4), (3, 5)]
    assert "sampling/refilled" not in lab.rows("plain")[-1]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_nothing_but_zero_variance_ends_with_the_bound(beta: float, lab: Lab) -> None:
    chosen = options(lab.assets, lab.folder, "dead", "dead", "dead", beta=beta, max_steps=2)
    lab.make("run", **chosen, dynamic_sampling=3).train()
    assert drawn(lab.folder / "run") == [(1, 0), (1, 1), (2, 8), (2, 9)]
    assert lab.rows("run")[-1]["data/draws"] == 16
    assert lab.rows("run")[-1]["sampling/zero_variance_dropped"] == 6


def test_where_every_group_has_variance_nothing_changes(lab: Lab) -> None:
    chosen = options(lab.assets, lab.folder, "live", "live", "live", "live", beta=0.1, num_iterations=2)
    one = lab.make("off", **chosen).train()
    other = lab.make("on", **chosen, dynamic_sampling=4).train()
    assert same_weights(weights(one), weights(other))
    added = {"sampling/refilled": 0, "sampling/zero_variance_dropped": 0}
    assert lab.rows("on") == [row | added for row in lab.rows("off")]
    assert drawn(lab.folder / "on") == drawn(lab.folder / "off")


def test_killed_then_resumed(lab: Lab) -> None:
    """Shuffled data, shuffled answers, skipping, micro-batches in one row: all as without the interruption."""
    chosen = options(
        lab.assets, lab.folder, "dead", "live", "dead", "live", "dead", data__shuffle=True, dynamic_sampling=2
    )
    chosen |= {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    lab.make("whole", **chosen).train()
    kill(lab.make("cut", **chosen), Loop, "optimizer_step", 4)
    lab.make("cut", **chosen, resume="auto").train()
    assert_same_run(lab.folder / "cut", lab.folder / "whole")
    rows = lab.rows("whole")
    assert sum(row["sampling/refilled"] for row in rows) > 2
    assert any(row["rollout/shuffled_asked"] for row in rows)


def test_the_gradient_is_that_of_the_groups_that_are_left(lab: Lab) -> None:
    """The same update as of a run whose data holds the replacements in the first place. Draws seed the sampling, so
    the replacement is given its draw by a prompt that is skipped."""
    refilled = options(lab.assets, lab.folder, "live", "dead", "live", max_steps=1)
    one = lab.make("one", **refilled, dynamic_sampling=1).train()
    data = entries(Path(refilled["dataset_name"]))
    data[1] |= {"path": "/gone.mp4"}
    skipped = refilled | {"dataset_name": write_data(lab.folder / "skipped.json", data)}
    other = lab.make("other", **skipped).train()
    assert drawn(lab.folder / "one") == drawn(lab.folder / "other") == [(1, 0), (1, 2)]
    assert same_weights(weights(one), weights(other))
