"""The examples, run as a user runs them: without network, in a folder of their own."""

from __future__ import annotations

import ast
import io
import os
import re
import resource
import subprocess
import sys
import tokenize
from importlib.util import find_spec
from pathlib import Path

import pytest
from patience import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
CPU_SECONDS = 60  # the docstrings promise 20 on a machine that has nothing else to do


def run_example(name: str, folder: Path) -> str:
    """Its output. It may use one thread, no GPU, and no network."""
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command, env = [sys.executable, EXAMPLES / name], os.environ | variables
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=PATIENCE, env=env)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS
    assert not list(folder.iterdir()), "an example leaves nothing behind"
    return done.stdout


def found(pattern: str, text: str) -> tuple[float, ...]:
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in\n{text}"
    return tuple(map(float, match.groups()))


def code_lines(path: Path) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    source = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_plain_loop(tmp_path: Path) -> None:
    said = run_example("plain_grpo.py", tmp_path)
    before, after = found(r"reward ([\d.]+) -> ([\d.]+); loss on the backend reference", said)
    assert before < 0.15  # of 16 words one is right
    assert after > 0.5
    assert 20 < code_lines(EXAMPLES / "plain_grpo.py") <= 40


def test_shared_prefix_in_transformers(tmp_path: Path) -> None:
    said = run_example("transformers_prefix.py", tmp_path)
    assert "attention videor1_prefix on the backend reference" in said
    packed, repeated, factor = found(
        r"tokens: (\d+) in one packed row, (\d+) in 7 repeated rows \(([\d.]+) times", said
    )
    assert packed == 120 + 90 + (12 + 30 + 7 + 21) + (9 + 25 + 16)
    assert repeated == 7 * (120 + 30)
    assert factor == pytest.approx(repeated / packed, abs=0.05)
    count, logp, gradient = found(
        r"(\d+) log-probabilities: largest difference (\S+) nats; gradients: (\S+) relative", said
    )
    assert count == 120
    assert logp < 1e-5
    assert gradient < 1e-5


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed (extra test)")
def test_trl(tmp_path: Path) -> None:
    said = run_example("trl_grpo.py", tmp_path)
    before, after = found(r"reward ([\d.]+) -> ([\d.]+) in 16 steps of trl.GRPOTrainer", said)
    assert before < 0.3
    assert after > 0.7
    assert "log-probabilities by videor1_kernels.linear_logprob, backend reference" in said


def test_every_example_is_tested_and_stands_alone() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    paths = sorted(EXAMPLES.glob("*.py"))
    assert len(paths) == 3
    for path in paths:
        assert f'"{path.name}"' in here
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert f"python examples/{path.name}" in (ast.get_docstring(tree) or "")
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not {module.partition(".")[0] for module in modules} & {"tests", "tiny", "videor1"}
        assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
