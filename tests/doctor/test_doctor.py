"""The doctor: what it says of this machine, and of machines that lack something."""

from __future__ import annotations

import importlib
import json
import math
import os
import shlex
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from patience import PATIENCE
from triton.runtime import interpreter

import videor1.video
import videor1_kernels
from benchmarks.compiling import kernel_names
from videor1.doctor import __main__ as doctor
from videor1.doctor import machine, packages, selfcheck, tools
from videor1.doctor.rows import Finding, Section, problems, redact_home, text
from videor1.model.families import FAMILIES
from videor1.types import SampleError
from videor1_kernels import dispatch, extension
from videor1_kernels.frames_to_patches import native

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


Patch = pytest.MonkeyPatch


def by_name(rows: list[Finding]) -> dict[str, Finding]:
    return {row.name: row for row in rows}


def fake_command(folder: Path, name: str, script: str) -> Path:
    """A program of a line of shell."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder / name


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fake_gpu(monkeypatch: Patch) -> SimpleNamespace:
    """A card that torch reports and that computes nothing."""
    card = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    memory = [130 << 30, 140 << 30]  # free, total
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda number: card,
        "mem_get_info": lambda number: tuple(memory),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(machine, "nvidia_smi", lambda: [("NVIDIA H200", "580.95")])
    monkeypatch.setattr(extension, "load_operators", lambda device_type: None)
    monkeypatch.setattr(native, "_launch", lambda device: None)
    return SimpleNamespace(card=card, memory=memory)


def test_this_machine_as_json(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    code, shown = doctor.main(["--json"]), capsys.readouterr().out
    report = json.loads(shown)
    assert (report["ready"], code) == (True, 0), report["problems"]
    assert list(report["sections"]) == list(doctor.SECTIONS)
    for rows in report["sections"].values():
        assert rows
        for row in rows:
            assert set(row) == {"name", "value", "status", "fix"}
            assert row["status"] in {"ok", "info", "absent", "warning", "broken"}
    for problem in report["problems"]:
        assert set(problem) == {"section", "name", "what", "fix", "needed"}
        assert problem["fix"]
    checks = {row["name"]: row["value"] for row in report["sections"]["Self-check"]}
    for name in ("imports", "decode h264", *selfcheck.CASES):
        assert checks[name].startswith("works"), checks[name]
    versions = {row["name"]: row["value"] for row in report["sections"]["Versions"]}
    assert versions["torch"].startswith(torch.__version__)
    assert len(versions) >= 2 + len(PROJECT["dependencies"]) - 1  # triton is for Linux
    assert "sk-very-secret" not in shown


@pytest.mark.parametrize("missing", ["torch", "av"])
def test_a_missing_package_is_told_and_crashes_nothing(missing: str) -> None:
    code = (
        f"import sys; sys.modules['{missing}'] = None\n"
        "from videor1.doctor import __main__ as doctor, packages\n"
        "known = packages.installed\n"
        f"packages.installed = lambda name: None if name == '{missing}' else known(name)\n"
        "sys.exit(doctor.main([]))"
    )
    command, env = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=env)
    assert done.returncode == 1, done.stderr
    assert f"{missing}: not installed (supported: >=" in done.stdout
    assert f"-> pip install '{missing}>=" in done.stdout
    assert "Traceback" not in done.stderr


def test_versions_out_of_range(monkeypatch: Patch) -> None:
    known = packages.installed
    monkeypatch.setattr(packages, "installed", lambda name: "2.4.1" if name == "torch" else known(name))
    rows = by_name(packages.versions())
    fix = "pip install 'torch>=2.11,<2.14'"
    assert rows["torch"] == Finding("torch", "2.4.1, outside of >=2.11,<2.14", "broken", fix)
    assert {row.status for name, row in rows.items() if name not in ("torch", "videor1")} == {"ok"}
    monkeypatch.setattr(packages.platform, "python_version", lambda: "3.7.1")
    assert by_name(packages.versions())["python"].status == "broken"
    assert ", outside of >=3.11" in by_name(packages.versions())["python"].value


def test_ranges_are_those_of_the_installed_package_or_of_the_checkout(tmp_path: Path, monkeypatch: Patch) -> None:
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

    def not_there(name: str) -> None:
        raise packages.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "metadata", not_there)
    wanted = packages.declared()  # by the checkout
    assert (wanted.version, wanted.python) == (PROJECT["version"], PROJECT["requires-python"])
    assert {r.name for r in wanted.needed} >= {"torch", "transformers", "av"}
    assert set(wanted.extras) == set(PROJECT["optional-dependencies"])


def test_extras_and_the_line_that_adds_each(monkeypatch: Patch) -> None:
    versions = {"wandb": "0.20", "liger-kernel": "0.1.0", "flash-attn": "2.8.0", "pyarrow": "21.0"}
    monkeypatch.setattr(packages, "installed", versions.get)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    rows = by_name(packages.extras())
    assert list(rows) == [extra for extra in PROJECT["optional-dependencies"] if extra not in packages.DEVELOPMENT]
    assert rows["wandb"] == Finding("wandb", "wandb 0.20", "ok")
    assert (rows["trackio"].status, rows["trackio"].fix) == ("absent", 'pip install -e ".[trackio]" (in the clone)')
    for name, words in (("liger", "outside of liger-kernel"), ("flash-attn", "does not load")):
        assert (rows[name].status, words in rows[name].value) == ("warning", True)
    assert rows["stream"].value == "datasets not installed (pyarrow 21.0 is)"


def test_compilers_that_are_missing_fail_or_are_turned_off(monkeypatch: Patch, tmp_path: Path) -> None:
    fake = fake_command(tmp_path, "broken-c++", "echo 'error: no licence' >&2\nexit 3")
    for name, value in {"CXX": shlex.quote(str(fake)), "XDG_CACHE_HOME": tmp_path, "CUDA_HOME": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    rows = by_name(tools.compilers())
    assert (rows["C++"].status, "which does not run" in rows["C++"].value) == ("warning", True)
    assert "exit status 3 (error: no licence)" in rows["operators"].value
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX")
    rows = by_name(tools.compilers())
    assert rows["C++"] == Finding("C++", "no C++ compiler (c++, g++, clang++, CXX)", "warning", tools.GET_CXX)
    assert rows["nvcc"].status == "absent"  # no GPU here: nothing to fix
    for name in ("prefix_attention", "decode_attention", "operators"):
        assert rows[name].status == "warning"
        assert all(words in rows[name].value for words in ("plain torch does it", "no C++ compiler"))
    assert not [problem for problem in problems([Section("Compilers", tuple(rows.values()))]) if problem.needed]
    monkeypatch.setenv("VIDEOR1_NATIVE", "0")
    rows = by_name(tools.compilers())
    assert rows["operators"].status == rows["decode_attention"].status == "info"  # no problem
    assert "VIDEOR1_NATIVE=0 turns it off" in rows["operators"].value


def test_decoders_here_and_those_that_are_missing_or_do_not_load(monkeypatch: Patch) -> None:
    known = importlib.import_module

    def import_module(name: str) -> ModuleType:
        if name == "torchcodec.decoders":
            raise ModuleNotFoundError("No module named 'torchcodec'", name="torchcodec")
        if name == "PyNvVideoCodec":
            raise OSError("libcuda.so.1: cannot open shared object file")
        return known(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    rows = by_name(tools.decoders())
    assert "FFmpeg" in rows["pyav"].value
    assert {"pyav-nvdec", "decord", "torchcodec", "pynvvideocodec"} < set(rows)
    assert rows["auto, video.device cpu"].value.startswith("pyav on the CPU (the frames are wanted on cpu)")
    assert rows["torchcodec"].status == "absent"
    assert 'pip install -e ".[torchcodec]" (in the clone)' in rows["torchcodec"].value
    assert rows["pynvvideocodec"].status == "warning"
    assert "installed but does not load (libcuda.so.1" in rows["pynvvideocodec"].value
    assert "pyav" in rows["pynvvideocodec"].fix


def test_every_public_operation_is_listed_and_checked() -> None:
    ops, rows = tools.operations(), by_name(tools.kernels())
    assert set(ops) == set(dispatch._registry) & set(videor1_kernels.__all__) == set(selfcheck.CASES)
    for op in ops:
        assert rows[op].value == f"{videor1_kernels.chosen_backend(op, dtype=torch.float32)} (float32 on cpu)"


@pytest.mark.parametrize(
    ("build", "hidden", "what", "fix"),
    [
        (None, None, "is built without CUDA", "pytorch.org"),
        ("13.0", "", "hidden by CUDA_VISIBLE_DEVICES=''", "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", None, "built for CUDA 13.0 cannot use it", "update the driver"),
    ],
)
def test_a_gpu_that_torch_does_not_use(
    build: str | None, hidden: str | None, what: str, fix: str, monkeypatch: Patch, tmp_path: Path
) -> None:
    fake_command(tmp_path, "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 535.104'")
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
    fake_command(tmp_path, "nvidia-smi", "exit 9")  # as on a machine without a card
    (row,) = machine.gpus()
    assert (row.status, "everything runs on the CPU" in row.value) == ("info", True)


def test_a_gpu(fake_gpu: SimpleNamespace, monkeypatch: Patch) -> None:
    rows = by_name(machine.gpus())
    assert "580.95" in rows["driver"].value
    value = "NVIDIA H200, compute capability 9.0, bf16, 140.0 GiB of memory, 130.0 GiB free"
    assert rows["cuda:0"] == Finding("cuda:0", value, "ok")
    taken = by_name(tools.kernels())
    assert taken["linear_grpo_loss"].value == "triton (bfloat16 on cuda)"
    assert taken["frames_to_patches"].value == "native (bfloat16 on cuda)"
    assert len([row for row in tools.decoders() if row.name == "auto, video.device cuda"]) == 2
    fake_gpu.memory[0] = 1 << 20
    assert machine.gpus()[1].status == "warning"
    fake_gpu.memory[0], fake_gpu.card.major = 100 << 30, 7
    assert (machine.gpus()[1].status, "no bf16" in machine.gpus()[1].value) == ("warning", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert by_name(packages.environment())["TRITON_INTERPRET"].status == "warning"
    # Operations that cannot run on it are broken; those that need an optional package say which.
    rows = by_name(selfcheck.operation_rows())
    lacking = {name: row for name, row in rows.items() if row.status == "absent"}
    assert all('pip install -e ".[fla]"' in row.value for row in lacking.values())
    assert set(lacking) == {"prefix_gated_delta", "prefix_causal_conv"}
    broken = [row for name, row in rows.items() if name not in lacking]
    assert {row.status for row in broken} == {"broken"}
    assert all(row.fix for row in broken)


def test_every_kernel_is_launched(monkeypatch: Patch) -> None:
    """By the check of operations, were this a card; here the interpreter's launches are counted."""
    launched = set()
    run = interpreter.GridExecutor.__call__

    def count(self: Any, *args: Any, **options: Any) -> Any:
        launched.add(f"{self.fn.__module__}.{self.fn.__name__}")
        return run(self, *args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", count)
    for op, case in selfcheck.CASES.items():
        if videor1_kernels.backends(op).get("triton", "none") is None:
            case(lambda x: x.to(torch.float16), "triton")
    assert launched == set(kernel_names(Path(videor1_kernels.__file__).parent, "videor1_kernels"))


def test_an_operation_that_falls_back_on_a_gpu_says_why(fake_gpu: SimpleNamespace, monkeypatch: Patch) -> None:
    """As where nvcc is newer than the driver: the library loads, and its first launch fails."""

    def launch(device: torch.device) -> None:
        raise extension.Unavailable("its code does not run on cuda (unsupported toolchain); is nvcc newer")

    monkeypatch.setattr(native, "_launch", launch)
    native._failure.cache_clear()
    try:
        row = by_name(tools.kernels())["frames_to_patches"]
    finally:
        native._failure.cache_clear()
    assert row.status == "warning"
    assert "reference (bfloat16 on cuda)" in row.value
    assert "native: its code does not run on cuda (unsupported toolchain); is nvcc newer" in row.value
    assert "CUDA toolkit" in row.fix


def test_a_gpu_without_compilers(fake_gpu: SimpleNamespace, monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    rows = by_name(tools.compilers())
    assert (rows["nvcc"].status, "CUDA toolkit" in rows["nvcc"].fix) == ("warning", True)
    assert rows["C for Triton"].status == "broken"  # Triton compiles a launcher for each kernel
    assert rows["operators, cuda"].status == "ok"
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "CC=no-such-compiler is not found" in by_name(tools.compilers())["C for Triton"].value


LOGP_IS_OFF = "broken (reference on cpu): logp is off by up to "


def one_of_six(value: float) -> torch.Tensor:
    return torch.tensor([0.0, 0, value, 0, 0, 0])


@pytest.mark.parametrize(
    ("op", "wrong", "words"),
    [
        ("linear_logprob", lambda logp, rest: (logp + one_of_six(0.01), rest), LOGP_IS_OFF),
        ("linear_logprob", lambda logp, rest: (logp + one_of_six(math.nan), rest), LOGP_IS_OFF),
        ("sample_tokens", lambda tokens, logp: (tokens + 1, logp), "tokens are other ones"),
    ],
)
def test_an_operation_with_wrong_results_is_broken(op: str, wrong: Any, words: str, monkeypatch: Patch) -> None:
    right = getattr(videor1_kernels, op)

    def off(given: torch.Tensor, *args: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        results = right(given, *args, **options)
        return results if given.dtype == torch.float64 else wrong(*results)

    monkeypatch.setattr(videor1_kernels, op, off)
    rows = by_name(selfcheck.operation_rows())
    assert (rows[op].status, words in rows[op].value) == ("broken", True)
    assert {row.status for name, row in rows.items() if name != op} == {"ok"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_patches_of_every_family_are_cut(model_type: str, monkeypatch: Patch) -> None:
    """One level more in one channel is let through, two are not."""
    right, rules = videor1_kernels.frames_to_patches, FAMILIES[model_type].frames

    def off(*args: Any, dtype: torch.dtype, **options: Any) -> torch.Tensor:
        patches = right(*args, dtype=dtype, **options)
        moved = dtype != torch.float64 and options.get("patch_size") == rules.patch_size
        return patches + moved * levels / (255 * min(rules.std))

    monkeypatch.setattr(videor1_kernels, "frames_to_patches", off)
    levels = 0.0
    assert by_name(selfcheck.operation_rows())["frames_to_patches"].status == "ok"
    levels = 2.0
    row = by_name(selfcheck.operation_rows())["frames_to_patches"]
    assert (row.status, f"patches of {rules.name} is off by up to " in row.value) == ("broken", True), row


def test_clips_that_do_not_decode_or_cannot_be_made(monkeypatch: Patch) -> None:
    right = videor1.video.read_frames

    def reverse(path: Path, **options: float) -> SimpleNamespace:
        if "av1" in path.name:
            raise SampleError("decode", "no such decoder", path)
        clip = right(path, **options)  # type: ignore[arg-type]
        return SimpleNamespace(frames=clip.frames.flip(0), backend=clip.backend)  # type: ignore[union-attr]

    monkeypatch.setattr(videor1.video, "read_frames", reverse)
    monkeypatch.setitem(selfcheck.CODECS, "vp9", "no_such_encoder")
    rows = by_name(selfcheck.decode_rows())
    for codec, status, words in (
        ("h264", "broken", "came back as [2"),
        ("av1", "warning", "SampleError"),
        ("vp9", "info", "not tried: this PyAV has no no_such_encoder to make a clip with"),
    ):
        assert (rows[f"decode {codec}"].status, words in rows[f"decode {codec}"].value) == (status, True)


def test_little_shared_memory_and_a_full_disk(monkeypatch: Patch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(64 << 20, 64 << 20, 1000))
    rows = by_name(machine.machine())
    if Path("/dev/shm").is_dir():
        assert (rows["/dev/shm"].status, "--shm-size" in rows["/dev/shm"].fix) == ("broken", True)
    assert {rows[name].status for name in ("run folder", "cache", "temporary")} == {"warning"}
    assert "--output_dir" in rows["run folder"].fix


def test_secrets_and_the_home_folder_are_not_shown(monkeypatch: Patch, tmp_path: Path) -> None:
    home = tmp_path / "somebody"
    for name, value in {"HF_TOKEN": "hf_very_secret", "HF_HOME": home / "models", "HOME": home}.items():
        monkeypatch.setenv(name, str(value))
    rows = packages.environment()
    assert by_name(rows)["HF_TOKEN"].value == "set (not shown)"
    shown = text(redact_home([Section("Environment", tuple(rows))]))
    assert "~/models" in shown
    assert not [words for words in ("somebody", "very_secret") if words in shown]
    monkeypatch.delenv("HOME")  # as of a user whom the machine does not know
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert redact_home([Section("Environment", tuple(rows))]) == [Section("Environment", tuple(rows))]


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("absent", 0), ("warning", 0), ("broken", 1)])
def test_exit_codes(status: Any, code: int, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    row = Finding("thing", "of some kind", status, "get another")
    monkeypatch.setattr(doctor, "SECTIONS", {"Things": lambda: [row]})
    assert doctor.main([]) == code
    shown = capsys.readouterr().out
    assert ("-> get another" in shown) == (status in ("warning", "broken"))
    assert ("Training can run" in shown) == (code == 0)
    assert doctor.main(["--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert (report["ready"], report["sections"]) == (code == 0, {"Things": [vars(row)]})
    assert len(report["problems"]) == (status in ("warning", "broken"))


def test_a_section_that_fails_is_a_row(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> list[Finding]:
        raise RuntimeError("the card fell off the bus")

    monkeypatch.setattr(doctor, "SECTIONS", {"GPU": fails, "Machine": lambda: [Finding("memory", "plenty")]})
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert "cannot be looked at: RuntimeError: the card fell off the bus" in shown
    assert "plenty" in shown
    monkeypatch.setattr(doctor, "SECTIONS", {doctor.SELF_CHECK: fails})
    assert doctor.main([]) == 1
    with pytest.raises(SystemExit):
        doctor.main(["--jsno"])
    assert "--jsno" in capsys.readouterr().err


def test_the_text_is_aligned_and_wrapped_and_names_what_training_needs_first() -> None:
    rows = (Finding("a", "x", "ok"), Finding("long name", "word " * 60, "warning", "mend"))
    rows += (Finding("c", "gone", "absent", "get it"), Finding("d", "lost", "broken", "find it"))
    assert [(p.name, p.needed) for p in problems([Section("Things", rows)])] == [("d", True), ("long name", False)]
    lines = text([Section("Things", rows)]).splitlines()
    assert lines[:2] == ["Things", "  ok  a          x"]
    assert lines[2].startswith("   !  long name  word word")
    assert max(map(len, lines)) <= 110
    assert "   -  c          gone: get it" in lines
    assert "1 of what it needs is broken" in " ".join(lines)
    assert lines[-1] == "      -> mend"
