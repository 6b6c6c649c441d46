"""Deviations of the rewards of a batch and of a problem type, written again, and the same in any order."""

import json
import random
import statistics

import pytest

from videor1.rewards.deviation import TaskDeviations, deviation


def test_of_a_batch() -> None:
    rng = random.Random(0)
    rewards = [rng.choice((0.0, 0.1, 1.0, 1.2, 2.3)) + rng.random() * 1e-3 for _ in range(1001)]
    assert deviation(rewards) == pytest.approx(statistics.stdev(rewards), rel=1e-14)
    shuffled = rng.sample(rewards, len(rewards))
    assert (sum(shuffled) != sum(rewards), deviation(shuffled)) == (True, deviation(rewards))
    assert [deviation(few) for few in ([], [3.0], [0.1] * 7)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_of_a_problem_type(decay: float) -> None:
    """Means over the batches that had the type, each with its weight, and all from a saved state on."""
    rng, seen = random.Random(1), {"OCR": [], "regression": []}
    task = TaskDeviations(decay)
    for _ in range(12):
        batch = {name: [rng.random() + (name == "OCR") for _ in range(rng.choice((0, 2, 5)))] for name in seen}
        for name, rewards in batch.items():
            seen[name] += [rewards] * bool(rewards)
        task.update({name: rng.sample(rewards, len(rewards)) for name, rewards in batch.items()})
        saved = json.loads(json.dumps(task.state()))
        task = TaskDeviations(decay, saved)  # as after a resume
        assert task.state() == saved
        for name, batches in seen.items():
            if batches:
                weights = [decay ** (len(batches) - 1 - i) for i in range(len(batches))]
                total = sum(weights)
                mean = sum(w * statistics.fmean(r) for w, r in zip(weights, batches, strict=True)) / total
                square = [w * statistics.fmean([x * x for x in r]) for w, r in zip(weights, batches, strict=True)]
                assert task.of(name) == pytest.approx((sum(square) / total - mean**2) ** 0.5, rel=1e-9)
    assert all(len(batches) > 3 for batches in seen.values())


def test_equal_rewards_have_none() -> None:
    task = TaskDeviations(0.9)
    for _ in range(30):
        task.update({"OCR": [1.3, 1.3, 1.3]})
    assert task.of("OCR") < 1e-7
