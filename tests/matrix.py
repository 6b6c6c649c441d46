"""Runs the tests under other instruction sets, threads, orders and versions, and prints a table.

From the repository's root, in an environment with ``pip install -e ".[test]"``:

    python -m tests.matrix --list
    python -m tests.matrix --numeric                           # every cell, on the tests that rounding can reach
    python -m tests.matrix --only aten-default,shuffled        # two cells, the whole suite
    python -m tests.matrix --only two-threads -- tests/kernels -x

What each cell is for, and what was measured: docs/develop/testing.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def files(pattern: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{pattern.format(name)}.py" for name in " ".join(names).split())


# Tests whose results are sums in floating point: what another BLAS path may round otherwise. Triton's are not among
# them: its interpreter computes with numpy, element by element.
NUMERIC_KERNELS = files(
    "kernels/test_{}",
    "add_rms_norm frames_to_patches group_advantage grpo_loss integration_liger integration_openrlhf",
    "integration_transformers integration_trl integration_verl linear_grpo_loss linear_logprob linear_logprob_tiles",
    "prefix_attention prefix_causal_conv prefix_decode_attention prefix_gated_delta prefix_layout rotary_append",
    "output_gates sample_tokens selective_log_softmax silu_mul",
)
NUMERIC = NUMERIC_KERNELS + files(
    "{}",
    "model/test_libraries model/test_lm rewards/test_advantages rewards/test_judge rollout/local/test_answers",
    "training/test_checkpoint training/test_optim training/test_passes training/test_rows training/test_sft",
    "training/test_shared_prefix video/test_patches",
)
MODEL = files(
    "{}",
    "evaluation/test_lmms_eval kernels/test_integration_transformers model/test_libraries model/test_lm",
    "model/test_position_rule model/test_positions model/test_prompts rollout/local/test_answers",
    "rollout/local/test_engine training/test_checkpoint training/test_passes training/test_sft",
    "training/test_shared_prefix",
)
VIDEO = (
    "tests/video",
    *files("{}", "data/test_prefetch data/test_prefetch_cache demo/test_assets test_bad_input test_real_videos"),
    *files("kernels/test_{}", "frames_to_patches native_frames"),
)
ARRAYS = VIDEO + files(
    "{}",
    "evaluation/test_intervals report/test_charts report/test_curves report/test_report rewards/test_scoring",
    "training/test_sft kernels/test_grpo_loss kernels/test_group_advantage kernels/test_prefix_decode_attention",
    "kernels/test_triton_prefix_decode kernels/test_sample_tokens kernels/test_triton_sample_tokens",
)
COMPILED = files("kernels/test_{}", "compile_targets grpo_loss group_advantage")
LOWEST = ("tests/video/decoders", *files("video/test_{}", "reading orientation still"))


def lowest_versions() -> tuple[str, ...]:
    """What ``.ci/lowest.txt`` pins, without torch and triton: gigabytes, which come from the environment beneath."""
    lines = (ROOT / ".ci" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    return tuple(pin for pin in pins if pin.partition("==")[0] not in ("torch", "triton"))


@dataclass(frozen=True)
class Cell:
    """One environment for the tests."""

    why: str  # what it stands for
    variables: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()  # of pytest
    packages: tuple[str, ...] = ()  # pinned, in a virtual environment that sees the current one beneath them
    files: tuple[str, ...] = ()  # the tests that touch these packages, run unless others are asked for
    steps: int = 0  # of the demonstration, to train after the tests


CELLS = {
    "default": Cell("the machine as it is"),
    "onednn-avx2": Cell("oneDNN's products without AVX-512", {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "onednn-avx512": Cell("oneDNN's products with AVX-512 and without its bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "aten-default": Cell("torch's own operators without vector instructions", {"ATEN_CPU_CAPABILITY": "default"}),
    "aten-avx2": Cell("torch's own operators with AVX2 at most", {"ATEN_CPU_CAPABILITY": "avx2"}),
    "mkl-compatible": Cell("MKL's oldest code path, equal on all CPUs", {"MKL_CBWR": "COMPATIBLE"}),
    "two-threads": Cell("sums split over two threads", {"VIDEOR1_TEST_THREADS": "2"}),
    "shuffled": Cell("tests in a random order, of random files", arguments=("--random-order",)),
    "transformers-low": Cell("the lowest transformers", packages=("transformers==5.17.*",), files=MODEL),
    "av-low": Cell("the lowest PyAV", packages=("av==16.0.*",), files=VIDEO),
    # The newest pyarrow wants a newer numpy.
    "numpy-low": Cell("the lowest numpy", packages=("numpy==1.26.*", "pyarrow==21.*"), files=ARRAYS),
    "triton-low": Cell("the lowest Triton", packages=("triton==3.6.*",), files=COMPILED),
    "lowest": Cell("the lowest of everything but torch and triton", packages=lowest_versions(), files=LOWEST, steps=2),
}


@dataclass(frozen=True)
class Result:
    """What pytest counted in one cell; ``broken`` where it could not run."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    broken: str = ""


def make_venv(folder: Path, packages: Sequence[str]) -> Path:
    """A virtual environment in which ``packages`` hide those of the current one; -> its python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    beneath = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    lines = [f"import site; site.addsitedir({path!r})" for path in sorted(beneath)]
    (Path(own) / "beneath.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Of what they depend on, pip installs what the environment beneath lacks or has in too high a version.
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def run_cell(name: str, cell: Cell, arguments: Sequence[str], work: Path) -> Result:
    """pytest in the cell's environment; its output goes to the terminal."""
    began = time.monotonic()
    try:
        python = make_venv(work / name, cell.packages) if cell.packages else sys.executable
    except subprocess.CalledProcessError as error:
        return Result(name, seconds=time.monotonic() - began, broken=f"no environment: {error}")
    counts = work / f"{name}.xml"
    command = [str(python), "-m", "pytest", f"--junitxml={counts}", *cell.arguments, *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    print(f"\n== {name}: {cell.why}\n{' '.join(command)}", flush=True)
    environment = os.environ | cell.variables | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment)
    trained = 0
    if cell.steps:
        demo = f"-m videor1.train --disable_tqdm true --max_steps {cell.steps} --eval_steps {cell.steps}".split()
        trained = subprocess.run([python, *demo, "--output_dir", work / name], cwd=ROOT, env=environment).returncode
    seconds = time.monotonic() - began
    if not counts.exists():
        return Result(name, seconds=seconds, broken=f"pytest ended with {done.returncode} and counted nothing")
    result = read_counts(name, counts, seconds, done.returncode)
    return replace(result, broken=f"the demonstration ended with {trained}") if trained else result


def read_counts(name: str, path: Path, seconds: float, status: int) -> Result:
    """Of pytest's JUnit file; an error outside a test counts as a failure."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    tests, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    broken = f"pytest ended with {status}" if status not in (0, 1) or (status and not failed) else ""
    return Result(name, max(0, tests - failed - skipped), failed, skipped, seconds, broken)


def table(results: Sequence[Result]) -> str:
    """One line a cell."""
    lines = [f"{'cell':18}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    for row in results:
        counts = f"{row.passed:8}{row.failed:8}{row.skipped:9}{row.seconds:9.0f}"
        lines.append(f"{row.name:18}{counts}" + (f"  {row.broken}" if row.broken else ""))
    return "\n".join(lines)


def machine() -> str:
    """What the numbers hold for."""
    import torch

    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{versions}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {platform.machine()}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the cells and end")
    parser.add_argument("--only", metavar="NAME,NAME", help="these cells (default: all)")
    parser.add_argument("--numeric", action="store_true", help="only the tests that rounding can reach")
    parser.add_argument("arguments", nargs="*", metavar="-- PYTEST ARGS", help="tests and options of pytest")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(f"{name:18}{cell.why}" for name, cell in CELLS.items()))
        return 0
    names = options.only.split(",") if options.only else list(CELLS)
    if unknown := [name for name in names if name not in CELLS]:
        parser.error(f"--only: expected some of {', '.join(CELLS)}, got {', '.join(unknown)}")
    results = []
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            cell = CELLS[name]
            chosen = any((ROOT / argument.partition("::")[0]).exists() for argument in options.arguments)
            files = () if chosen else NUMERIC if options.numeric and not cell.files else cell.files
            results.append(run_cell(name, cell, [*files, *options.arguments], Path(work)))
    print(f"\n{machine()}\n{table(results)}")
    return int(any(row.failed or row.broken for row in results))


if __name__ == "__main__":
    sys.exit(main())
