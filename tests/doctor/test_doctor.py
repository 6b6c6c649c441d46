"""The doctor: what it says of this machine, and of machines that lack something."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from patience import PATIENCE

import videor1_kernels
from videor1.doctor import __main__ as doctor
from videor1.doctor import machine, packages, selfcheck, tools
from videor1.doctor.rows import Finding, Section, problems, redact_home, text
from videor1.types import SampleError
from videor1_kernels import dispatch, extension

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [extra for extra in PROJECT["optional-dependencies"] if extra not in packages.DEVELOPMENT]
STATUSES = {"ok", "info", "absent", "warning", "broken"}


def by_name(rows: list[Finding]) -> dict[str, Finding]:
    return {row.name: row for row in rows}


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)


def examined(monkeypatch: pytest.MonkeyPatch, *rows: Finding) -> None:
    """Let the doctor see these rows alone."""
    monkeypatch.setattr(doctor, "SECTIONS", {"Things": lambda: list(rows)})


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A card that torch reports and that computes nothing."""
    card = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    memory = [130 << 30, 140 << 30]  # free, total
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: tuple(memory))
    monkeypatch.setattr(machine, "nvidia_smi", lambda: [("NVIDIA H200", "580.95")])
    monkeypatch.setattr(extension, "load_operators", lambda device_type: None)
    return SimpleNamespace(card=card, memory=memory)


def test_this_machine_as_json() -> None:
    done = run_python("-m", "videor1.doctor", "--json", OPENAI_API_KEY="sk-very-secret")
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ready"] else 1)
    assert report["ready"], report["problems"]
    assert list(report["sections"]) == list(doctor.SECTIONS)
    for rows in report["sections"].values():
        assert rows
        for row in rows:
            assert set(row) == {"name", "value", "status", "fix"}
            assert row["status"] in STATUSES
    for problem in report["problems"]:
        assert set(problem) == {"section", "name", "what", "fix", "needed"}
        assert problem["fix"]
    checks = {row["name"]: row["value"] for row in report["sections"]["Self-check"]}
    for name in ("imports", "decode h264", *selfcheck.CASES):
        assert checks[name].startswith("works"), checks[name]
    versions = {row["name"]: row["value"] for row in report["sections"]["Versions"]}
    assert versions["torch"].startswith(torch.__version__)
    assert len(versions) >= 2 + len(PROJECT["dependencies"]) - 1  # triton is for Linux
    assert "sk-very-secret" not in done.stdout


def test_nothing_heavy_is_imported_before_it_is_asked() -> None:
    heavy = ("torch", "transformers", "av", "numpy", "triton", "psutil", "packaging")
    code = f"import sys, videor1.doctor.__main__; print([name for name in {heavy} if name in sys.modules])"
    assert run_python("-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize("missing", ["torch", "av"])
def test_a_missing_package_is_told_and_crashes_nothing(missing: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules['{missing}'] = None\n"
        "from videor1.doctor import __main__ as doctor, packages\n"
        "known = packages.installed\n"
        f"packages.installed = lambda name: None if name == '{missing}' else known(name)\n"
        "sys.exit(doctor.main([]))"
    )
    done = run_python("-c", code)
    assert done.returncode == 1, done.stderr
    assert f"{missing}: not installed (supported: >=" in done.stdout
    assert f"-> pip install '{missing}>=" in done.stdout
    assert "Traceback" not in done.stderr


def test_torch_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    known = packages.installed
    monkeypatch.setattr(packages, "installed", lambda name: "2.4.1" if name == "torch" else known(name))
    rows = by_name(packages.versions())
    assert rows["torch"].status == "broken"
    assert rows["torch"].value == "2.4.1, outside of >=2.11,<2.14"
    assert rows["torch"].fix == "pip install 'torch>=2.11,<2.14'"
    assert {row.status for name, row in rows.items() if name not in ("torch", "videor1")} == {"ok"}


def test_python_out_of_range() -> None:
    row = packages._python("<3.8")
    assert row.status == "broken"
    assert "outside of <3.8" in row.value
    assert packages._python(">=3.8").status == "ok"


def test_ranges_are_those_of_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["Metadata-Version: 2.4", "Name: videor1", "Version: 9.8.7", "Requires-Python: >=3.5"]
    lines += ["Requires-Dist: torch<1000,>=999", "Requires-Dist: triton>=3.6; sys_platform == 'no-such-system'"]
    lines += ["Provides-Extra: flash-attn", "Provides-Extra: test"]
    lines += ["Requires-Dist: flash-attn<3,>=2.7; extra == 'flash-attn'", "Requires-Dist: pytest; extra == 'test'"]
    folder = tmp_path / "videor1-9.8.7.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = by_name(packages.versions())
    assert list(rows) == ["videor1", "python", "torch"]
    assert rows["videor1"].value == "9.8.7; ranges from the installed package's metadata"
    assert rows["torch"].value.endswith("outside of >=999,<1000")
    (flash,) = packages.extras()
    assert (flash.name, flash.fix) == ("flash-attn", 'pip install -e ".[flash-attn]" (in the clone)')


def test_ranges_of_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_there(name: str) -> None:
        raise packages.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "metadata", not_there)
    wanted = packages.declared()
    assert wanted.version == PROJECT["version"]
    assert wanted.python == PROJECT["requires-python"]
    assert {r.name for r in wanted.needed} >= {"torch", "transformers", "av"}
    assert set(wanted.extras) == set(PROJECT["optional-dependencies"])


def test_extras_and_the_line_that_adds_each(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"wandb": "0.20", "liger-kernel": "0.1.0", "flash-attn": "2.8.0", "pyarrow": "21.0"}
    monkeypatch.setattr(packages, "installed", versions.get)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    rows = by_name(packages.extras())
    assert list(rows) == EXTRAS
    assert (rows["wandb"].status, rows["wandb"].value) == ("ok", "wandb 0.20")
    assert rows["trackio"].status == "absent"
    assert rows["trackio"].fix == 'pip install -e ".[trackio]" (in the clone)'
    assert rows["liger"].status == "warning"
    assert "outside of liger-kernel" in rows["liger"].value
    assert rows["flash-attn"].status == "warning"
    assert "does not load" in rows["flash-attn"].value
    assert rows["stream"].value == "datasets not installed (pyarrow 21.0 is)"


def test_no_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    rows = by_name(tools.compilers())
    assert rows["C++"] == Finding("C++", "no C++ compiler (c++, g++, clang++, CXX)", "warning", tools.GET_CXX)
    assert rows["nvcc"].status == "absent"  # no GPU here: nothing to fix
    for name in ("decode_attention", "operators"):
        assert rows[name].status == "warning"
        assert "plain torch does it" in rows[name].value
        assert "no C++ compiler" in rows[name].value
    assert not [problem for problem in problems([Section("Compilers", tuple(rows.values()))]) if problem.needed]


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "broken-c++"
    fake.write_text("#!/bin/sh\necho 'error: no licence' >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = by_name(tools.compilers())
    assert rows["C++"].status == "warning"
    assert "which does not run" in rows["C++"].value
    assert "exit status 3 (error: no licence)" in rows["operators"].value


def test_native_code_turned_off_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDEOR1_NATIVE", "0")
    rows = by_name(tools.compilers())
    assert rows["operators"].status == rows["decode_attention"].status == "info"
    assert "VIDEOR1_NATIVE=0 turns it off" in rows["operators"].value


def test_decoders_here() -> None:
    rows = by_name(tools.decoders())
    assert "FFmpeg" in rows["pyav"].value
    assert {"pyav-nvdec", "decord", "torchcodec", "pynvvideocodec"} < set(rows)
    assert rows["auto, video.device cpu"].value.startswith("pyav on the CPU (the frames are wanted on cpu)")


def test_a_decoder_that_is_missing_or_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.import_module

    def import_module(name: str) -> ModuleType:
        if name == "torchcodec.decoders":
            raise ModuleNotFoundError("No module named 'torchcodec'", name="torchcodec")
        if name == "PyNvVideoCodec":
            raise OSError("libcuda.so.1: cannot open shared object file")
        return known(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    rows = by_name(tools.decoders())
    assert rows["torchcodec"].status == "absent"
    assert 'pip install -e ".[torchcodec]" (in the clone)' in rows["torchcodec"].value
    assert rows["pynvvideocodec"].status == "warning"
    assert "installed but does not load (libcuda.so.1" in rows["pynvvideocodec"].value
    assert "pyav" in rows["pynvvideocodec"].fix


def test_every_public_operation_is_listed_and_checked() -> None:
    ops = tools.operations()
    assert set(ops) == set(dispatch._registry) & set(videor1_kernels.__all__)
    assert len(ops) >= 9
    assert set(selfcheck.CASES) == set(ops)
    rows = by_name(tools.kernels())
    for op in ops:
        assert rows[op].value == f"{videor1_kernels.chosen_backend(op, dtype=torch.float32)} (float32 on cpu)"


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "nvidia_smi", lambda: [])
    (row,) = machine.gpus()
    assert row.status == "info"
    assert "everything runs on the CPU" in row.value


@pytest.mark.parametrize(
    ("build", "hidden", "what", "fix"),
    [
        (None, None, "is built without CUDA", "pytorch.org"),
        ("13.0", "", "hidden by CUDA_VISIBLE_DEVICES=''", "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", None, "built for CUDA 13.0 cannot use it", "update the driver"),
    ],
)
def test_a_gpu_that_torch_does_not_use(
    build: str | None, hidden: str | None, what: str, fix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 535.104'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    (row,) = machine.gpus()
    assert row.status == "warning"
    assert row.value.startswith("NVIDIA H100 80GB HBM3 (driver 535.104)")
    assert what in row.value
    assert fix in row.fix


def test_a_gpu(fake_gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = by_name(machine.gpus())
    assert "580.95" in rows["driver"].value
    card = rows["cuda:0"]
    assert card.status == "ok"
    assert card.value == "NVIDIA H200, compute capability 9.0, bf16, 140.0 GiB of memory, 130.0 GiB free"
    taken = by_name(tools.kernels())
    assert taken["linear_grpo_loss"].value == "triton (bfloat16 on cuda)"
    assert taken["frames_to_patches"].value == "native (bfloat16 on cuda)"
    auto = [row.value for row in tools.decoders() if row.name == "auto, video.device cuda"]
    assert len(auto) == 2
    fake_gpu.memory[0] = 1 << 20
    assert machine.gpus()[1].status == "warning"
    fake_gpu.memory[0], fake_gpu.card.major = 100 << 30, 7
    assert "no bf16" in machine.gpus()[1].value
    assert machine.gpus()[1].status == "warning"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert by_name(packages.environment())["TRITON_INTERPRET"].status == "warning"


def test_a_gpu_without_compilers(fake_gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    rows = by_name(tools.compilers())
    assert rows["nvcc"].status == "warning"
    assert "CUDA toolkit" in rows["nvcc"].fix
    assert rows["C for Triton"].status == "broken"  # Triton compiles a launcher for each kernel
    assert rows["operators, cuda"].status == "ok"
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "CC=no-such-compiler is not found" in by_name(tools.compilers())["C for Triton"].value


def test_operations_that_cannot_run_on_the_gpu_are_broken(fake_gpu: SimpleNamespace) -> None:
    rows = selfcheck.operation_rows()
    assert {row.status for row in rows} == {"broken"}
    assert all(row.fix for row in rows)


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_an_operation_with_wrong_results_is_broken(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = videor1_kernels.linear_logprob

    def off(hidden: torch.Tensor, *args: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        logp, entropy = right(hidden, *args, **options)  # type: ignore[arg-type]
        one = torch.tensor([0.0, 0, 0 if hidden.dtype == torch.float64 else wrong, 0, 0, 0])
        return logp + one, entropy

    monkeypatch.setattr(videor1_kernels, "linear_logprob", off)
    rows = by_name(selfcheck.operation_rows())
    assert rows["linear_logprob"].status == "broken"
    assert rows["linear_logprob"].value.startswith("broken (reference on cpu): logp is off by up to ")
    assert {row.status for name, row in rows.items() if name != "linear_logprob"} == {"ok"}


def test_other_tokens_than_the_references_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = videor1_kernels.sample_tokens

    def off(logits: torch.Tensor, *args: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logp = right(logits, *args, **options)  # type: ignore[arg-type]
        return tokens + (logits.dtype != torch.float64), logp

    monkeypatch.setattr(videor1_kernels, "sample_tokens", off)
    assert "tokens are other ones" in by_name(selfcheck.operation_rows())["sample_tokens"].value


def test_clips_that_do_not_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    import videor1.video

    right = videor1.video.read_frames

    def reverse(path: Path, **options: float) -> SimpleNamespace:
        if "av1" in path.name:
            raise SampleError("decode", "no such decoder", path)
        clip = right(path, **options)  # type: ignore[arg-type]
        return SimpleNamespace(frames=clip.frames.flip(0), backend=clip.backend)  # type: ignore[union-attr]

    monkeypatch.setattr(videor1.video, "read_frames", reverse)
    rows = by_name(selfcheck.decode_rows())
    assert rows["decode h264"].status == "broken"
    assert "came back as [2" in rows["decode h264"].value
    assert rows["decode av1"].status == "warning"
    assert "SampleError" in rows["decode av1"].value


def test_an_encoder_that_is_not_there_leaves_the_codec_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "CODECS", {"av1": "no_such_encoder"})
    (row,) = selfcheck.decode_rows()
    assert row.status == "info"
    assert row.value == "not tried: this PyAV has no no_such_encoder to make a clip with"


def test_little_shared_memory_and_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(64 << 20, 64 << 20, 1000))
    rows = by_name(machine.machine())
    if Path("/dev/shm").is_dir():
        assert rows["/dev/shm"].status == "broken"
        assert "--shm-size" in rows["/dev/shm"].fix
    assert {rows[name].status for name in ("run folder", "cache", "temporary")} == {"warning"}
    assert "--output_dir" in rows["run folder"].fix


def test_secrets_and_the_home_folder_are_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "somebody"
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("HF_HOME", str(home / "models"))
    monkeypatch.setenv("HOME", str(home))
    rows = packages.environment()
    assert by_name(rows)["HF_TOKEN"].value == "set (not shown)"
    (section,) = redact_home([Section("Environment", tuple(rows))])
    shown = text([section])
    assert "~/models" in shown
    assert "somebody" not in shown
    assert "very_secret" not in shown


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("absent", 0), ("warning", 0), ("broken", 1)])
def test_exit_codes(
    status: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examined(monkeypatch, Finding("thing", "of some kind", status, "get another"))  # type: ignore[arg-type]
    assert doctor.main([]) == code
    shown = capsys.readouterr().out
    assert ("-> get another" in shown) == (status in ("warning", "broken"))
    assert ("Training can run" in shown) == (code == 0)
    assert doctor.main(["--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] == (code == 0)
    assert report["sections"] == {
        "Things": [{"name": "thing", "value": "of some kind", "status": status, "fix": "get another"}]
    }
    assert len(report["problems"]) == (status in ("warning", "broken"))


def test_what_training_needs_stands_first_among_the_problems() -> None:
    rows = (Finding("slow", "a bit", "warning", "wait"), Finding("gone", "lost", "broken", "find it"))
    found = problems([Section("Things", rows)])
    assert [(problem.name, problem.needed) for problem in found] == [("gone", True), ("slow", False)]
    assert "1 of what it needs is broken" in text([Section("Things", rows)])


def test_a_section_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> list[Finding]:
        raise RuntimeError("the card fell off the bus")

    monkeypatch.setattr(doctor, "SECTIONS", {"GPU": fails, "Machine": lambda: [Finding("memory", "plenty")]})
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert "cannot be looked at: RuntimeError: the card fell off the bus" in shown
    assert "plenty" in shown
    monkeypatch.setattr(doctor, "SECTIONS", {doctor.SELF_CHECK: fails})
    assert doctor.main([]) == 1


def test_the_text_is_aligned_and_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        Finding("a", "x", "ok"),
        Finding("long name", "word " * 60, "warning", "mend"),
        Finding("c", "gone", "absent", "get it"),
    )
    lines = text([Section("Things", rows)]).splitlines()
    assert lines[:2] == ["Things", "  ok  a          x"]
    assert lines[2].startswith("   !  long name  word word")
    assert max(map(len, lines)) <= 110
    assert "   -  c          gone: get it" in lines
    assert lines[-1] == "      -> mend"


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--jsno"])
    assert stopped.value.code == 2
    assert "--jsno" in capsys.readouterr().err
