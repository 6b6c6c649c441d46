"""Every benchmark of kernels and of video in its smallest size, and the commands that run them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up import CPU, row_of
from patience import PATIENCE
from torch import Tensor

from benchmarks import bench_decode, bench_frames_to_patches, bench_sample_tokens, oracle, report, run, shapes, tune
from benchmarks.bench_prefix_attention import Size as AttentionSize
from benchmarks.bench_prefix_attention import attention_inputs
from benchmarks.cases import OURS, Case, pairs
from benchmarks.measure import Clock, GateFailure
from benchmarks.record import load
from benchmarks.video_files import made_video
from videor1_kernels import dispatch

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("unwatched")


@pytest.mark.parametrize("name", run.PARTS["kernels"])
def test_cases_pass_their_gates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "small", lambda: shapes.Size("tiny", 48, 16, 80, 6, torch.float32))
    seen = 0
    for case, contender in pairs(importlib.import_module(f"benchmarks.bench_{name}").cases(CPU)):
        if case.slow or contender.stage == 2:  # compiling takes long, and what is compiled is the plain torch above
            continue
        row = row_of(case, contender)
        seen += contender.ours
        if row.status != "measured":
            assert row.status == "not run", f"{case.name}: {contender.name}: {row.reason}"
            assert not contender.name.startswith((OURS, "torch")), row.reason
        elif row.flops:
            assert row.count.endswith(("NHV", "pairs Hq D"))
    assert seen


def test_every_operation_is_measured() -> None:
    modules = [module for part in run.PARTS for module in run.part_modules(part)]
    assert {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")} == {m.__name__[11:] for m in modules}
    assert {case.op for module in modules for case in module.cases(CPU)} > set(dispatch._registry)


@pytest.mark.parametrize("case", bench_sample_tokens.cases(CPU), ids=lambda case: case.title)
def test_a_wrong_draw_is_not_measured(case: Case) -> None:
    inputs = case.inputs(CPU)
    outputs, expected = case.contenders[0].build(inputs)(), case.expected(inputs)
    oracle.check(outputs, expected, torch.float32, ours=True)
    tokens = outputs["tokens"]
    for wrong, reason in (
        ({"tokens": inputs.banned[:1].expand(48)}, "tokens: rms error"),
        ({"tokens": (tokens + 1) % 8192}, "tokens.*: rms error"),
        ({"logp": outputs["logp"] - 0.01}, "logp: rms error"),
        ({bench_sample_tokens.DRAWN: tokens.roll(1)}, "as drawn by fp64: rms error"),
    ):
        with pytest.raises(GateFailure, match=reason):
            oracle.check(outputs | wrong, expected, torch.float32, ours=True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    sizes = {"FRAMES": 2, "SOURCE": (216, 384), "SIZE": (28, 56)}
    resize = functools.partial(bench_frames_to_patches._resize.func, size=(28, 56), mode="bicubic", antialias=True)
    for name, value in (sizes | {"_resize": resize}).items():
        monkeypatch.setattr(bench_frames_to_patches, name, value)
    return bench_frames_to_patches.cases(CPU)


def test_frames_to_patches_beside_the_chain(small: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    for case in small:
        rows = [row_of(case, contender) for contender in case.contenders]
        assert [row.status for row in rows] == ["measured"] * 3, [row.reason for row in rows]
        assert rows[0].backend == "native"
    monkeypatch.setattr(bench_frames_to_patches, "MEAN", (0.5, 0.5, 0.5))
    assert row_of(small[1], small[1].contenders[1]).status == "failed"


def test_decoding_side_by_side() -> None:
    case = bench_decode._case("16 frames", "made", functools.partial(made_video, 90, 60, gop=8, rate=4))
    ours, everything, decord = run.in_turns(case, CPU, Clock(CPU), 1)
    assert (ours.status, everything.status) == ("measured", "measured"), (ours.reason, everything.reason)
    assert max(ours.errors.values()) == 0
    assert decord.status == "measured" or decord.reason == "decord is not installed"

    def late(path: Path, indices: tuple[int, ...]) -> Tensor:
        return bench_decode._all(path, [*(i + 1 for i in indices[:-1]), indices[-1]])

    wrong = dataclasses.replace(case.contenders[0], build=bench_decode._step(late))
    late_row, _ = run.in_turns(dataclasses.replace(case, contenders=[wrong, case.contenders[1]]), CPU, Clock(CPU), 1)
    assert (late_row.status, "frames: rms error" in late_row.reason) == ("failed", True)


def test_pytest_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    pytest.importorskip("pytest_benchmark")
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)  # in a process of pytest-xdist nothing is timed
    modules = [f"{ROOT}/benchmarks/bench_{name}.py" for name in ("group_advantage", "training")]
    sizes = [[], ["--shape=toy", "--prompt=208", "--completion=2", "--generations=2", "--rounds=1"]]
    for module, size, part in zip(modules, sizes, ("kernels", "training"), strict=True):
        words = ["-p", "no:cacheprovider", module, "-m", part, *size]
        assert pytest.main([*words, "--device", "cpu", "--record", str(tmp_path)]) == 0
        data = load(tmp_path / f"cpu-{part}.json")
        assert {(row["op"], row["status"]) for row in data["rows"]} == {(data["rows"][0]["op"], "measured")}
        assert report.table(data) in capfd.readouterr().out


def test_the_kernels_are_measured_without_pytest_and_the_trainers_packages() -> None:
    """As on a machine with a card that has torch and triton alone."""
    absent = ("pytest", "pytest_benchmark", "transformers", "av", "PIL", "psutil", "jsonargparse", "matplotlib")
    words = ["kernels", "--device", "cpu", "--only", "tgrpo_advantages.*videor1_kernels$"]
    script = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
from benchmarks import measure, run
measure.ceilings = run.ceilings = lambda device: measure.Ceilings(1.0, "", "", 1.0, 1)
run.main({words})"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "| videor1_kernels (" in done.stdout


def test_a_sweep_is_gated_by_its_first_variant() -> None:
    inputs = shapes.head_inputs(shapes.Size("tiny", 8, 8, 40, 4, torch.float16), CPU)
    packed = attention_inputs(AttentionSize("tiny", 6, 2, 2, (2, 1), 16, torch.float32), CPU)
    forward, rows = tune.forward_variants(inputs), tune.row_variants(inputs)
    for variants in (forward, tune.loss_variants(inputs, (4,)), rows, tune.attention_variants(packed)):
        right, other = itertools.islice(variants, 2)
        wrong = ("wrong", lambda call=right[1]: call() + 1)
        found = tune.sweep(iter([right, other, wrong]), 1.0, CPU, 1)
        assert ["away from the first" in row.get("failed", "") for row in found] == [False, False, True]
        assert not [row for row in found[:2] if "failed" in row]
