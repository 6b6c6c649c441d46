"""The step benchmark: its FLOPs against torch's counter, its gate, its turns, its command and its table."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import CPU, cpu_options, made_up_case
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLForConditionalGeneration

from benchmarks import bench_training, report, run, step, step_flops
from benchmarks.cases import OURS, Case, Contender, Work
from benchmarks.measure import Clock, GateFailure, measure_in_turns
from benchmarks.record import load
from benchmarks.repeated_rows import RepeatedRows
from benchmarks.step_inputs import SHAPES, Group, StepInputs, model_config, step_inputs
from videor1.demo.tokenizer import make_tokenizer
from videor1.training.passes import predicting_states

TOY = SHAPES["toy"]
GROUP = Group(40, 3, 12, text=24, temporal=2)


@pytest.fixture(scope="module")
def inputs() -> StepInputs:
    return step_inputs(TOY, GROUP, False, CPU)


def counted(call: Any) -> dict[str, float]:
    """FLOPs by torch's counter: of linear layers, of the patch embedding, and of attention, over whole rows."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's own is not counted
        call()
    kinds = {"mm": "linear", "addmm": "linear", "bmm": "attention", "convolution": "patches"}
    kinds["convolution_backward"] = "patches"
    by_kind: dict[str, float] = dict.fromkeys(kinds.values(), 0)
    for operation, flops in counter.get_flop_counts()["Global"].items():
        by_kind[kinds[str(operation).removeprefix("aten.")]] += flops
    return by_kind


@pytest.mark.parametrize(("head", "tower"), [("all", "row"), ("completions", "prompt")])
def test_flops_of_repeated_rows_are_what_torch_counts(inputs: StepInputs, head: Any, tower: Any) -> None:
    rows = RepeatedRows(inputs.model, head=head, tower=tower)
    length = GROUP.prompt + GROUP.completion
    tokens = GROUP.generations * length
    flops = step_flops.forward(
        inputs.model.hf.config,
        tokens=tokens,
        pairs=GROUP.generations * length**2,  # torch counts masked ones too
        head_positions=tokens if head == "all" else GROUP.generations * GROUP.completion,
        grids=[GROUP.grid] * (GROUP.generations if tower == "row" else 1),
    )
    forward = counted(lambda: rows.logp(inputs.packed))
    assert forward["linear"] == flops.linear + flops.head + flops.tower
    assert forward["attention"] == flops.attention + flops.tower_attention
    assert forward["patches"] == flops.patches
    both = counted(lambda: rows.logp(inputs.packed).sum().backward())
    assert both["linear"] == 3 * forward["linear"]
    assert both["attention"] == 3 * forward["attention"]
    assert both["patches"] == 2 * forward["patches"]
    assert flops.training(checkpointing=False) == sum(both.values())
    again = flops.linear + flops.tower + flops.attention + flops.tower_attention
    assert flops.training(checkpointing=True) == sum(both.values()) + again


def test_flops_of_the_packed_row_are_what_torch_counts(inputs: StepInputs) -> None:
    work = bench_training.training(TOY, GROUP).work(inputs)
    assert work.tokens == GROUP.prompt + GROUP.generations * GROUP.completion
    flops = step_flops.forward(
        inputs.model.hf.config, tokens=work.tokens, pairs=0, head_positions=0, grids=[GROUP.grid]
    )
    # Attention is of another form on every device: without it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("videor1_kernels.integrations.transformers.prefix_attention", lambda q, k, v, *_, **__: q)
        states = counted(lambda: predicting_states(inputs.model, inputs.packed))
    assert states["linear"] == flops.linear + flops.tower


def test_pairs_are_those_of_the_mask() -> None:
    prompt, completions = 5, [3, 1, 4]
    group = [0] * prompt + [i for i, n in enumerate(completions, 1) for _ in range(n)]
    seen = sum(group[key] in (0, group[query]) for query in range(len(group)) for key in range(query + 1))
    assert step_flops.shared_pairs(prompt, completions) == seen
    assert step_flops.shared_pairs(prompt, []) == step_flops.causal_pairs(prompt) == 15


@pytest.mark.parametrize(("shape", "parameters"), [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_shapes_have_the_public_models_parameters(shape: str, parameters: int) -> None:
    with torch.device("meta"):
        hf = Qwen2_5_VLForConditionalGeneration._from_config(model_config(SHAPES[shape], make_tokenizer()))
    assert sum(p.numel() for p in hf.parameters()) == parameters
    rope = hf.config.text_config.rope_parameters
    assert rope["mrope_section"] == [16, 24, 24]


def test_the_cpu_shape_divides_its_work_as_the_7b_does() -> None:
    """The vision tower and the head take about the same part of the forward pass; attention somewhat more."""
    group = Group(1224, 8, 768)
    shares = {}
    for name in ("cpu", "7b"):
        flops = step_flops.forward(
            model_config(SHAPES[name], make_tokenizer()),
            tokens=7368,
            head_positions=6144,
            grids=[group.grid],
            pairs=step_flops.shared_pairs(1224, [768] * 8),
        )
        total = flops.linear + flops.attention + flops.head + flops.tower + flops.tower_attention + flops.patches
        vision = flops.tower + flops.tower_attention + flops.patches
        shares[name] = [part / total for part in (vision, flops.head, flops.attention)]
    assert shares["7b"] == pytest.approx([0.05, 0.06, 0.04], abs=0.01)
    assert shares["cpu"] == pytest.approx([0.05, 0.06, 0.12], abs=0.01)


@pytest.mark.parametrize(
    ("prompt", "grid"), [(1224, (8, 16, 32)), (2248, (8, 32, 32)), (208, (8, 2, 2)), (296, (8, 4, 12))]
)
def test_a_prompt_is_text_and_a_video(prompt: int, grid: tuple[int, int, int]) -> None:
    assert Group(prompt, 8, 768).grid == grid


@pytest.mark.parametrize("prompt", [200, 1225, 100])
def test_a_prompt_without_a_whole_video_is_refused(prompt: int) -> None:
    with pytest.raises(ValueError, match=f"200 tokens of text and a multiple of 8 of video, got {prompt}"):
        Group(prompt, 8, 768).grid  # noqa: B018


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_way_passes_the_gate(checkpointing: bool) -> None:
    rows = measure_in_turns(bench_training.small_training(checkpointing=checkpointing), CPU, Clock(CPU), 2, warm_up=1)
    assert [row.status for row in rows] == ["measured"] * 4
    assert [row.tokens for row in rows] == [76, 156, 156, 156]
    assert [row.rounds for row in rows] == [2] * 4
    assert rows[0].backend == "reference"
    assert set(rows[0].errors) == {"loss", "logp", "d_tower", "d_embedding", "d_layers", "d_head"}
    assert all(0 < error < 1e-5 for name, error in rows[0].errors.items() if name != "loss")
    assert rows[1].errors == dict.fromkeys(rows[0].errors, 0.0)  # what the others are compared with
    assert all(row.peak_mib > rows[0].peak_mib for row in rows[1:])
    assert all(row.flops > 1.5 * rows[0].flops for row in rows[1:])


def test_bf16_passes_the_gate_with_room() -> None:
    case = bench_training.training(dataclasses.replace(TOY, dtype=torch.bfloat16), GROUP, checkpointing=True)
    rows = measure_in_turns(case, CPU, Clock(CPU), 1)
    assert [row.status for row in rows] == ["measured"] * 4
    assert 1e-4 < max(rows[0].errors.values()) < 0.6 * bench_training.BOUNDS[torch.bfloat16][1]


def test_every_parameter_is_in_the_gate(inputs: StepInputs) -> None:
    step_ = bench_training._shared(inputs)
    right = {name: value.clone() for name, value in step_().items()}
    for name, parameter in inputs.model.hf.named_parameters():
        handle = parameter.register_hook(lambda gradient: gradient * 1.5)
        wrong = step_()
        handle.remove()
        assert any(not torch.equal(wrong[key], right[key]) for key in right if key.startswith("d_")), name


def case_of(*contenders: Contender, log: list[str] | None = None) -> Case:
    return made_up_case(contenders, Work(1e6, 0.0, "", 7), log)


def giving(name: str, value: float) -> Contender:
    def build(log: list[str] | None) -> Any:
        def call() -> dict[str, torch.Tensor]:
            if log is not None:
                log.append(name)
            return {"out": torch.full((4,), value)}

        return call

    return Contender(name, build)


def failing(name: str, error: Exception, after: int = 0) -> Contender:
    def build(_: Any) -> Any:
        calls = itertools.count()

        def call() -> dict[str, torch.Tensor]:
            if next(calls) >= after:
                raise error
            return {"out": torch.ones(4)}

        return call

    return Contender(name, build)


def test_contenders_take_turns_and_warm_up_is_not_counted() -> None:
    log: list[str] = []
    case = case_of(giving("ours", 1.0), giving("naive", 1.0), giving("other", 1.0), log=log)
    rows = measure_in_turns(case, CPU, Clock(CPU), 2, warm_up=1)
    assert log == ["naive", "ours", "other"] * 3
    assert [row.implementation for row in rows] == ["ours", "naive", "other"]
    assert [row.rounds for row in rows] == [2, 2, 2]
    assert [row.tokens for row in rows] == [7, 7, 7]


def test_a_wrong_result_has_no_time_and_is_not_called_again() -> None:
    log: list[str] = []
    case = case_of(giving("naive", 1.0), giving(OURS, 1.001), giving("other", float("nan")), log=log)
    naive, ours, other = measure_in_turns(case, CPU, Clock(CPU), 3)
    assert naive.status == "measured"
    assert (ours.status, other.status) == ("failed", "failed")
    assert ours.seconds is ours.peak_mib is ours.percent is None
    assert "rms error 1.00e-03" in (ours.reason or "")
    assert "NaN" in (other.reason or "")
    assert log == ["naive", OURS, "other", "naive", "naive"]


def test_a_late_failure_takes_the_time_back() -> None:
    case = case_of(giving("naive", 1.0), failing("other", torch.OutOfMemoryError("no"), after=1))
    naive, other = measure_in_turns(case, CPU, Clock(CPU), 2)
    assert naive.status == "measured"
    assert (other.status, other.seconds, other.peak_mib) == ("not run", None, None)
    assert other.reason == "does not fit in the device's memory"


def test_nothing_is_measured_without_what_to_compare_with() -> None:
    case = case_of(failing("naive", GateFailure("broken")), giving(OURS, 1.0))
    naive, ours = measure_in_turns(case, CPU, Clock(CPU), 1)
    assert (naive.status, ours.status) == ("failed", "failed")
    assert ours.reason == "naive gave no results to compare with"


def test_the_command_measures_records_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--shape", "toy", "--prompt", "208", "--completion", "5", "--generations", "2", "--device", "cpu"]
    options = ["--part", "training", *sizes]
    assert step.main([*options, "--checkpointing", "on", "--rounds", "2", "--record", str(tmp_path)]) == 0
    data = load(tmp_path / "cpu-training.json")
    assert (data["part"], data["complete"]) == ("training", True)
    assert [row["tokens"] for row in data["rows"]] == [218, 426, 426, 426]
    assert {row["rounds"] for row in data["rows"]} == {2}
    printed = capsys.readouterr().out
    assert "gradient checkpointing on: model toy (128 x 2), P 208, G 2, C 5, dtype float32" in printed
    assert report.table(data) in printed
    assert report.table(data) in report.report(tmp_path)


def test_the_table_has_ratios_to_ours(tmp_path: Path) -> None:
    sizes = ["--shape", "toy", "--prompt", "208", "--completion", "2", "--generations", "2"]
    step.main(["--part", "training", *sizes, "--device", "cpu", "--record", str(tmp_path)])
    data = json.loads((tmp_path / "cpu-training.json").read_text())
    for row, seconds, peak in zip(data["rows"], (2.0, 4.6, 5.0, None), (100.0, 250.0, 1000.0, None), strict=True):
        assert 0 < row["cpu_seconds"] < 60
        row["seconds"], row["peak_mib"], row["cpu_seconds"] = seconds, peak, seconds and 2 * seconds
    data["rows"][3] |= {"status": "not run", "reason": "does not fit in the device's memory"}
    ours, baseline, reference, absent = report.table(data).splitlines()[-4:]
    assert ours.startswith(f"| {bench_training.SHARED} (reference) | 212 |")
    assert " | 2 (3) | 1.00 | 4 | 1.00 | 100 | 1.00 | " in ours
    assert " | 4.6 (3) | 2.30 | 9.2 | 2.30 | 250 | 2.50 | " in baseline
    assert " | 5 (3) | 2.50 | 10 | 2.50 | 1000 | 10.00 | " in reference
    assert absent.startswith("| repeated rows, both trimmed | not run: does not fit in the device's memory |")
    data["rows"][0] |= {"seconds": None, "peak_mib": None, "cpu_seconds": None, "status": "failed", "reason": "wrong"}
    assert " | 4.6 (3) |  | 9.2 |  | 250 |  | " in report.table(data)


def test_cases_of_a_part_are_left_out_when_the_time_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench_training.small_training()
    record = run.run_cases("training", [case], cpu_options("--seconds", "0"))
    assert [row.reason for row in record.rows] == ["left out after 0 s of this run"] * 4
    record = run.run_cases("training", [case], cpu_options("--rounds", "1"))
    assert [row.status for row in record.rows] == ["measured"] * 4
    assert record.to_json()["complete"]
