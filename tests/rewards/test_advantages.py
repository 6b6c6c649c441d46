"""Scores of batches of groups: numbers worked out by hand, and a formula written again in plain Python."""

import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny import make_media, make_prompt

from videor1.config import RewardConfig, TemporalConfig, TrainConfig
from videor1.errors import ConfigError
from videor1.rewards.advantages import divided, score_groups
from videor1.rewards.deviation import deviation
from videor1.rewards.judge import TemporalJudge
from videor1.rewards.structured import MALFORMED
from videor1.rollout import Rollout
from videor1.training.batch import Batch
from videor1.training.step_metrics import make_step_report, step_metrics
from videor1.types import Completion, Group

RIGHT, WRONG = "<think>x</think><answer>A</answer>", "<think>x</think><answer>B</answer>"
BARE, WRONG_BARE = "<answer>A</answer>", "<answer>B</answer>"  # the format reward is 0
VIDEO, IMAGE = make_media("video", (2, 4, 4)), make_media("image", (1, 4, 4))


def answers(*texts: str, lengths: Iterable[int] = ()) -> tuple[Completion, ...]:
    sized = zip(texts, lengths or [5] * len(texts), strict=True)
    return tuple(Completion(torch.arange(n), torch.zeros(n), True, text) for text, n in sized)


def make_group(ordered: tuple[Completion, ...], shuffled: tuple[Completion, ...] = (), media: Any = VIDEO) -> Group:
    prompt = make_prompt(media)
    choice: dict[str, Any] = {"problem_type": "multiple choice", "options": ("A. red", "B. blue")}
    sample = replace(prompt.sample, solution="<answer>A</answer>", **choice)
    return Group(replace(prompt, sample=sample), ordered, shuffled)


def config(**options: Any) -> TrainConfig:
    temporal = {name: options.pop(name) for name in ("rule", "apply", "alpha", "mu") if name in options}
    return TrainConfig(temporal=TemporalConfig(**temporal), **options)


def test_by_hand() -> None:
    group = make_group(answers(RIGHT, RIGHT, WRONG, WRONG), answers(RIGHT, WRONG, WRONG, WRONG))
    scored = score_groups([group], config())
    assert (scored.accuracy.tolist(), scored.format.tolist()) == ([[1, 1, 0, 0]], [[1, 1, 1, 1]])
    assert (scored.lengths.tolist(), scored.shuffled_accuracy.tolist()) == ([[5, 5, 5, 5]], [[1, 0, 0, 0]])
    assert (scored.result.p.tolist(), scored.result.p_shuffled.tolist()) == ([0.5], [0.25])
    assert scored.result.temporal.tolist() == pytest.approx([0.3 * 0.25])
    assert scored.result.rewards.tolist() == [[2, 2, 1, 1]]
    z = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert scored.result.advantages[0].tolist() == pytest.approx([z + 0.075, z + 0.075, -z, -z], rel=1e-6)
    # The reference on the reward.
    group = make_group(answers(RIGHT, WRONG_BARE), answers(RIGHT))
    scored = score_groups([group], config(rule="reference", mu=0.5))  # p = 0.5 passes 0.5 * 1, and only with >=
    assert scored.result.rewards[0].tolist() == pytest.approx([2.3, 0.0])
    z = 1.15 / (2.3 / math.sqrt(2) + 1e-4)
    assert scored.result.advantages[0].tolist() == pytest.approx([z, -z], rel=1e-6)
    threshold = score_groups([group], config(rule="threshold", mu=0.5))
    assert threshold.result.temporal.tolist() == [0.0]
    assert threshold.result.rewards.tolist() == [[2, 0]]
    # Bonuses are the configured ones, and gated by correct_above.
    group = make_group(answers(RIGHT, RIGHT, WRONG, lengths=(10, 21, 15)), answers(WRONG))
    for above, control, rewards in ((0.1, True, [3, 2.3, 1]), (0.1, False, [2.3, 2.3, 1]), (1.0, True, [2, 2, 1])):
        reward = RewardConfig(length_bonus=0.7, length_range=(10, 20), correct_above=above)
        scored = score_groups([group], config(rule="reference", reward=reward, len_control=control))
        assert scored.result.rewards[0].tolist() == pytest.approx(rewards)


def test_what_the_template_opened_is_read_and_not_counted() -> None:
    """Answers to a prompt that ends in <think>: format and accuracy of the whole, length of what was written."""
    written = answers("x</think><answer>A</answer>", RIGHT, "x<answer>A</answer>", lengths=(20, 21, 22))
    reward = RewardConfig(length_range=(20, 20), length_bonus=0.5)
    scored = score_groups([make_group(written, written[:1])], config(reward=reward, alpha=0.0), opened="<think>\n")
    assert (scored.accuracy.tolist(), scored.format.tolist()) == ([[1, 1, 1]], [[1, 0, 0]])
    assert (scored.lengths.tolist(), scored.result.rewards.tolist()) == ([[20, 21, 22]], [[2.5, 1, 1]])
    closing = answers("A</answer>", "B</answer>")  # after an answer's opened tag
    scored = score_groups([make_group(closing, closing[1:])], config(), opened="<think></think><answer>")
    assert (scored.accuracy.tolist(), scored.shuffled_accuracy.tolist()) == ([[1, 0]], [[0]])


def expected(group: Group, options: TrainConfig) -> tuple[list[float], list[float]]:
    """(rewards, advantages) of a group of multiple-choice answers; for batch as only centred."""
    accuracy = [float("<answer>A</answer>" in c.text) for c in group.ordered]
    form = [float(c.text.startswith("<think>")) for c in group.ordered]
    p, bonus = statistics.fmean(accuracy), 0.0
    if group.shuffled:
        q = statistics.fmean(float("<answer>A</answer>" in c.text) for c in group.shuffled)
        alpha, mu = options.temporal.alpha, options.temporal.mu
        bonus = {
            "margin": alpha * max(p - q, 0.0),
            "threshold": alpha * (p > mu * q),
            "reference": alpha * (p >= mu * q),
        }[options.temporal.rule]
    low, high = options.reward.length_range
    omega = options.reward.length_bonus if options.len_control else 0.0
    given = bonus if options.temporal_apply == "reward" else 0.0
    brief = [
        float(a > 0 and sum(accuracy) > 1 and low <= len(c.token_ids) <= high)
        for c, a in zip(group.ordered, accuracy, strict=True)
    ]
    parts = [(1.0, accuracy), (1.0, form), (omega, brief), (given, accuracy)]  # accuracies are 0 and 1
    rewards = [sum(weight * part[i] for weight, part in parts) for i in range(len(accuracy))]

    def z(values: list[float], divide: bool = True) -> list[float]:
        mean = statistics.fmean(values)
        scale = statistics.stdev(values) + options.advantage_eps if divide else 1.0
        return [(value - mean) / scale for value in values]

    if options.normalize == "gdpo":
        scored = [[weight * value for value in z(part)] for weight, part in parts]
        advantages = [sum(column) for column in zip(*scored, strict=True)]
    else:
        advantages = z(rewards, options.normalize == "std")
    if options.advantage_baseline == "leave_one_out":
        advantages = [a * len(rewards) / (len(rewards) - 1) for a in advantages]
    if options.temporal_apply == "advantage":
        advantages = [x + (bonus if a else 0.0) for x, a in zip(advantages, accuracy, strict=True)]
    return rewards, advantages


MIXED = [
    make_group(answers(RIGHT, BARE, WRONG, RIGHT, lengths=(320, 512, 400, 513)), answers(RIGHT, RIGHT, WRONG)),
    make_group(answers(RIGHT, WRONG, WRONG_BARE, WRONG, lengths=(400, 320, 1, 2)), media=IMAGE),
    make_group(answers(WRONG, WRONG_BARE, WRONG, WRONG, lengths=(1, 2, 3, 4)), answers(WRONG, WRONG)),
    make_group(answers(RIGHT, RIGHT, WRONG, BARE, lengths=(319, 600, 9, 9)), answers(RIGHT), None),
    make_group(answers(RIGHT, RIGHT, BARE, WRONG, lengths=(333, 444, 511, 9)), media=IMAGE),
]


@pytest.mark.grid(
    rule=["margin", "threshold", "reference"],
    apply=["reward", "advantage", None],
    len_control=[True, False],
    normalize=["std", "none", "batch", "gdpo"],
    advantage_baseline=["mean", "leave_one_out"],
)
def test_mixed_batches_under_every_rule(
    rule: str, apply: str | None, len_control: bool, normalize: str, advantage_baseline: str
) -> None:
    """Uneven numbers of shuffled answers, and groups that have none."""
    grouped = {"normalize": normalize, "advantage_baseline": advantage_baseline}
    options = config(rule=rule, apply=apply, len_control=len_control, **grouped)
    scored = score_groups(MIXED, options)
    assert scored.shuffled_accuracy.shape == (5, 3)
    assert scored.shuffled_accuracy.isnan().sum(1).tolist() == [0, 3, 1, 2, 3]
    assert scored.result.p_shuffled.isnan().tolist() == [False, True, False, False, True]
    # A group does not depend on its batch.
    for row, group in enumerate(MIXED):
        assert torch.equal(score_groups([group], options).result.advantages[0], scored.result.advantages[row])
    images = score_groups([MIXED[1], MIXED[4]], options)
    assert images.shuffled_accuracy.shape == (2, 0)
    assert images.result.p_shuffled.isnan().all()
    assert images.result.temporal.tolist() == [0, 0]
    for row, group in enumerate(MIXED):
        rewards, advantages = expected(group, options)
        assert scored.result.rewards[row].tolist() == pytest.approx(rewards, abs=1e-6)
        assert scored.result.advantages[row].tolist() == pytest.approx(advantages, abs=1e-5)
    if options.scales_by_batch:
        std = statistics.stdev(scored.result.rewards.flatten().tolist())
        assert deviation(scored.result.rewards.flatten().tolist()) == pytest.approx(std, rel=1e-12)
        bonus = [0.0] * 5 if options.temporal_apply == "reward" else scored.result.temporal.tolist()
        bonuses = torch.tensor(bonus)[:, None] * scored.accuracy
        wanted = (scored.result.advantages - bonuses) / (std + options.advantage_eps) + bonuses
        done = divided(scored, torch.full((5,), std).double(), options).result
        torch.testing.assert_close(done.advantages, wanted, rtol=0, atol=1e-5)
        assert torch.equal(done.rewards, scored.result.rewards)


def test_accuracies_that_are_known_and_functions_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ones are taken as they are; one call of the others sees every ordered answer."""
    group = make_group(answers(RIGHT, WRONG), answers(BARE, WRONG_BARE))
    scored = score_groups([replace(group, accuracies={RIGHT: 0.25, WRONG_BARE: 0.5})], config())
    assert (scored.accuracy.tolist(), scored.shuffled_accuracy.tolist()) == ([[0.25, 0.0]], [[1.0, 0.5]])
    assert scored.format.tolist() == [[1, 1]]
    words = Mock(side_effect=lambda completions, samples: [0.5 * len(c.split()) for c in completions])
    monkeypatch.setitem(sys.modules, "rewards_of_this_test", SimpleNamespace(words=words))
    groups = [
        make_group(answers("<answer>A</answer> two words", RIGHT), answers(WRONG)),
        make_group(answers(WRONG, "one"), media=IMAGE),
    ]
    reward = RewardConfig(functions=["rewards_of_this_test:words"], format_weight=0.25)
    scored = score_groups(groups, config(reward=reward))
    assert scored.format.tolist() == [[1.5, 0.75], [0.75, 0.5]]
    assert scored.accuracy.tolist() == [[1, 1], [0, 0]]
    assert torch.equal(scored.result.rewards, scored.accuracy + scored.format)
    texts = [c.text for g in groups for c in g.ordered]
    samples = [g.prompt.sample for g in groups for _ in g.ordered]
    words.assert_called_once_with(texts, samples)  # a judge need not be paid for shuffled answers


def test_bars_and_faults_by_problem_type() -> None:
    """A group of each type has its own bar, in the advantages, in those that are divided later, and for the judge."""
    box, time = '{"boxes": [0, 0, 10, 10]}', '{"time": [0, 10]}'
    texts = {
        "spatial grounding": ['{"boxes": [0, 0, 10, 4]}', '{"boxes": [0, 0, 10, 6]}', '{"boxes": [9, 9, 0, 0]}', "x"],
        "temporal grounding": ['{"time": [0, 4]}', '{"time": [0, 6]}', '{"time": [0, NaN]}', time],
    }
    groups = []
    for kind, truth in (("spatial grounding", box), ("temporal grounding", time)):
        group = make_group(
            answers(*(f"<answer>{text}</answer>" for text in texts[kind])), answers("<answer>x</answer>")
        )
        sample = replace(group.prompt.sample, problem_type=kind, solution=f"<answer>{truth}</answer>", options=())
        groups.append(replace(group, prompt=replace(group.prompt, sample=sample)))
    reward = RewardConfig(correct_above_for=["spatial grounding=0.5", "math=0.9"])
    scored = score_groups(groups, config(reward=reward, alpha=0.5))
    assert scored.accuracy.tolist() == [pytest.approx([0.4, 0.6, 0, 0]), pytest.approx([0.4, 0.6, 0, 1])]
    assert scored.result.p.tolist() == pytest.approx([0.25, 0.5])  # means of IoU, not shares of right answers
    assert scored.result.temporal.tolist() == pytest.approx([0.125, 0.25])
    plain = score_groups(groups, config(reward=reward, alpha=0.0)).result.advantages
    gained = (scored.result.advantages - plain).tolist()
    assert gained == [pytest.approx([0, 0.125, 0, 0]), pytest.approx([0.25, 0.25, 0, 0.25])]
    batch = config(reward=reward, rule="threshold", alpha=0.5, normalize="batch")
    once = score_groups(groups, batch)
    assert once.result.rewards.tolist() == [pytest.approx([0.4, 1.1, 0, 0]), pytest.approx([0.9, 1.1, 0, 1.5])]
    done = divided(once, torch.ones(2, dtype=torch.float64), batch).result.advantages
    centred = once.result.rewards - once.result.rewards.mean(1, keepdim=True)
    torch.testing.assert_close(done, centred / (1 + batch.advantage_eps))
    assert scored.malformed is not None
    named = [["", *MALFORMED][fault] for fault in scored.malformed.flatten().tolist()]
    assert named == ["", "", "reversed", "not_json", "", "", "not_finite", ""]
    report = make_step_report(Batch(groups, [None] * 2, scored, Rollout([])), [], [], 0)
    metrics = step_metrics([report, report], {}, 1.0)
    counted = {name: n for name, n in metrics.items() if "malformed" in name}
    box_name, time_name = "rewards/malformed/spatial_grounding", "rewards/malformed/temporal_grounding"
    expected = {"rewards/malformed": 6, box_name: 4, f"{box_name}/not_json": 2, f"{box_name}/reversed": 2}
    assert counted == expected | {time_name: 2, f"{time_name}/not_finite": 2}
    assert (RewardConfig().above("math"), reward.above("math"), reward.above("OCR")) == (0.1, 0.9, 0.1)


def test_the_judge_knows_the_bar_of_its_type() -> None:
    sample = replace(make_prompt(VIDEO).sample, problem_type="tracking")
    for above, pairs, needed in (
        (0.1, [], True),
        (0.9, [], False),
        (0.9, ["OCR=0.2"], False),
        (0.9, ["tracking=0.2"], True),
        (0.1, ["tracking=0.5"], False),
        (0.1, ["tracking=0.2", "tracking=0.5"], False),
    ):
        reward = RewardConfig(correct_above=above, correct_above_for=pairs)
        judge = TemporalJudge(sample, config(reward=reward), ordered=2, shuffled=2)
        judge.ordered = [0.4, 0.3]
        assert judge.needed is needed, pairs


@pytest.mark.parametrize("pair", ["tracking", "tracking=", "trackin=0.5", "tracking=nan", "tracking=inf", "=1", "0.5"])
def test_a_bar_that_means_nothing_is_refused(pair: str) -> None:
    with pytest.raises(ConfigError, match=r"reward\.correct_above_for: expected type=number with a type of"):
        config(reward=RewardConfig(correct_above_for=["math=1", pair]))
