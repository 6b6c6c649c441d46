"""The rollout benchmark: its gate, what its time is and is not, its table, its command, and the one about skipping."""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import CPU, cpu_options, made_up_case
from tiny import hf_inputs
from torch import Tensor

import videor1.rewards
import videor1.rewards.scoring
from benchmarks import bench_rollout, report, rollout, rollout_skipping, run
from benchmarks.bench_rollout import ENGINE, GENERATE
from benchmarks.cases import Contender, Measurement, Work, pairs
from benchmarks.measure import Clock
from benchmarks.record import load
from benchmarks.rollout_inputs import (
    RolloutInputs,
    Rollouts,
    branches,
    demo_model,
    generate_inputs,
    requests,
    rollout_inputs,
    weight_bytes,
)
from benchmarks.rollout_turns import DECODE_SECONDS, DECODE_STEPS, RolloutCase, RolloutMeasurement, measure_rollout
from benchmarks.step_inputs import SHAPES, model_config
from videor1.config import TrainConfig
from videor1.demo.assets import Assets
from videor1.demo.tokenizer import make_tokenizer
from videor1.model import VideoLM
from videor1.rewards.judge import TemporalJudge
from videor1.rollout.local.step import DecodeStep

SMALL = Rollouts("tiny", 2, 6)


@pytest.fixture(scope="module")
def inputs() -> RolloutInputs:
    return rollout_inputs(SMALL, CPU)


def measured(case: RolloutCase, rounds: int = 1) -> list[Measurement]:
    return measure_rollout(case, CPU, Clock(CPU), rounds)


def test_both_ways_pass_the_gate() -> None:
    ours, generate = measured(bench_rollout.rollout(SMALL), 2)
    for row in (ours, generate):
        assert isinstance(row, RolloutMeasurement)
        assert (row.status, row.tokens, row.rounds, row.timing) == ("measured", 2 * 12 * 6, 2, "wall")
        assert 0 < row.decode_seconds < row.seconds
        assert row.cpu_seconds > 0
        assert row.peak_mib > 0
        assert row.gbps is row.percent is None  # reading the weights bounds nothing on a CPU
    assert (ours.decode_steps, generate.decode_steps) == (5, 2 * 2 * 5)
    assert set(ours.errors) == {"tokens", "logp"}
    assert 0 < ours.errors["logp"] < 1e-5
    assert ours.errors["tokens"] == 0
    assert generate.errors == {"tokens": 0.0}
    assert ours.does.endswith("log-probs and greedy answers")


def test_bf16_passes_the_gate_with_room() -> None:
    """In bf16 greedy answers are not compared."""
    ours, generate = measured(bench_rollout.rollout(Rollouts("tiny", 1, 6, torch.bfloat16)))
    assert (ours.status, generate.status) == ("measured", "measured")
    assert 1e-5 < ours.errors["logp"] < 0.6 * bench_rollout.BOUNDS[torch.bfloat16]
    assert ours.does.endswith("gate: log-probs")


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
    ours, generate = measured(bench_rollout.rollout(SMALL))
    assert (ours.status, generate.status) == ("failed", "measured")
    assert ours.seconds is ours.decode_seconds is ours.peak_mib is ours.cpu_seconds is None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(ours.reason)


def test_answers_that_end_early_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ours by a stop token, of generate by too few tokens."""

    def ending(sizes: Rollouts, device: torch.device) -> RolloutInputs:
        made = rollout_inputs(sizes, device)
        logits = made.plain(**generate_inputs(made, *next(branches(made))[:2])).logits[0, -1]
        logits[list(made.model.special.vision)] = -torch.inf
        made.model.special = dataclasses.replace(made.model.special, eos=int(logits.argmax()))
        return made

    case = dataclasses.replace(bench_rollout.rollout(SMALL), inputs=lambda device: ending(SMALL, device))
    ours, generate = measured(case)
    assert (ours.status, generate.status) == ("failed", "measured")
    assert "greedy completions" in (ours.reason or "")
    shorter = dataclasses.replace(SMALL, new_tokens=5)
    case = dataclasses.replace(bench_rollout.rollout(SMALL), inputs=lambda device: rollout_inputs(shorter, device))
    ours, generate = measured(case)
    assert (ours.status, generate.status) == ("failed", "failed")
    assert "tokens: rms error 1.00e+00" in (generate.reason or "")


def test_the_parameters_are_shared_and_no_token_ends_an_answer(inputs: RolloutInputs) -> None:
    ours, plain = (dict(hf.named_parameters()) for hf in (inputs.model.hf, inputs.plain))
    assert ours.keys() == plain.keys()
    assert all(ours[name] is plain[name] for name in ours)
    text = [hf.model.language_model.config._attn_implementation for hf in (inputs.model.hf, inputs.plain)]
    assert text[1] == "sdpa" != text[0]
    assert (inputs.model.special.eos, inputs.model.special.pad) == (-1, -1)
    assert inputs.plain.generation_config.eos_token_id is None


def test_both_ways_see_the_same_frames_in_the_same_orders(inputs: RolloutInputs) -> None:
    found = list(branches(inputs))
    assert [number for *_, number in found] == [8, 4, 8, 4]
    assert [len(prompt.input_ids) for prompt, *_ in found] == [76] * 4
    for i, request in enumerate(requests(inputs)):
        for branch, (prompt, patches, number) in zip((request.ordered, request.shuffled), found[2 * i :], strict=False):
            assert branch is not None
            assert branch.count == number
            assert request.prompt is prompt
            pixels = generate_inputs(inputs, prompt, patches)["pixel_values_videos"]
            own = inputs.plain.model.visual(pixels, grid_thw=torch.tensor([prompt.media.grid_thw])).pooler_output
            assert (branch.features - own).abs().max() <= 1e-5 * own.abs().max()
    patches = [p for _, p, _ in found]
    assert sorted(patches[0].flatten().tolist()) == sorted(patches[1].flatten().tolist())
    assert not torch.equal(patches[0], patches[1])
    assert not torch.equal(patches[0], patches[2])
    prompt = inputs.prompts[0]
    given = generate_inputs(inputs, prompt, found[0][1])
    expected = hf_inputs(inputs.model, prompt)
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in given)


def test_the_timed_part_holds_two_passes_of_the_tower_and_no_gate(inputs: RolloutInputs) -> None:
    case = bench_rollout.rollout(SMALL)
    ours = case.contenders[0].build(inputs)
    patches: list[int] = []
    handle = inputs.model.visual.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    first, second = ours(), ours()
    handle.remove()
    assert patches == [2 * 64] * 4  # each call: all prompts' ordered frames, then all shuffled ones
    assert torch.equal(first["tokens"], second["tokens"])


@pytest.mark.parametrize("number", [0, 1])
def test_decode_time_begins_after_the_last_prefill(
    inputs: RolloutInputs, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock on which each pass of the language model over more than a position takes 100 s, and all else nothing."""
    now = [0.0]
    monkeypatch.setattr(bench_rollout.time, "perf_counter", lambda: now[0])

    def prefill(_module: Any, _args: Any, kwargs: Mapping[str, Any]) -> None:
        now[0] += 100.0 if kwargs["inputs_embeds"].shape[1] > 1 else 1.0

    step = bench_rollout.rollout(SMALL).contenders[number].build(inputs)
    for hf in (inputs.model.hf, inputs.plain):
        hf.model.language_model.register_forward_pre_hook(prefill, with_kwargs=True)
    outputs = step()
    for hf in (inputs.model.hf, inputs.plain):
        hf.model.language_model._forward_pre_hooks.clear()
        hf.model.language_model._forward_hooks.clear()
    assert now[0] == (100.0 if number == 0 else 4 * (100.0 + 5.0))
    assert float(outputs[DECODE_SECONDS]) == (0.0 if number == 0 else 4 * 5.0)
    assert int(outputs[DECODE_STEPS]) == (5 if number == 0 else 20)


def watched_case(log: list[tuple[str, bool]], *, bytes_: float = 0.0, late: bool = False) -> RolloutCase:
    """Contenders that note whether their memory is being watched."""

    def build(name: str) -> Any:
        def call() -> dict[str, Tensor]:
            watched = torch.autograd._profiler_enabled()
            log.append((name, watched))
            if late and name == "other" and not watched:
                raise torch.OutOfMemoryError("no")
            return {"out": torch.ones(()), DECODE_SECONDS: torch.tensor(0.5), DECODE_STEPS: torch.tensor(5)}

        return call

    contenders = [Contender(name, lambda _, name=name: build(name)) for name in ("ours", "naive", "other")]
    return made_up_case(contenders, Work(0.0, bytes_, "", 7), log, RolloutCase, turns=measure_rollout, rounds=2)


def test_calls_whose_memory_is_watched_are_not_timed() -> None:
    log: list[tuple[str, bool]] = []
    rows = run.in_turns(watched_case(log), CPU, Clock(CPU))
    assert log == [(name, True) for name in ("naive", "ours", "other")] + [
        (name, False) for name in ("ours", "naive", "other") * 2
    ]
    assert [row.implementation for row in rows] == ["ours", "naive", "other"]
    assert [row.rounds for row in rows] == [2] * 3
    assert len(run.in_turns(watched_case(log), CPU, Clock(CPU), 3)) == 3
    assert len(log) == 9 + 12


def test_a_late_failure_takes_the_time_back() -> None:
    ours, _, other = measured(watched_case([], late=True), 2)
    assert ours.status == "measured"
    assert (other.status, other.reason) == ("not run", "does not fit in the device's memory")
    assert other.seconds is other.peak_mib is other.cpu_seconds is None
    record = run.run_cases("rollout", [watched_case([], late=True)], cpu_options())
    assert "| other | not run: does not fit in the device's memory |" in report.table(record.to_json())


def test_the_floor_is_reading_the_weights_once_a_step() -> None:
    """5 steps in 0.5 s that read 2 GB each, where 100 GB/s were measured."""
    ours, *_ = measured(watched_case([], bytes_=2e9))
    assert ours.gbps == pytest.approx(20)
    assert ours.percent == pytest.approx(20)


def test_weights_that_a_step_reads(inputs: RolloutInputs) -> None:
    hf = inputs.model.hf
    own = sum(p.numel() for n, p in hf.named_parameters() if "language_model" in n)
    assert weight_bytes(inputs.model) == 4 * own  # tied: the head is the embedding
    assert weight_bytes(demo_model(torch.bfloat16, CPU)) == 2 * own
    sizes = {}
    for name in ("3b", "7b"):
        with torch.device("meta"):
            tokenizer = make_tokenizer()
            made = type(hf)._from_config(model_config(SHAPES[name], tokenizer), dtype=torch.bfloat16)
            sizes[name] = weight_bytes(VideoLM(made, tokenizer, device="meta"))
    # Public figures: 3.086 and 7.616 billion parameters of the language models, the larger's embedding not read.
    assert sizes["3b"] == pytest.approx(2 * 3.086e9, rel=1e-3)
    assert sizes["7b"] == pytest.approx(2 * (7.616e9 - 152064 * 3584), rel=1e-3)


def test_cases_by_device() -> None:
    assert [case.size for case in bench_rollout.cases(CPU)] == [
        {"model": "tiny", "prompts": n, "P": 76, "C": 64, "dtype": "float32"} for n in (1, 4)
    ]
    on_card = bench_rollout.cases(torch.device("cuda"))
    assert [(c.size["model"], c.size["prompts"], c.slow) for c in on_card] == [
        ("7b", 1, False),
        ("3b", 1, False),
        ("7b", 16, True),
        ("3b", 16, True),
    ]
    assert {(c.size["P"], c.size["C"], c.size["dtype"]) for c in on_card} == {(1224, 256, "bfloat16")}
    assert [contender.ours for _, contender in pairs(run.part_cases("rollout", CPU))] == [True, True, False, False]


def test_the_command_measures_records_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "tiny", "--prompts", "1", "2", "--completion", "3", "--rounds", "1", "--device", "cpu"]
    assert rollout.main([*options, "--record", str(tmp_path)]) == 0
    data = load(tmp_path / "cpu-rollout.json")
    assert (data["part"], data["complete"]) == ("rollout", True)
    assert [row["implementation"] for row in data["rows"]] == [ENGINE, GENERATE] * 2
    assert [row["tokens"] for row in data["rows"]] == [36, 36, 72, 72]
    assert [row["decode_steps"] for row in data["rows"]] == [2, 4, 2, 8]
    printed = capsys.readouterr().out
    assert "top_p 0.95, top_k 50: model tiny, prompts 2, P 76, C 3, dtype float32" in printed
    assert report.table(data) in printed
    assert report.table(data) in report.report(tmp_path)

    ours, generate = data["rows"][:2]
    ours |= {"seconds": 2.0, "cpu_seconds": None, "decode_seconds": 0.2, "decode_steps": 100, "percent": 40.0}
    generate |= {"seconds": 5.0, "decode_seconds": 3.0, "tokens": 50}
    lines = report.table(data).splitlines()
    assert lines[6].startswith(f"| {ENGINE} (")
    assert ") | 36 | 2 (1) |  | 18 | 2.50 | 100 | 2 | 0.8 | 2.50 | " in lines[6]
    assert " | 50 | 5 (1) | " in lines[7]
    assert " | 10 | 1.00 | 4 | 750 |  |  | " in lines[7]
    generate |= {"seconds": None, "status": "not run", "reason": "left out"}
    lines = report.table(data).splitlines()
    assert " | 18 |  | 100 | " in lines[6]
    assert lines[7].startswith("| transformers generate | not run: left out |")
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 2 * 4  # two cases
    assert {len(line.split(" | ")) for line in rows} == {len(report.ROLLOUT_COLUMNS)}


def test_the_command_fails_with_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_rollout, "_logp_difference", lambda inputs: torch.tensor(0.1))
    assert rollout.main(["--shape", "tiny", "--prompts", "1", "--completion", "2", "--rounds", "1"]) == 1


@pytest.mark.parametrize("option", ["--prompts", "--completion", "--rounds", "--batches"])
def test_numbers_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rollout.main([option, "0"])
    assert f"{option}: expected a whole number of at least 1, got '0'" in capsys.readouterr().err


@pytest.fixture
def right_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of an untrained model's answers count as right."""

    def accuracy(text: str, *_: Any, **__: Any) -> float:
        return float(zlib.crc32(text.encode()) % 5 == 0)

    monkeypatch.setattr(videor1.rewards.scoring, "accuracy_reward", accuracy)


def skipping(assets: Assets, *more: str) -> int:
    files = ["--model", str(assets.model), "--data", str(assets.train)]
    return rollout.main(["--skipping", *files, "--batches", "1", "--device", "cpu", *more])


@pytest.mark.usefixtures("right_by_chance")
def test_skipping_saves_and_changes_no_advantage(
    assets: Assets, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score, asked_of = rollout_skipping.score_groups, []

    def scored(groups: Any, config: TrainConfig, device: torch.device) -> Any:
        asked_of.append((config.temporal.rule, config.temporal_apply, config.temporal.skip_shuffled))
        return score(groups, config, device)

    monkeypatch.setattr(rollout_skipping, "score_groups", scored)
    assert skipping(assets, "--batches", "4") == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["checkpoint", "rule", "apply"]
    rows = [line.split() for line in lines[:4]]
    assert lines[-1].endswith("equal to 1e-06")
    assert [tuple(row[1:3]) for row in rows] == list(rollout_skipping.RULES)
    for _, _, _, asked, skipped, stopped, some, whole, saved, others, difference in rows:
        assert int(asked) > int(skipped) + int(stopped) > 0
        assert 0 < int(some) < int(whole)
        assert float(saved.rstrip("%")) == pytest.approx(100 * (1 - int(some) / int(whole)), abs=0.06)
        assert (others, float(difference) <= 1e-6) == ("0", True)
    assert len({row[7] for row in rows}) == 1  # the same answers under every rule
    assert len({row[6] for row in rows}) > 1
    every = [(rule, apply, skip) for rule, apply in rollout_skipping.RULES for skip in (True, False)]
    assert set(asked_of) == set(every)
    assert len(asked_of) == 4 * len(every)


@pytest.mark.usefixtures("right_by_chance")
def test_skipping_what_matters_is_an_error(
    assets: Assets, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = TemporalJudge._verdict
    monkeypatch.setattr(TemporalJudge, "_verdict", lambda self: None if verdict(self) is None else False)
    assert skipping(assets) == 1
    assert "NOT equal to 1e-06" in capsys.readouterr().out


def test_an_advantage_of_nan_is_an_error(assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    score, calls = rollout_skipping.score_groups, itertools.count()

    def wrong(*arguments: Any) -> Any:
        scored = score(*arguments)
        if next(calls) == 1:
            scored.result.advantages[0, 0] = math.nan
        return scored

    monkeypatch.setattr(rollout_skipping, "score_groups", wrong)
    monkeypatch.setattr(rollout_skipping, "RULES", rollout_skipping.RULES[:1])
    assert skipping(assets, "--batches", "2") == 1


def test_checkpoints_of_a_demonstration_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("sft/checkpoints/step-5", "sft/checkpoints/step-75", "checkpoints/step-150", "checkpoints/step-20"):
        (tmp_path / folder).mkdir(parents=True)
    found = rollout_skipping.found_checkpoints(tmp_path)
    assert [rollout_skipping._short(path) for path in found] == ["sft/checkpoints/step-75", "step-20", "step-150"]
    for options in ([], ["--run", str(tmp_path / "none")], ["--model", str(tmp_path)]):
        with pytest.raises(SystemExit):
            rollout.main(["--skipping", *options])
        assert "expected --run FOLDER of a finished demonstration" in capsys.readouterr().err


def test_a_missing_file_is_one_line(assets: Assets, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--model", str(assets.model), "--data", str(tmp_path / "none.json")]
    assert rollout.main(["--skipping", *files]) in (1, 2)
    assert capsys.readouterr().err.startswith("error: ")
