"""The benchmarks' own machinery: the gate, the clock, the record and the report. Speeds are not tested."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from made_up import CEILINGS, CPU, cpu_options

from benchmarks import bench_sample_tokens, measure, oracle, peers, report, run, shapes, tune
from benchmarks.bench_prefix_attention import Size as AttentionSize
from benchmarks.bench_prefix_attention import attention_inputs
from benchmarks.cases import OURS, Case, Contender, Work, pairs
from benchmarks.measure import Clock, GateFailure, plain_stopwatch
from benchmarks.record import REQUIRED, Record, load
from videor1_kernels import dispatch, linear_logprob

ROOT = Path(__file__).parents[2]
TINY = shapes.Size("tiny", 48, 16, 80, 6, torch.float32)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setitem(measure.BUDGET, "cpu", 0.001)
    monkeypatch.setattr(shapes, "small", lambda: TINY)
    yield
    measure.prepare.cache_clear()


def logprob_case(*contenders):
    return Case(
        "linear_logprob",
        "forward",
        TINY.described(),
        TINY.dtype,
        contenders,
        lambda device: shapes.head_inputs(TINY, device),
        oracle.logprob,
        lambda inputs: Work(2e6, 1e3, "2NHV"),
    )


def measured(build, name=OURS, missing=lambda device: None):
    contender = Contender(name, build, missing)
    clock = Clock(CPU)
    return measure.measure(logprob_case(contender), contender, CPU, plain_stopwatch(clock), clock)


def right(inputs):
    def step():
        logp, entropy = linear_logprob(inputs.hidden.detach(), inputs.weight.detach(), inputs.labels)
        return {"logp": logp, "entropy": entropy}

    return step


def changed(change):
    def build(inputs):
        def step():
            outputs = right(inputs)()
            change(outputs)
            return outputs

        return step

    return build


def test_a_right_implementation_is_measured():
    row = measured(right)
    assert (row.status, row.backend, row.count, row.timing) == ("measured", "reference", "2NHV", "wall")
    assert row.rounds >= 7
    assert row.tflops == pytest.approx(2e6 / row.seconds / 1e12)
    assert row.percent == pytest.approx(100 * row.tflops / 2.0)
    assert row.gbps == pytest.approx(1e3 / row.seconds / 1e9)
    assert 0 < row.errors["logp"] < 1e-5


@pytest.mark.parametrize("name", [OURS, "torch, wrong"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: out["logp"].add_(0.01), "rms error 1.0.*against fp64"),
        (lambda out: out["logp"][-1:].fill_(float("nan")), "1 values are NaN"),
        (lambda out: out.pop("logp"), "expected among the outputs, got entropy"),
        (lambda out: out.update(logp=out["logp"][:, None]), "expected shape"),
    ],
)
def test_a_wrong_one_has_no_speed(name, change, words):
    row = measured(changed(change), name)
    assert row.status == "failed"
    assert row.seconds is row.tflops is row.peak_mib is None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(row.reason)


def test_only_ours_must_have_every_output():
    without = changed(lambda out: out.pop("entropy"))
    assert measured(without, "torch").status == "measured"
    assert measured(without).status == "failed"


def test_what_cannot_run_says_why():
    def raises(inputs):
        raise RuntimeError("no such kernel\nand a traceback")

    assert measured(raises, "another").reason == "RuntimeError: no such kernel"
    assert measured(raises, "another").status == "not run"
    assert measured(raises).status == "failed"
    absent = measured(right, "another", peers.missing("no-such-package", "no_such_package"))
    assert (absent.status, absent.reason) == ("not run", "no-such-package is not installed")
    assert peers.missing("torch", "torch", gpu=True)(CPU) == "its kernels need a GPU"
    assert peers.missing("torch", "torch", gpu=True)(torch.device("cuda")) is None


def test_the_reference_on_a_gpu_is_not_what_is_measured(monkeypatch):
    monkeypatch.setitem(dispatch._last, "linear_logprob", "reference")
    assert measure.check_backend("linear_logprob", CPU) == "reference"
    with pytest.raises(GateFailure, match="the reference ran on cuda"):
        measure.check_backend("linear_logprob", torch.device("cuda"))
    monkeypatch.setitem(dispatch._last, "linear_logprob", "triton")
    assert measure.check_backend("linear_logprob", torch.device("cuda")) == "triton"
    monkeypatch.delitem(dispatch._last, "linear_logprob")
    with pytest.raises(GateFailure, match="none was made"):
        measure.check_backend("linear_logprob", CPU)


def test_clock_and_stopwatch():
    clock, calls = Clock(CPU), []
    seconds = plain_stopwatch(clock)(lambda: time.sleep(0.002), lambda: calls.append(1), 3)
    assert len(seconds) == len(calls) == 3
    assert all(0.002 <= s < 1 for s in seconds)
    assert plain_stopwatch(clock)(lambda: clock.count(4e-6), lambda: None, 2) == pytest.approx([4e-6, 4e-6], rel=1e-3)
    assert plain_stopwatch(clock)(lambda: None, lambda: None, 1)[0] < 1  # counting ended with its round


def test_peak_memory_is_beyond_the_outputs():
    def step():
        scratch = torch.zeros(1 << 18)  # 1 MiB
        return {"out": torch.zeros(1 << 16).add_(scratch[0]), "same": scratch.new_zeros(1 << 16)}

    assert measure.peak_bytes(step, CPU) == pytest.approx(1 << 20, abs=1 << 12)


@pytest.mark.parametrize("name", run.PARTS["kernels"])
def test_cases_pass_their_gates(name):
    clock, seen = Clock(CPU), 0
    cases = [case for case in importlib.import_module(f"benchmarks.bench_{name}").cases(CPU) if not case.slow]
    for case, contender in pairs(cases):
        if contender.stage == 2:  # compiling takes long, and what is compiled is the plain torch above
            continue
        row = measure.measure(case, contender, CPU, plain_stopwatch(clock), clock)
        seen += contender.ours
        if row.status != "measured":
            assert row.status == "not run", f"{case.name}: {contender.name}: {row.reason}"
            assert not contender.name.startswith((OURS, "torch")), row.reason
        elif row.flops:
            assert row.count.endswith(("NHV", "pairs Hq D"))
    assert seen


def test_every_operation_is_measured():
    modules = [module for part in run.PARTS for module in run.part_modules(part)]
    assert {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")} == {m.__name__[11:] for m in modules}
    measured = {case.op for module in modules for case in module.cases(CPU)}
    assert measured > set(dispatch._registry)


@pytest.mark.parametrize("name", list(bench_sample_tokens.SAMPLERS))
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda out, banned: out | {"tokens": banned[:1].expand(8)}, "tokens: rms error"),
        (lambda out, banned: out | {"tokens": (out["tokens"] + 1) % 512}, "tokens.*: rms error"),
        (lambda out, banned: out | {"logp": out["logp"] - 0.01}, "logp: rms error"),
        (lambda out, banned: out | {bench_sample_tokens.DRAWN: out["tokens"].roll(1)}, "as drawn by fp64: rms error"),
    ],
)
def test_a_wrong_draw_is_not_measured(name, wrong, reason):
    inputs = bench_sample_tokens.sample_inputs(
        bench_sample_tokens.Size("small", 8, 512), bench_sample_tokens.SAMPLERS[name], CPU
    )
    outputs, expected = bench_sample_tokens._ours(inputs)(), bench_sample_tokens._expected(inputs)
    oracle.check(outputs, expected, torch.float32, ours=True)
    with pytest.raises(GateFailure, match=reason):
        oracle.check(wrong(outputs, inputs.banned), expected, torch.float32, ours=True)


def test_oracle_gradients_are_those_of_autograd():
    inputs = shapes.head_inputs(TINY, CPU, zero_completions=3, beta=0.0)
    hidden, weight = (x.detach().double().requires_grad_() for x in (inputs.hidden, inputs.weight))
    scores = (hidden @ weight.T).log_softmax(-1).gather(1, inputs.labels[:, None])[:, 0]
    loss = oracle.grpo_of(scores, inputs)
    gradients = dict(zip(("d_hidden", "d_weight"), torch.autograd.grad(loss, (hidden, weight)), strict=True))
    outputs = {"loss": loss, "logp": scores, **gradients}
    errors = oracle.check(outputs, oracle.grpo(inputs), TINY.dtype, ours=True)
    assert max(errors.values()) < 1e-12
    outputs["d_weight"] = gradients["d_weight"] * 1.001
    with pytest.raises(GateFailure, match=r"d_weight: relative error 1\.00e-03"):
        oracle.check(outputs, oracle.grpo(inputs), TINY.dtype, ours=True)


def test_the_record_holds_what_a_reader_needs(tmp_path):
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


def test_others_are_left_out_when_the_time_is_spent():
    chosen = cpu_options("--only", "selective_log_softmax, forward,", "--seconds", "0")
    record = run.run_cases("kernels", run.part_cases("kernels", CPU), chosen)
    others = [row for row in record.rows if not row.implementation.startswith((OURS, "torch"))]
    assert others
    assert all(row.reason == "left out after 0 s of this run" for row in others)
    assert all(row.status == "measured" for row in record.rows if row not in others)


def test_files_that_are_no_record_are_named(tmp_path):
    path = tmp_path / "made-up.json"
    for text, words in (("{", "does not parse"), ("{}", "has no schema, part"), ("[]", "has no schema")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"made-up.json: .*{words}"):
            load(path)
    path.write_text(json.dumps({**made_up(), "schema": 99}))
    with pytest.raises(ValueError, match="got 99"):
        load(path)


def made_up(**changes):
    row = {
        "op": "linear_logprob",
        "title": "forward",
        "size": {"head": "made up", "N": 8},
        "dtype": "bfloat16",
        "implementation": OURS,
        "status": "measured",
        "reason": None,
        "backend": "triton",
        "does": "",
        "count": "2NHV",
        "flops": 2e12,
        "bytes": 1e9,
        "ceiling": "gemm",
        "seconds": 0.25,
        "spread": 0.0,
        "rounds": 7,
        "timing": "wall",
        "tflops": 8.0,
        "gbps": 4.0,
        "percent": 80.0,
        "peak_mib": 12.5,
        "errors": {"logp": 1e-6, "d_hidden": 2e-3},
    }
    absent = {**row, "implementation": "Other", "status": "not run", "reason": "it is not there", "seconds": None}
    record = {
        "schema": 1,
        "part": "kernels",
        "card": "Imaginary Card 0",
        "driver": "0.0",
        "cuda": "0.0",
        "python": "3.12.0",
        "torch": "2.11.0",
        "packages": {"triton": "3.6.0", "trl": None},
        "commit": "c0ffee" * 6,
        "dirty": False,
        "date": "2000-01-01",
        "tests": "passed",
        "complete": True,
        "ceilings": CEILINGS.to_json(),
        "rows": [row, absent],
    }
    assert set(record) == set(REQUIRED)
    return {**record, **changes}


def test_report_writes_the_readme(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "imaginary.json").write_text(json.dumps(made_up()))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    page = tmp_path / "results.md"
    arguments = ["--write", "--results", str(tmp_path / "results"), "--readme", str(readme), "--page", str(page)]
    assert report.main(arguments) == 0
    short = readme.read_text()
    assert short.startswith(f"before\n<!-- benchmarks -->\n{report.summary(tmp_path / 'results')}\n")
    assert short.endswith("<!-- /benchmarks -->\nafter\n")
    assert "old" not in short
    text = page.read_text()
    assert text == report.page(tmp_path / "results")
    assert text.startswith("# Results\n")
    assert "\n\n## Kernels: Imaginary Card 0, 2000-01-01\n\n**Imaginary Card 0**, driver 0.0, CUDA 0.0" in text
    assert "commit c0ffeec0ffee, 2000-01-01, kernel tests passed. Ceilings of this run: 2 TF/s" in text
    assert "| videor1_kernels (triton) | 250 | 8 | 4 | 80.0 (gemm) | 12.5 | 1.0e-06 | 2.0e-03 |" in text
    assert "| Other | not run: it is not there |" in text
    report.main(arguments)
    assert (readme.read_text(), page.read_text()) == (short, text)
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="expected a line <!-- benchmarks -->"):
        report.main(arguments)


def test_report_without_a_card_says_how_to_record_one(tmp_path):
    assert report.report(tmp_path) == report.NOTHING
    (tmp_path / "cpu.json").write_text(json.dumps(made_up(cuda=None, driver=None, card="CPU: imaginary")))
    text = report.report(tmp_path)
    assert text.startswith(f"{report.NOTHING}\n\n## Kernels: CPU: imaginary, 2000-01-01\n\n**CPU: imaginary**, Python")
    assert text.endswith(" |")


def test_runs_stand_card_by_card_and_part_by_part(tmp_path):
    for part in ("video", "kernels"):
        for card, cuda in (("CPU: x, 1 thread", None), ("B", "13"), ("A", "13")):
            (tmp_path / f"{card[0]}-{part}.json").write_text(json.dumps(made_up(part=part, card=card, cuda=cuda)))
    found = re.findall("^## (.*), 2000", report.report(tmp_path), re.MULTILINE)
    titles = ("Kernels", "Frames to patches, decoding")
    assert found == [f"{title}: {card}" for card in ("A", "B", "CPU: x, 1 thread") for title in titles]


def test_report_says_what_is_doubtful(tmp_path):
    path = tmp_path / "imaginary.json"
    path.write_text(json.dumps(made_up(dirty=True, complete=False, commit=None)))
    assert "commit unknown with local changes" in report.report(tmp_path)
    assert "part of the cases only" in report.report(tmp_path)
    path.write_text(json.dumps(made_up(tests="failed")))
    assert "its figures are left out" in report.report(tmp_path)
    assert "250" not in report.report(tmp_path)


def test_file_names():
    record = Record("kernels", CPU, CEILINGS, 1)
    assert record.path == "cpu-kernels.json"


def run_pytest(*words):
    # pytest-benchmark does not time in a process of pytest-xdist.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env | {"OMP_NUM_THREADS": "2"})


@pytest.mark.parametrize(
    ("words", "file", "op"),
    [
        (["bench_group_advantage.py", "-m", "kernels", "--threads", "1"], "cpu-kernels.json", "tgrpo_advantages"),
        (["bench_growth.py", "--axis", "prompts", "--most", "1"], "cpu-growth.json", "growth"),
    ],
    ids=["one by one", "in turns, with sizes"],
)
def test_pytest_benchmarks(words, file, op, tmp_path):
    sizes = ["--frames", "4", "--completion", "3", "--generations", "2", "--rounds", "1"] if op == "growth" else []
    done = run_pytest(f"benchmarks/{words[0]}", *words[1:], *sizes, "--device", "cpu", "--record", str(tmp_path))
    if find_spec("pytest_benchmark") is None:
        assert "expected the plugin pytest-benchmark" in done.stderr
        return
    assert done.returncode == 0, done.stdout + done.stderr
    data = load(tmp_path / file)
    assert {row["op"] for row in data["rows"]} == {op}
    assert {row["status"] for row in data["rows"]} <= {"measured", "not run"}
    assert report.table(data) in done.stdout
    assert data["card"].endswith(", 1 thread")  # of the process's two


def test_the_kernels_are_measured_without_pytest_and_the_trainers_packages():
    """As on a machine with a card that has torch and triton alone."""
    absent = ("pytest", "pytest_benchmark", "transformers", "av", "PIL", "psutil", "jsonargparse", "matplotlib")
    words = ["kernels", "--device", "cpu", "--only", "tgrpo_advantages.*videor1_kernels$"]
    script = f"import sys; sys.modules.update(dict.fromkeys({absent})); from benchmarks import run; run.main({words})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| videor1_kernels (" in done.stdout


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["kernels", "--frames", "4"], "--frames: no option of kernels, which takes none of the sizes"),
        (["training", "--frames", "4"], "--frames: no option of training, which takes --checkpointing, --completion"),
        (["step", "--shape", "cpu"], "--shape: step takes tiny, 3b, 7b, got cpu"),
        (["training", "--prompt", "200"], "--prompt: expected 200 tokens of text and a multiple of 8 of video"),
        (["growth", "--axis", "time"], "--axis: growth takes frames, completion, generations, prompts, got time"),
        (["growth", "--prompts", "1", "2"], "--prompts: growth takes one, got 1, 2"),
        (["step", "--checkpointing", "yes"], "--checkpointing: expected on, off, shape, got 'yes'"),
    ],
)
def test_sizes_that_a_part_does_not_have_are_refused(words, error, capsys):
    with pytest.raises(SystemExit):
        run.main(words)
    assert error in capsys.readouterr().err


def test_gpu_script_without_a_card():
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu.sh"), "kernels"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "PYTHON": "false", "OUT": "/tmp"},
    )
    assert done.returncode == 2
    assert "expected a CUDA device" in done.stderr


def test_a_sweep_says_which_variants_are_wrong_or_do_not_run() -> None:
    right = torch.arange(3.0)

    def broken() -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory")

    variants = [("a", lambda: right), ("b", lambda: right + 1), ("c", broken), ("d", lambda: right + 1e-4)]
    rows = tune.sweep(iter(variants), 1e9, CPU, 2)
    assert ["failed" in row for row in rows] == [False, True, True, False]
    assert "away from the first" in rows[1]["failed"]
    assert "shared memory" in rows[2]["failed"]
    assert rows[0]["ms"] > 0


def test_the_sweeps_variants_compute_the_same() -> None:
    inputs = shapes.head_inputs(shapes.Size("tiny", 16, 8, 70, 8, torch.float16), CPU)
    packed = attention_inputs(AttentionSize("tiny", 20, 2, 10, (2, 1), 16, torch.float32), CPU)
    for variants in (
        tune.forward_variants(inputs),
        tune.loss_variants(inputs, (4,)),
        tune.row_variants(inputs),
        tune.attention_variants(packed),
    ):
        rows = tune.sweep(itertools.islice(variants, 3), 1.0, CPU, 1)
        assert not any("failed" in row for row in rows)
        assert len(rows) >= 2
