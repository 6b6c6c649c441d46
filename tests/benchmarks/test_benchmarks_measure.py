"""How implementations are measured and recorded: a wrong result has no speed, the clock and the memory are those of the
call, and a record and its table hold what a reader needs."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import CEILINGS, CPU, FakeTime, cpu_options, giving, made_up_case, row_of

from benchmarks import measure, oracle, peers, report, run, shapes
from benchmarks.cases import OURS, Contender, Measurement, Work
from benchmarks.measure import Clock, GateFailure, measure_in_turns, plain_stopwatch
from benchmarks.oracle import Expected
from benchmarks.phases import OTHER, Phases
from benchmarks.record import REQUIRED, Record, load
from benchmarks.rollout_turns import DECODE_SECONDS, DECODE_STEPS, RolloutCase, measure_rollout
from videor1_kernels import dispatch
from videor1_kernels.testing import PeakMemory

MIB = 2**20
ROOT = Path(__file__).parents[2]
ABSENT = {"implementation": "Other", "status": "not run", "reason": "it is not there", "seconds": None}
pytestmark = pytest.mark.usefixtures("unwatched")


def alone(contender: Contender) -> Measurement:
    return row_of(made_up_case(contender), contender)


def turns(*contenders: Contender, rounds: int, warm_up: int = 0) -> list[Measurement]:
    return measure_in_turns(made_up_case(*contenders), CPU, Clock(CPU), rounds, warm_up=warm_up)


def test_a_right_implementation_is_measured() -> None:
    row = alone(giving(OURS, 1.0))
    assert (row.status, row.count, row.tokens, row.timing, row.errors) == ("measured", "2NHV", 7, "wall", {"out": 0.0})
    assert row.rounds >= 7
    tflops = 2e6 / row.seconds / 1e12
    assert [row.tflops, row.percent, row.gbps] == pytest.approx([tflops, 100 * tflops / 2.0, 1e3 / row.seconds / 1e9])


WRONG = {
    "rms error 1.00e-02 .*bound 1e-06": 1.01,
    "1 values are NaN": {"out": torch.tensor([1.0, 1.0, 1.0, math.nan])},
    "expected among the outputs, got other": {"other": torch.ones(4)},
    "expected shape": {"out": torch.ones(4, 1)},
}


@pytest.mark.grid(reason=list(WRONG), name=[OURS, "torch, wrong"])
def test_a_wrong_one_has_no_speed(reason: str, name: str) -> None:
    row = alone(giving(name, WRONG[reason]))
    assert row.status == "failed"
    assert row.seconds is row.tflops is row.peak_mib is None
    assert re.search(reason, row.reason or "")


def test_what_others_may_lack_and_why_they_do_not_run() -> None:
    entropy = [Expected("entropy", "entropy", torch.ones(2), ours_only=True)]
    assert oracle.check({}, entropy, torch.float32, ours=False) == {}
    with pytest.raises(GateFailure):
        oracle.check({}, entropy, torch.float32, ours=True)
    rows = [alone(giving(name, RuntimeError("no such kernel\nand a traceback"))) for name in ("another", OURS)]
    rows.append(alone(Contender("another", pytest.fail, peers.missing("torch", "torch", gpu=True))))
    reasons = ["RuntimeError: no such kernel"] * 2 + ["its kernels need a GPU"]
    assert [(row.status, row.reason) for row in rows] == [*zip(("not run", "failed", "not run"), reasons, strict=True)]


def test_the_reference_on_a_gpu_is_not_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(ran: str | None, on: str) -> str:
        monkeypatch.setitem(dispatch._last, "linear_logprob", ran)
        return measure.check_backend("linear_logprob", torch.device(on))

    assert [check("reference", "cpu"), check("triton", "cuda")] == ["reference", "triton"]
    for ran, on, reason in (("reference", "cuda", "the reference ran on cuda"), (None, "cpu", "none was made")):
        with pytest.raises(GateFailure, match=reason):
            check(ran, on)


def test_oracle_gradients_are_those_of_autograd() -> None:
    size = shapes.Size("tiny", 48, 16, 80, 6, torch.float32)
    inputs = shapes.head_inputs(size, CPU, zero_completions=3, beta=0.0)
    hidden, weight = (x.detach().double().requires_grad_() for x in (inputs.hidden, inputs.weight))
    scores = (hidden @ weight.T).log_softmax(-1).gather(1, inputs.labels[:, None])[:, 0]
    loss = oracle.grpo_of(scores, inputs)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    outputs = {"loss": loss, "logp": scores, "d_hidden": d_hidden, "d_weight": d_weight}
    assert max(oracle.check(outputs, oracle.grpo(inputs), size.dtype, ours=True).values()) < 1e-12
    with pytest.raises(GateFailure, match=r"d_weight: relative error 1\.00e-03"):
        oracle.check(outputs | {"d_weight": d_weight * 1.001}, oracle.grpo(inputs), size.dtype, ours=True)


def test_contenders_take_turns_and_warm_up_is_not_counted() -> None:
    log: list[str] = []
    rows = turns(*(giving(name, 1.0, log=log) for name in ("ours", "naive", "other")), rounds=2, warm_up=1)
    assert log == ["naive", "ours", "other"] * 3
    assert [(row.implementation, row.rounds) for row in rows] == [("ours", 2), ("naive", 2), ("other", 2)]


def test_a_wrong_result_has_no_time_and_is_not_called_again() -> None:
    log: list[str] = []
    results = {"naive": 1.0, OURS: 1.001, "other": math.nan}
    rows = turns(*(giving(name, result, log=log) for name, result in results.items()), rounds=3)
    assert [row.status for row in rows] == ["measured", "failed", "failed"]
    assert rows[1].seconds is rows[1].peak_mib is rows[1].percent is None
    assert ["rms error 1.00e-03" in rows[1].reason, "NaN" in rows[2].reason] == [True, True]
    assert log == ["naive", OURS, "other", "naive", "naive"]
    naive, ours = turns(giving("naive", GateFailure("broken")), giving(OURS, 1.0), rounds=1)
    assert (naive.status, ours.status, ours.reason) == ("failed", "failed", "naive gave no results to compare with")


def test_others_are_left_out_when_the_time_is_spent() -> None:
    beside = made_up_case(giving("naive", 1.0), giving(OURS, 1.0))
    one_by_one = dataclasses.replace(beside, against=None, contenders=(giving("torch", 1.0), giving("another", 1.0)))
    record = run.run_cases("kernels", [one_by_one, beside], cpu_options("--seconds", "0"))
    assert [row.status for row in record.rows] == ["measured", *["not run"] * 3]
    assert {row.reason for row in record.rows[1:]} == {"left out after 0 s of this run"}


def rollout_case(log: list[str], *last: Any, read: float = 0.0) -> Any:
    """Three ways whose calls decode 5 steps in half a second; the last gives something else."""
    right = {"out": torch.ones(()), DECODE_SECONDS: torch.tensor(0.5), DECODE_STEPS: torch.tensor(5)}
    ways = [giving(name, right, log=log) for name in ("ours", "naive")] + [giving("other", right, *last, log=log)]
    return made_up_case(*ways, work=Work(0.0, read, "", 7), kind=RolloutCase, turns=measure_rollout, rounds=2)


def test_calls_whose_memory_is_watched_are_not_timed() -> None:
    """They come first, that of what is compared with before all. The floor is reading the weights once a step: 5 steps
    in 0.5 s that read 2 GB each, where 100 GB/s were measured."""
    log: list[str] = []
    rows = run.in_turns(rollout_case(log, read=2e9), CPU, Clock(CPU))
    assert log == ["naive", "ours", "other", *["ours", "naive", "other"] * 2]
    assert [(row.implementation, row.rounds) for row in rows] == [("ours", 2), ("naive", 2), ("other", 2)]
    assert (rows[0].gbps, rows[0].percent) == pytest.approx((20, 20))


def test_a_late_failure_takes_the_time_back() -> None:
    late = torch.OutOfMemoryError("no")
    record = run.run_cases("rollout", [rollout_case([], late)], cpu_options())
    for first, *_, other in (record.rows, turns(giving("naive", 1.0), giving("other", 1.0, late), rounds=2)):
        assert first.status == "measured"
        assert (other.status, other.reason) == ("not run", "does not fit in the device's memory")
        assert other.seconds is other.peak_mib is other.cpu_seconds is None
    assert "| other | not run: does not fit in the device's memory |" in report.table(record.to_json())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    for module in ("phases", "measure"):
        monkeypatch.setattr(f"benchmarks.{module}.time", fake)
    return fake


def test_a_round_is_timed_without_what_comes_before_it(clock: FakeTime) -> None:
    read, before = Clock(CPU), []
    watch = plain_stopwatch(read)
    assert watch(lambda: clock.sleep(2), lambda: before.append(clock.sleep(5)), 3) == [2, 2, 2]
    assert len(before) == 3
    assert watch(lambda: read.count(4e-6), lambda: None, 2) == pytest.approx([4e-6] * 2)
    assert watch(lambda: clock.sleep(1), lambda: None, 1) == [1]  # counting ended with its round


def test_peak_memory_is_beyond_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PeakMemory", PeakMemory)

    def step() -> dict[str, torch.Tensor]:
        scratch = torch.zeros(MIB // 4)
        return {"out": torch.zeros(1 << 16).add_(scratch[0]), "same": scratch.new_zeros(1 << 16)}

    assert measure.peak_bytes(step, CPU) == pytest.approx(MIB, abs=1 << 12)


def test_an_inner_phase_is_taken_out_of_the_outer_one(clock: FakeTime) -> None:
    phases = Phases(CPU)
    phases.watch(clock, "sleep", "asleep", inside="outer")
    with phases("never"):
        clock.sleep(5)
    with phases.watched(memory=False):
        with phases("outer"):
            clock.now += 2
            with phases("inner"):
                clock.sleep(4)
            clock.sleep(1)
            clock.now += 2
        with phases("begun"):
            phases.become("become")
            clock.sleep(3)
        with pytest.raises(KeyError), phases("outer"), phases("inner"):
            raise KeyError
        clock.sleep(7)
    assert phases.seconds == {OTHER: 7, "outer": 4, "inner": 4, "asleep": 1, "begun": 0, "become": 3}


def made_up(**changes: Any) -> dict[str, Any]:
    """A record of a measured row and one that is absent."""
    case = ("linear_logprob", "forward", {"head": "made up", "N": 8}, "bfloat16", OURS, "measured")
    work = {"backend": "triton", "count": "2NHV", "flops": 2e12, "bytes": 1e9, "ceiling": "gemm"}
    time = {"seconds": 0.25, "spread": 0.0, "rounds": 7, "timing": "wall", "tflops": 8.0, "gbps": 4.0, "percent": 80.0}
    row = Measurement(*case, peak_mib=12.5, errors={"logp": 1e-6, "d_hidden": 2e-3}, **work, **time).to_json()
    machine = {"card": "Imaginary Card 0", "driver": "0.0", "cuda": "0.0", "date": "2000-01-01", "tests": "passed"}
    code = {"commit": "c0ffee" * 6, "dirty": False, "complete": True}
    return Record("kernels", CPU, CEILINGS, 2).to_json() | machine | code | {"rows": [row, row | ABSENT]} | changes


def test_the_record_holds_what_a_reader_needs(tmp_path: Path) -> None:
    words = ["--only", "tgrpo_advantages.*videor1_kernels$", "--device", "cpu", "--record", str(tmp_path)]
    assert run.main(["kernels", *words]) == 0
    data = load(tmp_path / "cpu-kernels.json")
    assert set(data) == set(REQUIRED)
    assert (data["complete"], data["cuda"], data["driver"], data["tests"]) == (False, None, None, "not run")
    assert data["card"].startswith("CPU: ")
    assert data["ceilings"] == CEILINGS.to_json()
    assert [row["op"] for row in data["rows"]] == ["tgrpo_advantages"]
    assert str(ROOT) not in json.dumps(data)
    assert "tgrpo_advantages" in report.table(data)


def test_report_writes_the_readme_and_the_page(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "imaginary.json").write_text(json.dumps(made_up()))
    readme, page = tmp_path / "README.md", tmp_path / "results.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    arguments = ["--write", "--results", str(tmp_path / "results"), "--readme", str(readme), "--page", str(page)]
    for _ in range(2):
        assert report.main(arguments) == 0
        table = report.summary(tmp_path / "results")
        assert readme.read_text() == f"before\n<!-- benchmarks -->\n{table}\n<!-- /benchmarks -->\nafter\n"
        text = page.read_text()
        assert text == report.page(tmp_path / "results")
    assert text.startswith("# Results\n")
    assert "\n\n## Kernels: Imaginary Card 0, 2000-01-01\n\n**Imaginary Card 0**, driver 0.0, CUDA 0.0" in text
    assert "commit c0ffeec0ffee, 2000-01-01, kernel tests passed. Ceilings of this run: 2 TF/s" in text
    assert "| videor1_kernels (triton) | 250 | 8 | 4 | 80.0 (gemm) | 12.5 | 1.0e-06 | 2.0e-03 |" in text
    assert "| Other | not run: it is not there |" in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="expected a line <!-- benchmarks -->"):
        report.main(arguments)


def test_report_says_what_is_doubtful(tmp_path: Path) -> None:
    for changes, words in (
        ({"dirty": True, "commit": None}, "commit unknown with local changes"),
        ({"complete": False}, "part of the cases only"),
        ({"tests": "failed"}, "its figures are left out"),
    ):
        (tmp_path / "imaginary.json").write_text(json.dumps(made_up(**changes)))
        assert words in report.report(tmp_path)
        assert ("| 250 |" in report.report(tmp_path)) == ("tests" not in changes)
