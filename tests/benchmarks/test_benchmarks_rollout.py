"""The rollout benchmark in its smallest size: its gate, what its time is, its table, and the one about skipping."""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import CPU
from torch import Tensor

import videor1.rewards.scoring
from benchmarks import bench_rollout, report, rollout, rollout_skipping, run
from benchmarks.bench_rollout import ENGINE, GENERATE
from benchmarks.cases import Measurement
from benchmarks.measure import Clock
from benchmarks.record import load
from benchmarks.rollout_inputs import Rollouts, rollout_inputs
from benchmarks.rollout_turns import DECODE_SECONDS, DECODE_STEPS
from videor1.config.cli import parse
from videor1.demo.assets import Assets
from videor1.rollout.local.step import DecodeStep

SMALL = Rollouts("tiny", 2, 6)


def measured(sizes: Rollouts = SMALL) -> list[Measurement]:
    return run.in_turns(bench_rollout.rollout(sizes), CPU, Clock(CPU), 1)


def test_both_ways_pass_the_gate() -> None:
    rows = ours, generate = measured()
    for row in rows:
        assert (row.status, row.tokens, row.rounds, row.timing) == ("measured", 2 * 12 * 6, 1, "wall")
        assert 0 < row.decode_seconds < row.seconds
        assert row.cpu_seconds > 0 < row.peak_mib
        assert row.gbps is row.percent is None  # reading the weights bounds nothing on a CPU
    assert (ours.decode_steps, generate.decode_steps) == (5, 2 * 2 * 5)
    assert (generate.errors, ours.errors["tokens"], 0 < ours.errors["logp"] < 1e-5) == ({"tokens": 0.0}, 0, True)
    assert ours.does.endswith("log-probs and greedy answers")


@pytest.mark.parametrize(
    ("temperature", "words"),
    [
        (0.0, "greedy completions: .* from token 2 of sequence 0 on, in the ordered branch of prompt 0"),
        (1.0, "rms error 2.*bound 1e-04"),
    ],
)
def test_wrong_answers_have_no_time(monkeypatch: pytest.MonkeyPatch, temperature: float, words: str) -> None:
    """A token that is not the likeliest; a log-prob that is not the token's."""
    draw, calls = DecodeStep.draw, itertools.count()

    def wrong(self: DecodeStep, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        tokens, logp = draw(self, logits, uniform)
        if self.options.temperature != temperature:
            return tokens, logp
        if temperature:
            return tokens, logp + 0.2
        second = logits.index_fill(1, self.banned, -torch.inf).topk(2).indices[:, 1]
        return (second if next(calls) == 2 else tokens), logp

    monkeypatch.setattr(DecodeStep, "draw", wrong)
    ours, generate = measured()
    assert (ours.status, generate.status) == ("failed", "measured")
    assert ours.seconds is ours.decode_seconds is ours.peak_mib is ours.cpu_seconds is None
    assert re.search(words, ours.reason or "")


@pytest.mark.parametrize(
    ("number", "passed", "decoded", "steps", "tower"),
    [(0, 100.0, 0.0, 5, [2 * 64] * 2), (1, 4 * (100.0 + 5.0), 4 * 5.0, 20, [64] * 4)],
    ids=["ours", "generate"],
)
def test_what_a_call_holds_and_where_decoding_begins(
    number: int, passed: float, decoded: float, steps: int, tower: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock on which a pass of the language model over several positions takes 100 s, over one a second (of ours
    nothing: it decodes by itself). Of the tower ours takes all prompts' ordered frames, then all shuffled ones."""
    inputs, now, patches = rollout_inputs(SMALL, CPU), [0.0], []
    step = bench_rollout.rollout(SMALL).contenders[number].build(inputs)
    monkeypatch.setattr(bench_rollout.time, "perf_counter", lambda: now[0])

    def prefill(_module: Any, _args: Any, kwargs: Mapping[str, Any]) -> None:
        now[0] += 100.0 if kwargs["inputs_embeds"].shape[1] > 1 else 1.0

    for hf in (inputs.model.hf, inputs.plain):
        hf.model.language_model.register_forward_pre_hook(prefill, with_kwargs=True)
        hf.model.visual.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    outputs = step()
    assert (now[0], float(outputs[DECODE_SECONDS]), int(outputs[DECODE_STEPS])) == (passed, decoded, steps)
    assert patches == tower


def test_the_command_measures_records_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "tiny", "--completion", "3", "--rounds", "1", "--device", "cpu", "--record", str(tmp_path)]
    assert rollout.main([*options, "--prompts", "1", "2"]) == 0
    data = load(tmp_path / "cpu-rollout.json")
    assert (data["part"], data["complete"]) == ("rollout", True)
    assert [(row["implementation"], row["tokens"], row["decode_steps"]) for row in data["rows"]] == [
        (way, 36 * prompts, steps) for prompts in (1, 2) for way, steps in ((ENGINE, 2), (GENERATE, 4 * prompts))
    ]
    assert report.table(data) in capsys.readouterr().out


@pytest.mark.parametrize(("wrong", "rules"), [(0.0, 4), (1.0, 1), (math.nan, 1)])
def test_skipping_saves_and_changes_no_advantage(
    wrong: float, rules: int, assets: Assets, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches of 8 prompts, where a fifth of an untrained model's answers count as right."""
    batches = 2 if wrong else 1
    monkeypatch.setattr(rollout_skipping, "RULES", rollout_skipping.RULES[:rules])
    right = lambda text, *_, **__: float(zlib.crc32(text.encode()) % 5 == 0)  # noqa: E731
    size, score, asked_of = "--per_device_train_batch_size=8", rollout_skipping.score_groups, []

    def scored(groups: Any, config: Any, device: torch.device) -> Any:
        found = score(groups, config, device)
        found.result.advantages[0, 0] += wrong if len(asked_of) == 1 else 0  # of several: the last are right
        asked_of.append((config.temporal.rule, config.temporal_apply, config.temporal.skip_shuffled))
        return found

    monkeypatch.setattr(videor1.rewards.scoring, "accuracy_reward", right)
    monkeypatch.setattr(rollout_skipping, "parse", lambda kind, argv, **words: parse(kind, [*argv, size], **words))
    monkeypatch.setattr(rollout_skipping, "score_groups", scored)
    files = ["--model", str(assets.model), "--data", str(assets.train)]
    assert rollout.main(["--skipping", *files, "--batches", str(batches), "--device", "cpu"]) == (wrong != 0)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2 : 2 + rules]]
    assert [tuple(row[1:3]) for row in rows] == list(rollout_skipping.RULES)
    for _, _, _, asked, skipped, stopped, some, whole, saved, others, _ in rows:
        assert int(asked) > int(skipped) + int(stopped) > 0 == int(others)
        assert float(saved.rstrip("%")) == pytest.approx(100 * (1 - int(some) / int(whole)), abs=0.06)
    assert len({row[7] for row in rows}) == 1  # the same answers under every rule
    ways = [(rule, apply, skip) for rule, apply in rollout_skipping.RULES for skip in (True, False)]
    assert Counter(asked_of) == dict.fromkeys(ways, batches)
