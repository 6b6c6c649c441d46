"""How a batch is cut into packed rows: the bounds hold, and neither the loss nor the gradient knows."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from batches import cut_unequally, gradients, groups_of, opened
from runs import Lab, run_lines, same_weights, weights
from tiny import GRADIENT_ROUNDING
from torch import Tensor

import videor1.training.tgrpo
from videor1.rewards import load_reward
from videor1.rewards.advantages import score_groups
from videor1.training.passes import pack, tgrpo_loss
from videor1.training.rows import loss_weight, training_rows
from videor1.types import Group

# Four prompts whose advantages have both signs, summed up in parts: each part may be as large as the whole.
CUT = 4 * GRADIENT_ROUNDING
OPTIONS = {"num_generations": 3, "max_completion_length": 16, "max_steps": 20, "beta": 0}


def longest(groups: list[Group], completions: int) -> int:
    """A bound on a row that ``completions`` of the longest answers to the longest prompt fill."""
    prompt = max(len(g.prompt.input_ids) for g in groups)
    return prompt + completions * max(len(c.token_ids) for g in groups for c in g.ordered)


def assert_same_gradient(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    scale = max(float(g.abs().max()) for g in one.values())
    assert scale > 1e-3
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=0, atol=CUT * scale)


@pytest.mark.parametrize(
    ("loss_type", "level"),
    [
        *(("grpo", "token"), ("grpo", "sequence"), ("dr_grpo", "sequence"), ("dapo", "token"), ("dapo", "sequence")),
        *(("luspo", "sequence"), ("cispo", "token"), ("sapo", "token"), ("vespo", "token")),
    ],
)
def test_gradients_do_not_depend_on_the_micro_batches(loss_type: str, level: str, lab: Lab) -> None:
    """(4 prompts, 1 pass), (2, 2) and (1, 4), with answers of unequal lengths; against a reference that has moved.
    And in rows under a bound, which the groups of one micro-batch share or which cuts them."""
    run = lab.make(**OPTIONS | {"loss_type": loss_type, "importance_level": level, "beta": 0.2})
    with torch.no_grad():
        assert run.frozen is not None
        for parameter in run.frozen.hf.parameters():
            parameter.mul_(1.05)
    with opened(run, 4) as prompts:
        groups = cut_unequally(groups_of(run, prompts))
        assert (score_groups(groups, run.config).result.advantages != 0).any(1).sum() >= 3
        whole = gradients(run, prompts, groups, 4)
        assert whole.keys() == run.model.trainable().keys()
        for batch, bound in ((2, None), (1, None), (4, 10**6), (4, longest(groups, 4)), (2, longest(groups, 1))):
            assert_same_gradient(whole, gradients(run, prompts, groups, batch, bound))


def test_bnpo_is_the_mean_of_its_micro_batches(lab: Lab) -> None:
    """bnpo divides by the tokens of each micro-batch: cutting the batch differently is another loss."""
    run = lab.make(loss_type="bnpo", **OPTIONS)
    with opened(run, 4) as prompts:
        groups = cut_unequally(groups_of(run, prompts))
        single = gradients(run, prompts, groups, 1)
        assert_same_gradient(single, gradients(run, prompts, groups, 1, longest(groups, 1)))
        losses = []
        for group, advantages in zip(groups, score_groups(groups, run.config).result.advantages, strict=True):
            row = pack(run.model, [group.prompt], [[c.token_ids for c in group.ordered]])
            losses.append(tgrpo_loss(run.model, row, advantages, run.config, num_tokens=1).loss / 4)
        expected = torch.autograd.grad(sum(losses), run.model.trainable().values())
    assert_same_gradient(dict(zip(run.model.trainable(), expected, strict=True)), single)


def test_rows_under_a_bound_hold_every_answer_once(lab: Lab) -> None:
    run = lab.make(num_generations=4, max_completion_length=16, per_device_train_batch_size=3)
    with opened(run, 5) as prompts:
        groups = cut_unequally(groups_of(run, prompts))
        scored = score_groups(groups, run.config)
        answers = [c.token_ids.tolist() for g in groups for c in g.ordered]
        for bound in (longest(groups, 1), longest(groups, 2), 10**6, None):
            run.config.max_tokens_per_row = bound
            rows, left_out = training_rows(run.model, groups, scored, run.config)
            assert left_out == 0
            found: list[tuple[int, list[int]]] = []
            for row in rows:
                layout = row.packed.layout
                assert bound is None or layout.total_tokens <= bound
                assert [p.draw for p in row.packed.prompts] == [groups[i].prompt.draw for i in row.groups]
                own = row.packed.labels.split([n for group in layout.completion_lengths for n in group])
                found += zip(row.completions.tolist(), [ids.tolist() for ids in own], strict=True)
                assert len({i // 3 for i in row.groups}) == 1  # rows do not join micro-batches
            assert sorted(found) == list(enumerate(answers))
            assert sum(row.weight for row in rows) == pytest.approx(1)
            assert len(rows) == 2 if bound in (None, 10**6) else len(rows) > 2


def with_every_group(model: Any, groups: Any, scored: Any, config: Any, totals: Any) -> Any:
    return training_rows(model, groups, scored, dataclasses.replace(config, beta=1.0), totals)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_groups_with_nothing_to_learn_are_left_out_exactly(
    loss_type: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lab.make(loss_type=loss_type, **OPTIONS)
    with opened(run, 4) as prompts:
        groups = cut_unequally(groups_of(run, prompts))
        for i in (0, 2):  # equal answers earn equal rewards
            groups[i] = dataclasses.replace(groups[i], ordered=(groups[i].ordered[0],) * 3)
        assert (score_groups(groups, run.config).result.advantages != 0).any(1).tolist() == [False, True, False, True]
        for batch in (4, 2, 1):
            left_out = gradients(run, prompts, groups, batch)
            with monkeypatch.context() as patch:
                patch.setattr(videor1.training.tgrpo, "training_rows", with_every_group)
                assert_same_gradient(gradients(run, prompts, groups, batch), left_out)
    rows = lab.rows()
    assert [row["pass/groups_left_out"] for row in rows] == [2, 0] * 3
    assert [row["pass/rows"] for row in rows] == [1, 1, 2, 2, 2, 4]
    for out, every in zip(rows[::2], rows[1::2], strict=True):
        assert out["loss"] == pytest.approx(every["loss"], abs=1e-6)
        assert out["pass/tokens"] < every["pass/tokens"]
        assert out["completions/mean_length"] == every["completions/mean_length"]


def test_with_a_kl_term_no_group_is_left_out(lab: Lab) -> None:
    lab.make(max_steps=2, reward__functions="toy_rewards:nothing", beta=0.1).train()
    assert [row["pass/groups_left_out"] for row in lab.rows()] == [0, 0]


def test_batches_with_nothing_to_learn_are_steps_all_the_same(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum and weight decay go on as they do on a gradient of 0; the figures that no pass has made are null."""
    options = OPTIONS | {"max_steps": 3, "weight_decay": 0.5, "reward__functions": "toy_rewards:nothing"}
    finals = []
    for name in ("left out", "kept"):
        calls = itertools.count()

        def only_at_first(completions: list[str], samples: Any, calls: Any = calls) -> list[float]:
            first = next(calls) == 0
            return [float(i * first) for i in range(len(completions))]

        monkeypatch.setattr("toy_rewards.nothing", only_at_first)
        load_reward.cache_clear()
        if name == "kept":
            monkeypatch.setattr(videor1.training.tgrpo, "training_rows", with_every_group)
        finals.append(weights(lab.make(name, **options).train()))
    load_reward.cache_clear()
    assert same_weights(*finals)
    rows = lab.rows("left out")
    assert [row["pass/groups_left_out"] for row in rows] == [0, 1, 1]
    assert [row["pass/rows"] for row in rows] == [1, 0, 0]
    assert [row["grad_norm"] == 0 for row in rows] == [False, True, True]
    text = (lab.folder / "left out" / "metrics.jsonl").read_text().splitlines()[-1]
    assert '"entropy": null' in text
    assert "NaN" not in text


def test_a_prompt_that_leaves_no_room_for_an_answer_is_skipped(lab: Lab) -> None:
    with opened(lab.make("run"), 8) as prompts:
        lengths = sorted({len(p.input_ids) for p in prompts})
    assert len(lengths) > 1
    bound = lengths[0] + 8
    lab.make("bounded", max_steps=3, max_tokens_per_row=bound).train()
    skipped = run_lines(lab.folder / "bounded", "skipped.jsonl")
    assert {line["kind"] for line in skipped} == {"too_long"}
    assert str(bound - 8) in skipped[0]["message"]
    rows = lab.rows("bounded")
    assert rows[-1]["data/skipped/too_long"] == len(skipped)
    assert all(row["pass/tokens"] <= bound * row["pass/rows"] for row in rows)


def test_weights() -> None:
    shares = {"completions": 0.25, "tokens": 0.5, "micro_batches": 4}
    expected = {"grpo": 0.25, "dr_grpo": 0.25, "bnpo": 0.125, "dapo": 1.0}
    assert {loss_type: loss_weight(loss_type, **shares) for loss_type in expected} == expected
