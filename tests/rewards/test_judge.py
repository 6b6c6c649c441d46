"""Skipping shuffled answers leaves the advantages as they are, whenever the judge says that they do not matter."""

import itertools
import random
import zlib
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from runs import metrics, run_lines, trainer, weights
from test_advantages import VIDEO
from tiny import make_prompt

from videor1.config import TemporalConfig, TrainConfig
from videor1.demo.assets import Assets
from videor1.rewards.advantages import Scored, divided, score_groups
from videor1.rewards.deviation import deviation
from videor1.rewards.judge import TemporalJudge
from videor1.types import Completion, Group, Sample

PROMPT = make_prompt(VIDEO)
SAMPLE = Sample(0, "0", "How many?", "video", "regression", "<answer>100</answer>", PROMPT.sample.path)


def completion(accuracy: float, thoughtful: bool = True) -> Completion:
    """An answer to a regression question whose accuracy is about this."""
    text = f"<answer>{100 * accuracy:.6f}</answer>"
    text = f"<think>x</think>{text}" if thoughtful else text
    return Completion(torch.arange(400), torch.zeros(400), True, text)


def group_of(ordered: list[Completion], shuffled: list[Completion], asked: int) -> Group:
    asking = PROMPT.__class__(SAMPLE, PROMPT.input_ids, PROMPT.media, 0)
    return Group(asking, tuple(ordered), tuple(shuffled), None, asked)


def make_config(
    rule: Any, apply: Any, normalize: Any = "std", mu: float = 0.8, alpha: float = 0.3, baseline: Any = "mean"
) -> TrainConfig:
    temporal = TemporalConfig(rule=rule, apply=apply, mu=mu, alpha=alpha)
    return TrainConfig(temporal=temporal, normalize=normalize, advantage_baseline=baseline)


REWARD, ADVANTAGE = make_config("reference", "reward"), make_config("margin", "advantage")
BATCH = make_config("margin", "reward", "batch")


def score(groups: list[Group], config: TrainConfig) -> Scored:
    """A batch of these groups, as the trainer scores it."""
    scored = score_groups(groups, config)
    if not config.scales_by_batch:
        return scored
    std = torch.full((len(groups),), deviation(scored.result.rewards.flatten().tolist()), dtype=torch.float64)
    return divided(scored, std, config)


def play(ordered: list[Completion], shuffled: list[Completion], config: TrainConfig, rng: random.Random) -> Group:
    """Finish answers in a random order, shuffled ones only while the judge does not say that they are of no use."""
    judge = TemporalJudge(SAMPLE, config, ordered=len(ordered), shuffled=len(shuffled))
    left, done = list(ordered), []
    for answer in shuffled:
        while left and (rng.random() < 0.5 or judge.needed is False):
            judge.ordered_done(left.pop())
        if judge.needed is False:
            break
        judge.shuffled_done(answer)
        done.append(answer)
    while left:
        judge.ordered_done(left.pop())
    assert judge.needed is False or len(done) == len(shuffled), "a decision was taken back"
    return group_of(ordered, done, len(shuffled))


@pytest.mark.grid(
    rule=["margin", "threshold", "reference"],
    given=list(itertools.product(["reward", "advantage"], ["std", "none", "batch", "gdpo"])),
    baseline=["mean", "leave_one_out"],
)
def test_the_same_advantages_over_random_batches(rule: str, given: tuple[str, str], baseline: str) -> None:
    """Of three groups each."""
    apply, normalize = given
    rng, config = random.Random(f"{rule}{apply}"), make_config(rule, apply, normalize, baseline=baseline)
    kinds = {
        "binary": lambda: rng.choice((0.0, 1.0)),
        "mostly right": lambda: rng.choice((1.0, 1.0, 1.0, 0.0)),
        "graded": lambda: round(rng.random(), 3),
        "close": lambda: round(rng.uniform(0.9, 0.9003), 6),
    }
    skipped, full, zeros = 0, 0, 0
    for draw in itertools.islice(itertools.cycle(kinds.values()), 67):
        size, others = rng.choice([2, 4, 8]), rng.choice([1, 2, 4])
        played, whole = [], []
        for _ in range(3):
            ordered = [completion(draw(), rng.random() < 0.7) for _ in range(size)]
            shuffled = [completion(draw()) for _ in range(others)]
            played.append(play(ordered, shuffled, config, rng))
            whole.append(group_of(ordered, shuffled, others))
        one, other = score(played, config), score(whole, config)
        assert (one.result.advantages - other.result.advantages).abs().max() <= 1e-6
        assert ((one.result.advantages == 0) == (other.result.advantages == 0)).all()
        zeros += int((one.result.advantages == 0).all(1).sum())
        known = ~one.result.temporal.isnan()
        assert torch.equal(one.result.temporal[known], other.result.temporal[known])
        for i, group in enumerate(played):
            left_out = others - len(group.shuffled)
            skipped, full = skipped + left_out, full + others
            gap = other.result.rewards[i] - one.result.rewards[i]
            correct = other.accuracy[i] > config.reward.correct_above
            assert (gap[~correct] == 0).all()  # a constant on the correct ones, if anything
            assert not correct.any() or gap[correct].max() - gap[correct].min() <= 1e-6
            assert normalize != "batch" or (gap == 0).all()  # it would move the deviation of all
            assert int(one.shuffled_accuracy[i].isnan().sum()) == left_out
            if left_out:
                assert one.result.p_shuffled[i].isnan()
            else:
                assert torch.equal(one.result.p_shuffled[i], other.result.p_shuffled[i])
                assert known[i]
    assert 0 < skipped < full
    assert zeros


def judge_of(ordered: Any, shuffled: Any, config: TrainConfig, size: int = 4, others: int = 2) -> TemporalJudge:
    judge = TemporalJudge(SAMPLE, config, ordered=size, shuffled=others)
    judge.ordered, judge.shuffled = ordered, shuffled
    return judge


# A config, the ordered and the shuffled answers that are done, and whether the others are needed.
CASES: list[tuple[TrainConfig, list[float], list[float], bool | None]] = [
    # Nothing is known yet; the first wrong answer leaves it open, a right and a wrong one need the bonus.
    *((REWARD, ordered, [], None) for ordered in ([], [0], [1])),
    *((REWARD, [0, 1], [], True), (ADVANTAGE, [1], [], True)),
    # None correct; all correct.
    *((config, [0, 0, 0, 0.05], [], False) for config in (REWARD, ADVANTAGE)),
    *((REWARD, [1, 1, 1, 1], [], False), (ADVANTAGE, [1, 1, 1, 1], [], True)),
    # A bonus for all is part of the batch's deviation, and normalised by itself it is none.
    *((BATCH, [0, 0, 0, 0], [], False), (BATCH, [1, 1, 1, 1], [], True), (BATCH, [1], [], True)),
    (make_config("margin", "reward", "ema_task"), [1, 1, 1, 1], [], True),
    (make_config("margin", "reward", "gdpo"), [1, 1, 1, 1], [], False),
    # reference, mu 0.8: p = 0.5 passes p~ up to 0.625. One wrong shuffled answer of two decides, one right not.
    *((REWARD, [1, 1, 0, 0], [0], False), (REWARD, [1, 1, 0, 0], [1], True)),
    # p = 0.25 fails as soon as p~ is above 0.3125: one right answer of two.
    (REWARD, [1, 0, 0, 0], [1], False),
    # margin: once p~ is at least p nothing is left to win; else it must be known.
    *((ADVANTAGE, [1, 1, 0, 0], [1], False), (ADVANTAGE, [1, 1, 0, 0], [0], True)),
    # No bonus to give.
    (make_config("threshold", "reward", alpha=0.0), [1, 0], [], False),
]


@pytest.mark.parametrize(("config", "ordered", "shuffled", "needed"), CASES)
def test_by_hand(config: TrainConfig, ordered: list[float], shuffled: list[float], needed: bool | None) -> None:
    assert judge_of(ordered, shuffled, config).needed is needed


@pytest.mark.parametrize(("rule", "bonus"), [("reference", 0.3), ("threshold", 0.0)])
def test_a_bonus_decided_early_is_the_bonus(rule: str, bonus: float) -> None:
    """p = 0.5 against at most 0.5 * p~ with mu 1: the one rule passes at equality, the other does not."""
    # The ordered answers need not be finished where any outcome passes.
    assert [judge_of([1, 0], shuffled, REWARD).decided for shuffled in ([0, 0], [0, 1])] == [True, False]
    config = make_config(rule, "reward", mu=1.0)
    ordered = [completion(a) for a in (1, 1, 0, 0)]
    for shuffled, asked, decided in ([(0.0, 1.0), 2, True], [(1.0, 0.0, 0.0), 4, rule == "reference"]):
        judge = judge_of([1, 1, 0, 0], list(shuffled), config, others=asked)
        assert judge.decided == decided
        if decided:
            scored = score_groups([group_of(ordered, [completion(a) for a in shuffled], asked)], config)
            assert scored.result.temporal.tolist() == pytest.approx([bonus])
    # A group with missing answers that matter counts those it has.
    ordered = [completion(a) for a in (1, 0, 0, 0)]
    scored = score_groups([group_of(ordered, [completion(0.0)], 2)], make_config("margin", "reward"))
    assert scored.result.p_shuffled.isnan().all()  # not known
    assert scored.result.temporal.tolist() == pytest.approx([0.3 * 0.25])


def test_a_bonus_that_all_of_a_group_get_moves_the_others_of_its_batch() -> None:
    """With the deviation of the batch; skipped by the other normalisations, it would not be missed there."""
    ordered = [[completion(a) for a in row] for row in ((1, 1), (1, 0))]
    none = [group_of(row, [], 0) for row in ordered]
    given = [group_of(ordered[0], [completion(0.0)], 1), none[1]]
    for normalize in ("std", "none", "gdpo", "batch"):
        config = make_config("margin", "reward", normalize)
        one, other = (score(groups, config).result.advantages for groups in (none, given))
        assert (one - other).abs().max() < 1e-6 or normalize == "batch"
    assert (one - other)[1].abs().min() > 0.01


@pytest.mark.parametrize(
    ("rule", "apply", "normalize"),
    [("margin", "advantage", "std"), ("reference", "reward", "std"), ("margin", "reward", "batch")],
)
def test_a_run_is_the_same_with_and_without(
    rule: str, apply: str, normalize: str, assets: Assets, tmp_path: Path
) -> None:
    """Ordered answers, advantages and weights; only what no gradient sees is left out, and counted.

    An answer is scored once in a step: by the judge, or with the rewards where there is none; equal ones together."""
    calls: Counter[tuple[str, str]] = Counter()

    def by_lot(completion: str, solution: str, *_: object, **__: object) -> float:
        calls[completion, solution] += 1
        return float(zlib.crc32(completion.encode()) % 4 == 0)

    ends, lines, rows = [], [], []
    for skip in (True, False):
        options = {"temporal__rule": rule, "temporal__apply": apply, "temporal__skip_shuffled": skip, "max_steps": 3}
        options["normalize"] = normalize
        options |= {"num_generations": 3, "temporal__num_generations": 3, "per_device_train_batch_size": 4}
        run = trainer(assets, tmp_path / str(skip), num_iterations=1, **options)
        with patch("videor1.rewards.scoring.accuracy_reward", by_lot):
            ends.append(weights(run.train()))
        lines.append(run_lines(tmp_path / str(skip), "rollouts.jsonl"))
        rows.append(metrics(tmp_path / str(skip)))
        groups = [(line["completions"] + line["shuffled_completions"], line["solution"]) for line in lines[-1]]
        assert calls == Counter((text, solution) for texts, solution in groups for text in set(texts))
        calls.clear()
    for one, other in zip(*lines, strict=True):
        assert one["completions"] == other["completions"]
        assert one["advantages"] == pytest.approx(other["advantages"], abs=1e-6)
        assert set(one["shuffled_completions"]) <= set(other["shuffled_completions"])
    assert any(any(line["advantages"]) for line in lines[0])
    assert sum(len(line["shuffled_completions"]) for line in lines[0]) > 0
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-5, atol=1e-6)
    left_out = [sum(row["rollout/shuffled_skipped"] + row["rollout/shuffled_stopped"] for row in run) for run in rows]
    assert left_out[0] > left_out[1] == 0
    assert sum(r["rollout/row_steps"] for r in rows[0]) < sum(r["rollout/row_steps"] for r in rows[1])
    assert any(row["temporal/p_shuffled_unknown"] for row in rows[0])
    assert all(row["temporal/p_shuffled_unknown"] == 0 for row in rows[1])
