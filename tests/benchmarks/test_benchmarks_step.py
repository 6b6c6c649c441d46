"""Training passes and whole steps in their smallest size: gates, commands, and what is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from made_up import CEILINGS, CPU
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLForConditionalGeneration

from benchmarks import bench_step, bench_training, growth, growth_curves, report, run, step, step_floor, step_flops
from benchmarks.cases import OUR_STEP, REFERENCE_STEP, blank_row
from benchmarks.measure import MIB, Clock
from benchmarks.our_step import OurStep
from benchmarks.phases import PHASES, Phases
from benchmarks.record import load
from benchmarks.reference_step import ReferenceStep, as_8_bit
from benchmarks.repeated_rows import RepeatedRows
from benchmarks.rollout_inputs import weight_bytes
from benchmarks.step_inputs import SHAPES, Group, StepInputs, model_config, step_inputs
from benchmarks.whole_inputs import Setting, whole_inputs
from benchmarks.whole_step import StepCase, StepMeasurement
from videor1.demo.tokenizer import make_tokenizer
from videor1.model import VideoLM, cpu_linear
from videor1.training.passes import predicting_states
from videor1.video.media import load_media
from videor1.video.patches import permute_frames
from videor1.video.shuffle import draw_permutation
from videor1_kernels import chosen_backend

TOY = SHAPES["toy"]
GROUP = Group(40, 3, 12, text=24, temporal=2)
SMALL = Setting(frames=4, prompts=1, generations=2, completion=4)
WAYS = (OUR_STEP, REFERENCE_STEP)
TAKEN = dict.fromkeys(["seconds", "cpu_seconds", "spread", "percent", "peak_mib", "held_mib", "prompts_per_hour"], 1.0)
TAKEN |= {"phases": {name: {"seconds": 0.2, "peak_mib": 2.0, "floor_seconds": 0.1} for name in PHASES}}


@pytest.fixture(scope="module")
def inputs() -> StepInputs:
    return step_inputs(TOY, GROUP, False, CPU)


def measured(setting: Setting = SMALL) -> dict[str, dict[str, Any]]:
    return {row.implementation: row.to_json() for row in run.in_turns(bench_step.step(setting), CPU, Clock(CPU), 1)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_way_of_training_passes_the_gate(checkpointing: bool) -> None:
    rows = run.in_turns(bench_training.small_training(checkpointing=checkpointing), CPU, Clock(CPU), 1)
    assert [(row.status, row.tokens) for row in rows] == [("measured", tokens) for tokens in (76, 156, 156, 156)]
    assert rows[0].backend == " + ".join(sorted({chosen_backend("prefix_attention"), "reference"}))
    assert set(rows[0].errors) == {"loss", "logp", "d_tower", "d_embedding", "d_layers", "d_head"}
    assert all(0 < error < 1e-5 for name, error in rows[0].errors.items() if name != "loss")
    assert rows[1].errors == dict.fromkeys(rows[0].errors, 0.0)  # what the others are compared with
    assert all(row.peak_mib > rows[0].peak_mib and row.flops > 1.5 * rows[0].flops for row in rows[1:])


def test_every_parameter_is_in_the_gate(inputs: StepInputs) -> None:
    call = bench_training.small_training().contenders[0].build(inputs)
    right = {name: value.clone() for name, value in call().items()}
    for name, parameter in inputs.model.hf.named_parameters():
        handle = parameter.register_hook(lambda gradient: gradient * 1.5)
        wrong = call()
        handle.remove()
        assert any(not torch.equal(wrong[key], right[key]) for key in right if key.startswith("d_")), name


def test_the_references_frames_are_ours() -> None:
    """decord's RGB, resized in 8 bits, against our planes: a level or two apart; shuffled by the same permutation."""
    with whole_inputs(SMALL, CPU) as inputs:
        prompt, shuffled = ReferenceStep(inputs, Phases(CPU)).prompt_of(inputs.samples[0], draw=5)
        ours = load_media(inputs.samples[0], inputs.config.video)
    assert ours.grid_thw == prompt.media.grid_thw == (2, 6, 10)
    assert ours.second_per_grid == pytest.approx(prompt.media.second_per_grid)
    theirs = as_8_bit(prompt.media).patches
    assert (theirs.float() - ours.patches.float()).abs().mean() < 1.5
    order = draw_permutation(prompt, "frame", inputs.config.seed)
    assert order not in (None, tuple(range(4)))
    assert torch.equal(as_8_bit(shuffled).patches, permute_frames(theirs, ours.grid_thw, order))


LORA = {"lora": 2, "checkpointing": True}


@pytest.mark.parametrize("changes", [{"prompts": 2}, LORA, {"bf16": True}, {"media": "image"}], ids=str)
def test_every_way_passes_the_gate(changes: dict[str, Any]) -> None:
    setting = dataclasses.replace(SMALL, **changes)
    if on_images := setting.media == "image":
        pytest.importorskip("trl", reason="TRL is what is measured")
    rows = measured(setting)
    outcomes = {name: (row["status"], row["reason"]) for name, row in rows.items()}
    assert outcomes == dict.fromkeys((*WAYS, *[bench_step.TRL] * on_images), ("measured", None))
    assert set(rows[REFERENCE_STEP]["errors"]) == {"advantages", "logp", "loss"}
    assert rows[OUR_STEP]["backend"] is not None
    with whole_inputs(setting, CPU) as made:
        whole = sum(p.numel() for p in made.make_model().hf.parameters()) * 4 / MIB
    for row in rows.values():
        phases = row["phases"]
        if not on_images:
            assert set(phases) == set(PHASES)
            assert all(phase["seconds"] > 0 for phase in phases.values())
        assert sum(phase.get("seconds", 0) for phase in phases.values()) == pytest.approx(row["seconds"])
        assert row["peak_mib"] == max(phase.get("peak_mib", 0) for phase in phases.values()) > 1
        assert row["prompts_per_hour"] == pytest.approx(3600 * setting.prompts / row["seconds"])
        assert row["cpu_seconds"] > 0
        # Weights, the reference model and two moments of AdamW; with LoRA the weights and the adapters' alone.
        assert row["held_mib"] == pytest.approx(whole, rel=0.1) if setting.lora else row["held_mib"] > 3.4 * whole
    # Ours holds the adapters a second time, as rows beside the weights that they add to.
    held = {name: row["held_mib"] for name, row in rows.items()}
    assert held[OUR_STEP] == pytest.approx(held[REFERENCE_STEP], rel=0.02 if setting.lora else 0)
    assert len({value for name, value in held.items() if name != OUR_STEP}) == 1


class WrongLengths(OurStep):
    def lengths(self) -> list[int]:
        return [4, 3]


class WrongAdvantages(ReferenceStep):
    def _advantages(self, *args: Any, **options: Any) -> Any:
        return 0.01 + super()._advantages(*args, **options)


class WrongLoss(ReferenceStep):
    def _loss(self, *args: Any) -> Any:
        return 0.01 + super()._loss(*args)


@pytest.mark.parametrize(("wrong", "reason"), [(WrongAdvantages, "advantages: error"), (WrongLoss, "loss: error")])
def test_a_wrong_step_is_not_measured(wrong: type[ReferenceStep], reason: str) -> None:
    case = bench_step.step(SMALL)
    ways = [dataclasses.replace(c, build=b) for c, b in zip(case.contenders, (WrongLengths, wrong), strict=True)]
    ours, reference = run.in_turns(dataclasses.replace(case, contenders=ways), CPU, Clock(CPU), 1)
    assert (ours.status, reference.status) == ("failed", "failed")
    assert ours.seconds is reference.seconds is None
    assert reason in (reference.reason or "")
    assert "expected 3 of 4 tokens, got 2, of 3 to 4" in (ours.reason or "")


def test_the_commands_record_tables_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure_steps(case: StepCase, *_: object) -> list[StepMeasurement]:
        rows = [StepMeasurement(**blank_row(case, way, "measured").to_json()) for way in case.contenders]
        return [dataclasses.replace(row, **TAKEN) for row in rows]

    monkeypatch.setattr(bench_step, "measure_steps", measure_steps)
    training = "--part training --shape toy --prompt 208 --completion 2 --generations 2 --checkpointing on --rounds 1"
    sizes = ["--frames", "4", "--completion", "3", "--generations", "2", "--rounds", "1"]
    grown = [*sizes, "--axis", "prompts", "--most", "2", "--plot", str(tmp_path / "growth.png")]
    size = {"model": "tiny", "prompts": 1, "frames": 4, "G": "2 + 1", "C": 3, "trained": "everything"}
    for part, main, options in (
        ("training", step.main, training.split()),
        ("step", step.main, [*sizes, "--prompts", "1"]),
        ("growth", growth.main, grown),
    ):
        assert main([*options, "--device", "cpu", "--record", str(tmp_path)]) == 0
        data = load(tmp_path / f"cpu-{part}.json")
        assert (data["part"], {row["status"] for row in data["rows"]}) == (part, {"measured"})
        assert report.table(data) in capsys.readouterr().out
        assert part != "step" or data["rows"][0]["size"] == size | {"dtype": "float32"}
    curves = growth_curves.curves(data["rows"])
    assert [(way, [*points]) for way, points in curves["prompts"].items()] == [(way, [1, 2]) for way in WAYS]
    pictures = [tmp_path / "growth.png", *report.draw_all(tmp_path, tmp_path / "pictures")]
    assert [path.stem for path in pictures] == ["growth", "cpu-step", "cpu-growth"]
    assert all(path.stat().st_size > 5000 for path in pictures)
    assert growth.main(["--axis", "prompts", "--most", "1", "--seconds", "0"]) == 0
    assert "Not measured: prompts" in capsys.readouterr().out


def counted(call: Callable[[], Any]) -> dict[str, float]:
    """FLOPs by torch's counter: of linear layers, the patch embedding among them, and of attention, over whole rows."""
    # Neither the CPU's own attention nor oneDNN's products are counted.
    plain = sdpa_kernel(SDPBackend.MATH), mock.patch.object(cpu_linear, "onednn", return_value=False)
    with FlopCounterMode(display=False) as counter, plain[0], plain[1]:
        call()
    kinds = {"mm": "linear", "addmm": "linear", "bmm": "attention"}
    by_kind: dict[str, float] = dict.fromkeys(kinds.values(), 0)
    for operation, flops in counter.get_flop_counts()["Global"].items():
        by_kind[kinds[str(operation).removeprefix("aten.")]] += flops
    return by_kind


@pytest.mark.parametrize(("head", "tower"), [("all", "row"), ("completions", "prompt")])
def test_flops_of_repeated_rows_are_what_torch_counts(inputs: StepInputs, head: Any, tower: Any) -> None:
    rows, length = RepeatedRows(inputs.model, head=head, tower=tower), GROUP.prompt + GROUP.completion
    flops = step_flops.forward(
        inputs.model.hf.config,
        tokens=GROUP.generations * length,
        pairs=GROUP.generations * length**2,  # torch counts masked ones too
        head_positions=GROUP.generations * (length if head == "all" else GROUP.completion),
        grids=[GROUP.grid] * (GROUP.generations if tower == "row" else 1),
    )
    forward = counted(lambda: rows.logp(inputs.packed))
    attention = flops.attention + flops.tower_attention
    linear = flops.linear + flops.head + flops.tower
    assert forward == {"linear": linear + flops.patches, "attention": attention}
    both = counted(lambda: rows.logp(inputs.packed).sum().backward())
    assert both == {"linear": 3 * linear + 2 * flops.patches, "attention": 3 * attention}
    assert flops.training(checkpointing=False) == sum(both.values())
    again = flops.linear + flops.tower + attention
    assert flops.training(checkpointing=True) == sum(both.values()) + again


def test_flops_of_the_packed_row_are_what_torch_counts(inputs: StepInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    work = bench_training.training(TOY, GROUP).work(inputs)
    assert work.tokens == GROUP.prompt + GROUP.generations * GROUP.completion
    sizes = {"tokens": work.tokens, "pairs": 0, "head_positions": 0, "grids": [GROUP.grid]}
    flops = step_flops.forward(inputs.model.hf.config, **sizes)
    # Attention is of another form on every device: without it.
    monkeypatch.setattr("videor1_kernels.integrations.transformers.prefix_attention", lambda q, k, v, *_, **__: q)
    linear = flops.linear + flops.tower + flops.patches
    assert counted(lambda: predicting_states(inputs.model, inputs.packed))["linear"] == linear


def test_pairs_are_those_of_the_mask() -> None:
    prompt, completions = 5, [3, 1, 4]
    group = [0] * prompt + [i for i, n in enumerate(completions, 1) for _ in range(n)]
    seen = sum(group[key] in (0, group[query]) for query in range(len(group)) for key in range(query + 1))
    assert step_flops.shared_pairs(prompt, completions) == seen
    assert step_flops.shared_pairs(prompt, []) == step_flops.causal_pairs(prompt) == 15


@pytest.mark.parametrize(
    ("shape", "parameters", "read"),
    [("3b", 3_754_622_976, 3.086e9), ("7b", 8_292_166_656, 7.616e9 - 152064 * 3584)],  # the 7B's embedding is not read
)
def test_shapes_have_the_public_models_parameters(shape: str, parameters: int, read: float) -> None:
    with torch.device("meta"):
        tokenizer = make_tokenizer()
        hf = Qwen2_5_VLForConditionalGeneration._from_config(
            model_config(SHAPES[shape], tokenizer), dtype=torch.bfloat16
        )
        model = VideoLM(hf, tokenizer, device="meta")
    assert sum(p.numel() for p in hf.parameters()) == parameters
    assert hf.config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    assert weight_bytes(model) == pytest.approx(2 * read, rel=1e-3)


def test_the_floor_of_a_step_is_of_operations_and_bytes() -> None:
    with whole_inputs(Setting(frames=4, prompts=2, generations=2, completion=4), CPU) as made:
        runner = ReferenceStep(made, Phases(CPU))
        prompt, _ = runner.prompt_of(made.samples[0])

    def floors(**changes: float) -> dict[str, float]:
        ceilings = dataclasses.replace(CEILINGS, **changes)
        return step_floor.floor_seconds(runner.model, prompt, made.setting, ceilings)

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
