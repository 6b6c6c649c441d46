"""Off-policy corrections, completions that do not count and overlong answers, in the trainer's own rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from batches import cut_unequally, gradients, groups_of, opened
from runs import Lab, last_metrics
from tiny import GRADIENT_ROUNDING
from torch import Tensor

from videor1.config import TrainConfig
from videor1.errors import ConfigError, TrainingStopped
from videor1.rewards.advantages import score_groups
from videor1.rewards.scoring import overlong_penalty
from videor1.training.passes import completion_logp, pack
from videor1.training.rows import training_rows
from videor1.types import Group

OPTIONS: dict[str, Any] = {"num_generations": 3, "max_completion_length": 16, "beta": 0}


def off_policy(groups: list[Group]) -> list[Group]:
    """As if another policy had sampled: log-probs that are up to one nat off, of each completion in another way."""

    def moved(group: Group) -> Group:
        shifts = torch.linspace(-1, 1, len(group.ordered))
        ordered = tuple(dataclasses.replace(c, logp=c.logp + s) for c, s in zip(group.ordered, shifts, strict=True))
        return dataclasses.replace(group, ordered=ordered)

    return [moved(group) for group in groups]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    scale = max(float(g.abs().max()) for g in one.values())
    assert scale > 1e-3
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=0, atol=4 * GRADIENT_ROUNDING * scale)


def by_formula(run: Any, groups: list[Group], weight: Any, counts: Any) -> dict[str, Tensor]:
    """The gradient of -sum of w A logp, the mean over the completions that count of the means over their tokens."""
    advantages = score_groups(groups, run.config).result.advantages
    terms = []
    for group, row in zip(groups, advantages, strict=True):
        for completion, advantage in zip(group.ordered, row, strict=True):
            logp = completion_logp(run.model, pack(run.model, [group.prompt], [[completion.token_ids]]))
            if counts(completion):
                terms.append(-(weight(logp.detach(), completion.logp) * advantage * logp).mean())
    loss = torch.stack(terms).mean()
    return dict(zip(run.model.trainable(), torch.autograd.grad(loss, run.model.trainable().values()), strict=True))


WEIGHTS: dict[tuple[str, str], Any] = {
    ("token", "truncate"): lambda ours, theirs: (ours - theirs).exp().clamp(0.8, 1.5),
    ("sequence", "truncate"): lambda ours, theirs: (ours - theirs).mean().exp().clamp(0.8, 1.5),
    ("sequence", "mask"): lambda ours, theirs: (w := (ours - theirs).mean().exp()) * (0.8 <= w <= 1.5),
}


@pytest.mark.parametrize(("level", "mode"), WEIGHTS)
def test_a_correction_weights_by_the_log_probs_at_sampling(level: str, mode: str, lab: Lab) -> None:
    """The formula's gradient, however the batch is cut into rows; and the share of weights that it changes."""
    bounds = {"correction_min": 0.8, "correction_max": 1.5}
    run = lab.make(**OPTIONS, **bounds, importance_correction=level, correction_mode=mode)
    with opened(run, 4) as prompts:
        groups = off_policy(cut_unequally(groups_of(run, prompts)))
        expected = by_formula(run, groups, WEIGHTS[level, mode], lambda _: True)
        for size in (4, 1):
            assert_same(expected, gradients(run, prompts, groups, size))
    row = lab.rows()[-1]
    assert 0 < row["sampling/truncated" if mode == "truncate" else "sampling/masked"] < 1
    assert row["sampling/kl_k3"] > 0.05


def test_an_entropy_bonus_is_in_every_row(lab: Lab) -> None:
    """Also of groups whose advantages are all 0."""
    run = lab.make(**OPTIONS, entropy_coef=0.1)
    with opened(run, 4) as prompts:
        groups = cut_unequally(groups_of(run, prompts))
        groups[0] = dataclasses.replace(groups[0], ordered=(groups[0].ordered[0],) * 3)
        rows, left_out = training_rows(run.model, groups, score_groups(groups, run.config), run.config)
        assert left_out == 0
        assert {i for row in rows for i in row.groups} == {0, 1, 2, 3}
        with_bonus = gradients(run, prompts, groups, 4)
        assert_same(with_bonus, gradients(run, prompts, groups, 1))
        run.config.entropy_coef = 0.0
        without = gradients(run, prompts, groups, 4)
    assert any(not torch.allclose(with_bonus[name], without[name], atol=1e-4) for name in without)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_completions_without_an_end_leave_the_loss_and_its_mean(loss_type: str, lab: Lab) -> None:
    run = lab.make(**OPTIONS, mask_truncated_completions=True, loss_type=loss_type)
    with opened(run, 4) as prompts:
        groups = cut_unequally(groups_of(run, prompts))
        for i, group in enumerate(groups):  # of the last group none counts
            ordered = tuple(
                dataclasses.replace(c, finished=(i + number) % 2 == 0 and i < 3)
                for number, c in enumerate(group.ordered)
            )
            groups[i] = dataclasses.replace(group, ordered=ordered)
        rows, left_out = training_rows(run.model, groups, score_groups(groups, run.config), run.config)
        assert left_out >= 1
        assert all(not set(row.groups) & {3} for row in rows)
        found = [gradients(run, prompts, groups, size) for size in (4, 2, 1)]
        if loss_type == "grpo":
            one = by_formula(run, groups, lambda *_: 1.0, lambda c: c.finished)
            for other in found:
                assert_same(one, other)
        for other in found[1:]:
            assert_same(found[0], other)


def test_a_run_without_anything_that_counts_goes_on(lab: Lab) -> None:
    """Steps whose completions are all cut off: no loss, and no division by zero."""
    lab.make(**OPTIONS | {"max_completion_length": 2, "max_steps": 2}, mask_truncated_completions=True).train()
    assert last_metrics(lab.folder)["step"] == 2
    assert [(row["loss"], row["pass/rows"]) for row in lab.rows() if "loss" in row] == [(0.0, 0)] * 2


def test_overlong_answers_earn_less(lab: Lab) -> None:
    assert [overlong_penalty(n, 16, 4) for n in (0, 12, 13, 15, 16, 20)] == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]
    assert overlong_penalty(16, 16, 0) == 0.0
    run = lab.make(**OPTIONS)
    with opened(run, 4) as prompts:
        groups = groups_of(run, prompts)
        plain = score_groups(groups, run.config)
        long = score_groups(groups, dataclasses.replace(run.config, mask_overlong=16))
    assert torch.allclose(long.format, plain.format - plain.lengths / 16)
    with pytest.raises(ConfigError, match=r"mask_overlong: expected at most max_completion_length \(768\)"):
        TrainConfig(mask_overlong=769)
    with pytest.raises(ConfigError, match=r"correction_min: expected at most correction_max \(2\), got 3"):
        TrainConfig(correction_min=3.0)


def test_a_correction_needs_log_probs(lab: Lab) -> None:
    """Of a server that gives none: never a weight of 1 in their place."""
    run = lab.make(**OPTIONS, importance_correction="token")
    with opened(run, 4) as prompts:
        groups = groups_of(run, prompts)
        unknown = tuple(dataclasses.replace(c, logp=torch.full_like(c.logp, math.nan)) for c in groups[0].ordered)
        groups[0] = dataclasses.replace(groups[0], ordered=unknown)
        with pytest.raises(TrainingStopped, match=r"importance_correction token: the server gives no log-probs"):
            gradients(run, prompts, groups, 4)
