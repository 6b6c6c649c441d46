"""How a batch is cut into packed rows: the bounds hold, and neither the loss nor the gradient knows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import Opened, cut_unequally, gradients
from runs import metrics, run_lines, same_weights, trainer, weights
from tiny import GRADIENT_ROUNDING
from torch import Tensor

import videor1.training
import videor1.training.tgrpo
from videor1.demo.assets import Assets
from videor1.rewards import load_reward
from videor1.rewards.advantages import score_groups
from videor1.training.passes import pack
from videor1.training.rows import loss_weight, training_rows
from videor1.types import Group

# Four prompts whose advantages have both signs, summed up in parts: each part may be as large as the whole.
CUT = 4 * GRADIENT_ROUNDING


def longest(groups: list[Group], completions: int) -> int:
    """A bound on a row that ``completions`` of the longest answers to the longest prompt fill."""
    prompt = max(len(g.prompt.input_ids) for g in groups)
    return prompt + completions * max(len(c.token_ids) for g in groups for c in g.ordered)


def same_gradient(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    scale = max(float(g.abs().max()) for g in one.values())
    assert scale > 1e-3
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=0, atol=CUT * scale)


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_gradients_do_not_depend_on_the_micro_batches(
    loss_type: str, importance: str, assets: Assets, tmp_path: Path
) -> None:
    """(4 prompts, 1 pass), (2, 2) and (1, 4), with answers of unequal lengths; against a reference that has moved.
    And in rows under a bound, which the groups of one micro-batch share or which cuts them."""
    run = trainer(
        assets,
        tmp_path,
        loss_type=loss_type,
        importance_level=importance,
        num_generations=3,
        beta=0.2,
        max_completion_length=16,
        max_steps=20,
    )
    with torch.no_grad():
        assert run.frozen is not None
        for parameter in run.frozen.hf.parameters():
            parameter.mul_(1.05)
    with Opened(run):
        prompts = run.source.take(4)
        groups = cut_unequally(run.rollout(prompts)[0].groups)
        assert (score_groups(groups, run.config).result.advantages != 0).any(1).sum() >= 3
        whole = gradients(run, prompts, groups, 4)
        assert whole.keys() == run.model.trainable().keys()
        for batch, bound in ((2, None), (1, None), (4, 10**6), (4, longest(groups, 4)), (2, longest(groups, 1))):
            same_gradient(whole, gradients(run, prompts, groups, batch, bound))


def test_bnpo_is_the_mean_of_its_micro_batches(assets: Assets, tmp_path: Path) -> None:
    """bnpo divides by the tokens of each micro-batch: cutting the batch differently is another loss."""
    run = trainer(assets, tmp_path, loss_type="bnpo", num_generations=3, max_completion_length=16, max_steps=20, beta=0)
    with Opened(run):
        prompts = run.source.take(4)
        groups = cut_unequally(run.rollout(prompts)[0].groups)
        single = gradients(run, prompts, groups, 1)
        same_gradient(single, gradients(run, prompts, groups, 1, longest(groups, 1)))
        scored = score_groups(groups, run.config)
        expected = {name: torch.zeros_like(p) for name, p in run.model.trainable().items()}
        for i, group in enumerate(groups):
            advantages = scored.result.advantages[i]
            row = pack(run.model, [group.prompt], [[c.token_ids for c in group.ordered]])
            result = videor1.training.tgrpo.tgrpo_loss(run.model, row, advantages, run.config, num_tokens=1)
            for name, gradient in zip(
                expected, torch.autograd.grad(result.loss / 4, run.model.trainable().values()), strict=True
            ):
                expected[name] += gradient
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(single[name], gradient, rtol=0, atol=CUT * scale)


def test_rows_under_a_bound_hold_every_answer_once(assets: Assets, tmp_path: Path) -> None:
    run = trainer(assets, tmp_path, num_generations=4, max_completion_length=16, per_device_train_batch_size=3)
    with Opened(run):
        groups = cut_unequally(run.rollout(run.source.take(5))[0].groups)
        scored = score_groups(groups, run.config)
        answers = [c.token_ids.tolist() for g in groups for c in g.ordered]
        for bound in (longest(groups, 1), longest(groups, 2), 10**6, None):
            run.config.max_tokens_per_row = bound
            rows, left_out = training_rows(run.model, groups, scored, run.config)
            assert left_out == 0
            found: dict[int, list[int]] = {}
            for row in rows:
                layout = row.packed.layout
                assert bound is None or layout.total_tokens <= bound
                assert [p.draw for p in row.packed.prompts] == [groups[i].prompt.draw for i in row.groups]
                lengths = [n for group in layout.completion_lengths for n in group]
                for place, own in zip(row.completions.tolist(), row.packed.labels.split(lengths), strict=True):
                    assert place not in found
                    found[place] = own.tolist()
                assert len({i // 3 for i in row.groups}) == 1  # rows do not join micro-batches
            assert [found[i] for i in range(len(answers))] == answers
            assert sum(row.weight for row in rows) == pytest.approx(1)
            assert len(rows) == 2 if bound in (None, 10**6) else len(rows) > 2


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_groups_with_nothing_to_learn_are_left_out_exactly(
    loss_type: str, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(
        assets, tmp_path, loss_type=loss_type, num_generations=3, max_completion_length=16, max_steps=20, beta=0
    )
    with Opened(run):
        prompts = run.source.take(4)
        groups = cut_unequally(run.rollout(prompts)[0].groups)
        for i in (0, 2):  # equal answers earn equal rewards
            groups[i] = dataclasses.replace(groups[i], ordered=(groups[i].ordered[0],) * 3)
        assert (score_groups(groups, run.config).result.advantages != 0).any(1).tolist() == [False, True, False, True]
        for batch in (4, 2, 1):
            with monkeypatch.context() as patch:
                left_out = gradients(run, prompts, groups, batch)
                patch.setattr(videor1.training.tgrpo, "training_rows", _with_every_group)
                kept = gradients(run, prompts, groups, batch)
            same_gradient(kept, left_out)
    rows = metrics(tmp_path)
    assert [row["pass/groups_left_out"] for row in rows] == [2, 0] * 3
    assert [row["pass/rows"] for row in rows] == [1, 1, 2, 2, 2, 4]
    for out, every in zip(rows[::2], rows[1::2], strict=True):
        assert out["loss"] == pytest.approx(every["loss"], abs=1e-6)
        assert out["pass/tokens"] < every["pass/tokens"]
        assert out["completions/mean_length"] == every["completions/mean_length"]


def _with_every_group(model: Any, groups: Any, scored: Any, config: Any, totals: Any) -> Any:
    return training_rows(model, groups, scored, dataclasses.replace(config, beta=1.0), totals)


def test_with_a_kl_term_no_group_is_left_out(assets: Assets, tmp_path: Path) -> None:
    trainer(assets, tmp_path, max_steps=2, reward__functions="toy_rewards:nothing", beta=0.1).train()
    assert [row["pass/groups_left_out"] for row in metrics(tmp_path)] == [0, 0]


def _only_at_first() -> Any:
    calls: list[int] = []

    def reward(completions: list[str], samples: Any) -> list[float]:
        calls.append(len(completions))
        return [float(i) if len(calls) == 1 else 0.0 for i in range(len(completions))]

    return reward


def test_batches_with_nothing_to_learn_are_steps_all_the_same(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Momentum and weight decay go on as they do on a gradient of 0; the figures that no pass has made are null."""
    options: dict[str, Any] = {"max_steps": 4, "beta": 0, "num_generations": 3, "weight_decay": 0.5}
    finals = []
    for name in ("left out", "kept"):
        monkeypatch.setattr("toy_rewards.nothing", _only_at_first())
        load_reward.cache_clear()
        if name == "kept":
            monkeypatch.setattr(videor1.training.tgrpo, "training_rows", _with_every_group)
        run = trainer(assets, tmp_path / name, reward__functions="toy_rewards:nothing", **options)
        finals.append(weights(run.train()))
    load_reward.cache_clear()
    assert same_weights(*finals)
    rows = metrics(tmp_path / "left out")
    assert [row["pass/groups_left_out"] for row in rows] == [0, 1, 1, 1]
    assert [row["pass/rows"] for row in rows] == [1, 0, 0, 0]
    assert [row["grad_norm"] == 0 for row in rows] == [False, True, True, True]
    text = (tmp_path / "left out" / "metrics.jsonl").read_text().splitlines()[-1]
    assert '"entropy": null' in text
    assert "NaN" not in text


def test_a_prompt_that_leaves_no_room_for_an_answer_is_skipped(assets: Assets, tmp_path: Path) -> None:
    run = trainer(assets, tmp_path, max_steps=2)
    with Opened(run):
        lengths = sorted({len(p.input_ids) for p in run.source.take(8)})
    assert len(lengths) > 1
    bound = lengths[0] + 8
    trainer(assets, tmp_path / "bounded", max_steps=3, max_tokens_per_row=bound).train()
    skipped = run_lines(tmp_path / "bounded", "skipped.jsonl")
    assert {line["kind"] for line in skipped} == {"too_long"}
    assert str(bound - 8) in skipped[0]["message"]
    assert metrics(tmp_path / "bounded")[-1]["data/skipped/too_long"] == len(skipped)
    assert all(row["pass/tokens"] <= bound * row["pass/rows"] for row in metrics(tmp_path / "bounded"))


def test_weights() -> None:
    for loss_type in ("grpo", "dr_grpo"):
        assert loss_weight(loss_type, completions=0.25, tokens=0.5, micro_batches=3) == 0.25
    assert loss_weight("bnpo", completions=0.25, tokens=0.5, micro_batches=4) == 0.125
    assert loss_weight("dapo", completions=0.25, tokens=0.5, micro_batches=4) == 1.0
