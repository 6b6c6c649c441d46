"""Whole steps side by side: phases, gate, what the reference's way computes, the command, table and pictures."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import CEILINGS, CPU

from benchmarks import bench_growth, bench_step, growth, growth_curves, report, step, step_floor, whole_step
from benchmarks.cases import OUR_STEP, REFERENCE_STEP
from benchmarks.measure import Clock
from benchmarks.our_step import OurStep
from benchmarks.phases import OTHER, PHASES, Phases
from benchmarks.reference_step import ReferenceStep, as_8_bit
from benchmarks.trl_step import TRLStep
from benchmarks.whole_inputs import Setting, WholeInputs, whole_inputs
from videor1.video.media import load_media
from videor1.video.patches import permute_frames
from videor1.video.shuffle import draw_permutation

SMALL = Setting(frames=4, prompts=2, generations=2, completion=4)
GRID = (2, 6, 10)  # of a video in patches
MIB = 2**20


@pytest.fixture(scope="module")
def inputs():
    with whole_inputs(SMALL, CPU) as made:
        yield made


def measured(setting: Setting, **changes: Any) -> dict[str, dict[str, Any]]:
    case = dataclasses.replace(bench_step.step(setting), **changes)
    return {row.implementation: row.to_json() for row in whole_step.measure_steps(case, CPU, Clock(CPU), 1)}


# --- phases ---


class FakeTime:
    """Stands in for the module ``time``; its clock moves when something sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr("benchmarks.phases.time", fake)
    return fake


def test_an_inner_phase_is_taken_out_of_the_outer_one(clock: FakeTime) -> None:
    phases = Phases(CPU)
    with phases("never"):
        clock.sleep(5)
    with phases.watched(memory=False):
        with phases("outer"):
            clock.sleep(2)
            with phases("inner"):
                clock.sleep(4)
            clock.sleep(2)
        with phases("begun"):
            phases.become("become")
            clock.sleep(3)
    assert phases.seconds == {OTHER: 0, "outer": 4, "inner": 4, "begun": 0, "become": 3}
    assert phases.current == OTHER


def test_an_error_ends_its_phases() -> None:
    phases = Phases(CPU)
    with pytest.raises(KeyError), phases("outer"), phases("inner"):
        raise KeyError
    assert phases.current == OTHER


def test_memory_is_the_highest_of_each_phase() -> None:
    phases = Phases(CPU)
    with phases.watched(memory=True):
        with phases("large"):
            kept = torch.empty(2 * MIB, dtype=torch.uint8)
            torch.empty(8 * MIB, dtype=torch.uint8)
        with phases("small"):
            torch.empty(1 * MIB, dtype=torch.uint8)
    assert phases.peaks["large"] / MIB == pytest.approx(10, abs=0.1)
    assert phases.peaks["small"] / MIB == pytest.approx(3, abs=0.1)
    assert len(kept)


def test_a_watched_method_is_a_phase_where_it_is_asked_to_be(clock: FakeTime) -> None:
    class Owner:
        def work(self, x: int) -> int:
            clock.sleep(2)
            return x + 1

    phases, owner = Phases(CPU), Owner()
    phases.watch(owner, "work", "work", inside="outer")
    with phases.watched(memory=False):
        assert owner.work(1) == 2
        with phases("outer"):
            assert owner.work(2) == 3
    assert phases.seconds["work"] == 2


# --- the reference's way ---


def test_its_frames_are_ours(inputs: WholeInputs) -> None:
    """decord's RGB, resized in 8 bits, against our planes: a level or two apart; shuffled by the same permutation."""
    runner = ReferenceStep(inputs, Phases(CPU))
    prompt, shuffled = runner.prompt_of(inputs.samples[0], draw=5)
    assert prompt.media is not None
    assert shuffled is not None
    ours = load_media(inputs.samples[0], inputs.config.video)
    assert ours is not None
    assert ours.grid_thw == prompt.media.grid_thw == GRID
    assert ours.second_per_grid == pytest.approx(prompt.media.second_per_grid)
    theirs = as_8_bit(prompt.media).patches
    assert (theirs.float() - ours.patches.float()).abs().mean() < 1.5
    order = draw_permutation(prompt, "frame", inputs.config.seed)
    assert order is not None
    assert order != tuple(range(4))
    assert torch.equal(as_8_bit(shuffled).patches, permute_frames(theirs, ours.grid_thw, order))


def test_frames_without_decord_are_the_same(inputs: WholeInputs) -> None:
    from benchmarks import reference_step

    path = str(inputs.samples[0].path)
    frames, fps = reference_step._decoded_by_pyav(path, 4, 2.0)
    others, other_fps = reference_step._decoded(path, 4, 2.0)
    assert fps == pytest.approx(other_fps)
    assert frames.shape == others.shape
    assert (frames.float() - others.float()).abs().mean() < 2


def test_it_runs_the_tower_once_a_row_and_we_once_a_pass(inputs: WholeInputs) -> None:
    """With 2 + 1 answers to each of 2 prompts: 2 + 1 (generate), 2 (policy), 2 (reference), against 2 + 1 + 1."""

    def passes(runner: Any) -> float:
        patches = []
        towers = {id(hf.model.visual): hf.model.visual for hf in everything(runner)}
        hooks = [t.register_forward_hook(lambda _m, args, _o: patches.append(len(args[0]))) for t in towers.values()]
        try:
            runner()
        finally:
            runner.close()
            for hook in hooks:
                hook.remove()
        return sum(patches) / (SMALL.prompts * math.prod(GRID))

    def everything(runner: Any) -> list[Any]:
        if isinstance(runner, ReferenceStep):
            return [runner.rows.hf, runner.reference.hf]
        return [runner.model.hf, runner.frozen.hf]

    assert passes(ReferenceStep(inputs, Phases(CPU))) == 7
    config = dataclasses.replace(inputs.config, output_dir=str(inputs.folder / "tower"))
    assert passes(OurStep(dataclasses.replace(inputs, config=config), Phases(CPU))) == 4


@pytest.mark.parametrize(
    "setting",
    [
        SMALL,
        dataclasses.replace(SMALL, lora=2),
        dataclasses.replace(SMALL, bf16=True),
        dataclasses.replace(SMALL, checkpointing=True),
    ],
)
def test_both_ways_pass_the_gate(setting: Setting) -> None:
    rows = measured(setting)
    assert {name: (row["status"], row["reason"]) for name, row in rows.items()} == dict.fromkeys(
        (OUR_STEP, REFERENCE_STEP), ("measured", None)
    )
    assert set(rows[REFERENCE_STEP]["errors"]) == {"advantages", "logp", "loss"}
    assert rows[OUR_STEP]["backend"] is not None
    for row in rows.values():
        phases = row["phases"]
        assert set(phases) == set(PHASES)
        assert sum(phase.get("seconds", 0) for phase in phases.values()) == pytest.approx(row["seconds"])
        assert all(phases[name]["seconds"] > 0 for name in PHASES)
        assert row["peak_mib"] == max(phase["peak_mib"] for phase in phases.values()) > 1
        assert row["prompts_per_hour"] == pytest.approx(3600 * 2 / row["seconds"])
        assert row["cpu_seconds"] > 0
    # Weights, the reference model and two moments of AdamW; with LoRA the weights and the adapters' alone.
    model = rows[OUR_STEP]["held_mib"]
    assert model == rows[REFERENCE_STEP]["held_mib"] > 0
    whole = sum(p.numel() for p in made_model(setting).hf.parameters()) * 4 / MIB
    assert model == pytest.approx(whole, rel=0.1) if setting.lora and not setting.bf16 else model > 3.4 * whole


def made_model(setting: Setting):
    with whole_inputs(setting, CPU) as made:
        return made.make_model()


@pytest.mark.parametrize(
    ("method", "wrong", "reason"),
    [
        ("_advantages", lambda self, *a, **k: 0.01 + right_advantages(self, *a, **k), "advantages: error"),
        ("_loss", lambda self, *a: 0.01 + right_loss(self, *a), "loss: error"),
    ],
)
def test_a_wrong_reference_is_not_measured(method: str, wrong: Any, reason: str, monkeypatch) -> None:
    monkeypatch.setattr(ReferenceStep, method, wrong)
    row = measured(SMALL)[REFERENCE_STEP]
    assert row["status"] == "failed"
    assert reason in row["reason"]
    assert row["seconds"] is None


right_advantages, right_loss = ReferenceStep._advantages, ReferenceStep._loss


def test_too_few_tokens_of_ours_are_not_measured(monkeypatch) -> None:
    monkeypatch.setattr(OurStep, "lengths", lambda self: [4, 3])
    row = measured(SMALL)[OUR_STEP]
    assert (row["status"], row["seconds"]) == ("failed", None)
    assert "expected 6 of 4 tokens, got 2, of 3 to 4" in row["reason"]


def test_trl_on_images() -> None:
    pytest.importorskip("trl", reason="TRL is what is measured")
    rows = measured(dataclasses.replace(SMALL, media="image"))
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(
        (OUR_STEP, REFERENCE_STEP, bench_step.TRL), "measured"
    )
    assert rows[bench_step.TRL]["held_mib"] == rows[OUR_STEP]["held_mib"]


def test_trl_trains_the_model_that_it_is_given() -> None:
    pytest.importorskip("trl", reason="TRL is what is measured")
    with whole_inputs(dataclasses.replace(SMALL, media="image", lora=2), CPU) as inputs:
        runner = TRLStep(inputs, Phases(CPU))
        before = {name: p.detach().clone() for name, p in runner.model.trainable().items()}
        runner()
        assert runner.lengths() == [4] * 4
        assert any(not torch.equal(p, before[name]) for name, p in runner.model.trainable().items())
        assert not any(p.requires_grad for name, p in runner.model.hf.named_parameters() if "lora" not in name)


# --- floors ---


def test_the_floor_is_of_operations_and_bytes(inputs: WholeInputs) -> None:
    runner = ReferenceStep(inputs, Phases(CPU))
    prompt, _ = runner.prompt_of(inputs.samples[0])

    def floors(**changes: float) -> dict[str, float]:
        return step_floor.floor_seconds(runner.model, prompt, SMALL, dataclasses.replace(CEILINGS, **changes))

    base, quick = floors(), floors(gemm_tflops=4.0)
    assert set(base) == {"prefill", "rollout", "policy", "reference", "optimizer"}
    assert all(quick[name] == pytest.approx(base[name] / 2) for name in base if name != "optimizer")
    assert quick["optimizer"] == base["optimizer"] == pytest.approx(2 * floors(copy_gbps=200.0)["optimizer"])
    weights = sum(p.numel() for p in runner.model.hf.parameters()) * 4
    assert base["optimizer"] == pytest.approx(7 * weights / 100e9)
    assert 2.5 < base["policy"] / base["reference"] <= 3
    # 2 prompts of 2 + 1 answers, 3 tokens behind the first: at least their products with the layers' weights.
    text = runner.model.hf.model.language_model.layers
    products = 2 * sum(p.numel() for p in text.parameters() if p.ndim == 2) * 2 * 3 * 3
    assert base["rollout"] > products / 2e12


# --- the command, the table, the pictures ---


def test_the_command_records_a_table_and_a_picture(tmp_path: Path, capsys) -> None:
    sizes = ["--frames", "4", "--prompts", "1", "--generations", "2", "--completion", "3", "--rounds", "1"]
    assert step.main([*sizes, "--record", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    data = json.loads((tmp_path / "cpu-step.json").read_text())
    assert (data["part"], len(data["rows"])) == ("step", 2)
    ours, other = data["rows"]
    assert ours["size"] == {
        "model": "tiny",
        "prompts": 1,
        "frames": 4,
        "G": "2 + 1",
        "C": 3,
        "trained": "everything",
        "dtype": "float32",
    }
    lines = out.strip().splitlines()
    assert lines[-2].startswith(f"| {OUR_STEP} (")
    assert f"| {other['seconds'] / ours['seconds']:.2f} |" in lines[-1]
    assert "at least" in lines[-2]
    assert "at least" not in lines[-1]
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "results.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    page.parent.mkdir()
    arguments = ["--write", "--results", str(tmp_path), "--readme", str(readme), "--page", str(page)]
    assert report.main(arguments) == 0
    assert (page.parent / "cpu-step.png").stat().st_size > 5000
    assert "(cpu-step.png)" in page.read_text()
    assert lines[-2] in page.read_text()
    (row,) = [line for line in readme.read_text().splitlines() if line.startswith("| the demonstration's model")]
    assert f"1 prompt with videos of 4 frames, 2 + 1 answers of 3 tokens | {data['card']} | " in row
    ratios = [f"{other[field] / ours[field]:.1f}" for field in ("seconds", "peak_mib")]
    rates = [f"{entry['prompts_per_hour']:,.0f}" for entry in (ours, other)]
    assert row.endswith(f" | {' | '.join([*rates, '', *ratios])} |")
    assert readme.read_text().endswith(f"{report.NOT_ON_A_GPU}\n{report.END}\n")


def test_an_exponent_is_the_slope_of_the_logarithms() -> None:
    assert growth_curves.exponent({n: 3.0 * n**1.5 for n in (2, 4, 8, 16)}) == pytest.approx(1.5)
    assert growth_curves.exponent(dict.fromkeys((1, 5), 7.0)) == pytest.approx(0.0)
    assert growth_curves.exponent({4: 1.0}) != growth_curves.exponent({4: 1.0})  # NaN


def test_growth_has_a_table_and_a_picture(tmp_path: Path, capsys) -> None:
    sizes = ["--frames", "4", "--completion", "3", "--generations", "2", "--rounds", "1"]
    arguments = [*sizes, "--axis", "prompts", "--most", "2", "--plot", str(tmp_path / "growth.png")]
    assert growth.main([*arguments, "--record", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "cpu-growth.json").read_text())
    found = growth_curves.curves(data["rows"])
    assert {axis: {way: list(points) for way, points in ways.items()} for axis, ways in found.items()} == {
        "prompts": {OUR_STEP: [1, 2], REFERENCE_STEP: [1, 2]}
    }
    lines = capsys.readouterr().out.strip().splitlines()
    exponents = [f"{growth_curves.exponent(found['prompts'][way]):.2f}" for way in (OUR_STEP, REFERENCE_STEP)]
    assert lines[-1] == f"| prompts: exponent |  | {exponents[0]} | {exponents[1]} |  |"
    assert (tmp_path / "growth.png").stat().st_size > 5000
    # Without options all of it is asked for.
    assert {axis: (sizes[0], sizes[-1]) for axis, sizes in bench_growth.AXES.items()} == {
        "frames": (8, 64),
        "completion": (256, 4096),
        "generations": (4, 32),
        "prompts": (1, 32),
    }


def test_growth_says_what_it_left_out(capsys) -> None:
    assert growth.main(["--axis", "prompts", "--most", "1", "--seconds", "0"]) == 0
    assert "Not measured: prompts" in capsys.readouterr().out
