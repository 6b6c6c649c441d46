"""Answers that the data bring: slots of the group, p, the loss, resume and what is counted."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from batches import gradients, opened
from runs import Lab, run_lines
from tiny import GRADIENT_ROUNDING

from videor1.answer import extract_answer
from videor1.config import TrainConfig
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.rewards.advantages import score_groups
from videor1.rewards.judge import TemporalJudge
from videor1.training.loop import Loop
from videor1.training.offline import offline_completions
from videor1.training.passes import completion_logp, pack
from videor1.types import Completion, Group, OfflineAnswer, Prompt

OPTIONS: dict[str, Any] = {"num_generations": 4, "max_completion_length": 16, "beta": 0}


def right(entry: dict[str, Any]) -> str:
    return f"<think>I looked.</think><answer>{extract_answer(entry['solution'])}</answer>"


def data(assets: Assets, folder: Path, count: int = 2) -> Path:
    """Each second row brings ``count`` answers, the first of them right, the others wrong."""
    rows = runs.entries(assets.train)
    for row in rows[::2]:
        answers = [right(row), *["<think>No.</think><answer>none</answer>"] * (count - 1)]
        row["completions"] = [{"text": text, "source": f"teacher {i}"} for i, text in enumerate(answers)]
    return runs.write_data(folder / "offline.json", rows)


def options(assets: Assets, folder: Path, **more: Any) -> dict[str, Any]:
    return OPTIONS | {"dataset_name": data(assets, folder), "data__root": assets.folder} | more


def test_they_fill_slots_and_are_counted(lab: Lab, assets: Assets, tmp_path: Path) -> None:
    lab.make("run", **options(assets, tmp_path), max_steps=2, num_offline=1, importance_correction="token").train()
    rows, steps = run_lines(lab.folder / "run", "rollouts.jsonl"), runs.metrics(lab.folder / "run")
    with_some = [row for row in rows if "sources" in row]
    assert 0 < len(with_some) < len(rows)
    for row in with_some:
        assert row["sources"] == [None, None, None, "teacher 0"]
        assert row["accuracy"][3] == 1
        assert row["p"] == pytest.approx(sum(row["accuracy"][:3]) / 3)
        assert row["completions"][3].startswith("<think>I looked.</think>")
        assert row["finished"][3]
    assert all(len(row["completions"]) == 4 for row in rows)
    by_step = itertools.groupby(rows, key=lambda row: row["step"])
    for step, (_, members) in zip(steps, by_step, strict=True):
        members = list(members)
        offline = sum("sources" in row for row in members)
        assert step["offline/share"] == pytest.approx(offline / (4 * len(members)))
        assert step["offline/left_out"] == offline
        assert step["offline/accuracy"] == 1 if offline else step["offline/accuracy"] is None
        assert step["sampling/sampling_logp_difference/max"] < 2e-5  # of the sampled ones


def test_their_gradient_is_that_of_a_ratio_of_1(lab: Lab, assets: Assets, tmp_path: Path) -> None:
    """-A logp, whatever the correction: nothing is known of what sampled them."""
    gradient = {}
    for correction in ("none", "sequence"):
        run = lab.make(correction, **options(assets, tmp_path), importance_correction=correction)
        with opened(run, 2) as prompts:
            (prompt,) = [p for p in prompts if p.offline]
            (group,) = groups(run, [prompt])
            assert [c.source for c in group.ordered] == [None, None, "teacher 0", "teacher 1"]
            advantages = score_groups([group], run.config).result.advantages[0]
            assert advantages[2] > advantages[3]
            terms = []
            for completion, advantage in zip(group.ordered, advantages, strict=True):
                logp = completion_logp(run.model, pack(run.model, [prompt], [[completion.token_ids]]))
                terms.append(-(advantage * logp).mean())
            names = run.model.trainable()
            loss = torch.stack(terms).mean()
            expected = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
            gradient[correction] = gradients(run, [prompt], [group], 1)
        scale = max(float(g.abs().max()) for g in expected.values())
        assert scale > 1e-3
        for name, value in expected.items():
            bound = 4 * GRADIENT_ROUNDING * scale
            torch.testing.assert_close(gradient[correction][name], value, rtol=0, atol=bound)


def groups(run: Any, prompts: list[Prompt]) -> list[Group]:
    rollout, _ = run.rollout(prompts)
    return [group for group in rollout.groups if group is not None]


@pytest.mark.parametrize("rule", ["margin", "threshold", "reference"])
@pytest.mark.parametrize("apply", ["reward", "advantage"])
def test_exact_skipping_knows_them(rule: str, apply: str, lab: Lab) -> None:
    """A verdict that the bonus does not matter is right whatever the unknown shuffled answers are."""
    config = TrainConfig(num_generations=4, num_offline=2)
    config.temporal.rule, config.temporal.apply = rule, apply  # type: ignore[assignment]
    sample = dataclasses.replace(lab_prompt(lab).sample, problem_type="free-form", solution="<answer>red</answer>")

    def made(right: int, source: str | None = None) -> Completion:
        text = f"<answer>{'red' if right else 'blue'}</answer>"
        return Completion(torch.zeros(3, dtype=torch.int64), torch.zeros(3), True, text, source)

    verdicts = set()
    for kinds in itertools.product((0, 1), repeat=4):
        ordered = (*map(made, kinds[:2]), *(made(kind, "teacher") for kind in kinds[2:]))
        judge = TemporalJudge(sample, config, ordered=2, shuffled=2, offline=ordered[2:])
        for completion in ordered[:2]:
            judge.ordered_done(completion)
        results = []
        for shuffled in itertools.product((0, 1), repeat=2):
            prompt = Prompt(sample, torch.zeros(1, dtype=torch.int64), None, 0)
            group = Group(prompt, ordered, tuple(map(made, shuffled)), None, 2)
            results.append(score_groups([group], config).result.advantages)
        same = all(torch.allclose(one, results[0], atol=1e-6) for one in results)
        verdicts.add(judge.needed)
        if judge.needed is False:
            assert same
        elif not same:
            assert judge.needed
    assert {True, False} <= verdicts | {judge.needed}


def lab_prompt(lab: Lab) -> Prompt:
    run = lab.make(**OPTIONS)
    with opened(run, 1) as prompts:
        return prompts[0]


def test_a_resumed_run_is_the_same(lab: Lab, assets: Assets, tmp_path: Path) -> None:
    given = options(assets, tmp_path, max_steps=4, save_steps=2, normalize="ema_task")
    lab.make("whole", **given).train()
    runs.kill(lab.make("run", **given), Loop, "optimizer_step", 4)
    lab.make("run", **given, resume="auto").train()
    runs.assert_same_run(lab.folder / "run", lab.folder / "whole")


def test_what_has_no_slot_or_is_too_long_is_left_out_and_counted(lab: Lab) -> None:
    run = lab.make(**OPTIONS | {"max_completion_length": 12})
    sample = lab_prompt(lab).sample
    answers = ("<answer>a</answer>", "<answer>" + "many words " * 9 + "</answer>", *["<answer>b</answer>"] * 4)
    sample = dataclasses.replace(sample, completions=tuple(OfflineAnswer(text, "x") for text in answers))
    for slots, texts in ((None, "abb"), (0, ""), (1, "a"), (2, "ab")):
        config = dataclasses.replace(run.config, num_offline=slots)
        found, left_out = offline_completions(run.model, sample, config)
        assert [c.text for c in found] == [f"<answer>{letter}</answer>" for letter in texts]
        assert left_out == len(answers) - len(texts)
    for completion in found:
        assert completion.token_ids[-1] == run.model.tokenizer.eos_token_id
        assert completion.logp.isnan().all()


def test_mistakes(lab: Lab, assets: Assets, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_offline: expected at least 0, and less than num_generations \(4\)"):
        TrainConfig(num_generations=4, num_offline=4)
    rows = [dict(row) for row in runs.entries(assets.train) * 3]
    bad = [["text"], {"text": "a"}, [{"text": 3}], [{"text": " "}], [{"text": "a", "form": 1}], [{"source": "a"}]]
    for row, value in zip(rows, bad, strict=False):
        row["completions"] = value
    rows[len(bad)]["completions"] = [{"text": "<|im_end|>"}]
    path = runs.write_data(tmp_path / "bad.json", rows[: len(bad) + 2])
    lab.make("run", **OPTIONS, dataset_name=path, data__root=assets.folder, max_steps=1).train()
    kinds = [row["kind"] for row in run_lines(lab.folder / "run", "skipped.jsonl")]
    assert sorted(kinds[: len(bad)]) == ["completions"] * 2 + ["wrong_type"] * 4
    assert set(kinds[len(bad) :]) <= {"special_token"}
