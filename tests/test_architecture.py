"""What holds for the repository as a whole: who imports whom, how long a file may be, and what no file may name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("videor1", "videor1_kernels")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FOLDERS = (*PACKAGES, "tests", "csrc", "benchmarks", "examples", ".ci", "docs")
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".sh", ".h", ".cpp", ".cu", ".cfg", ""}
MAX_LINES = 500


def imports(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.add((node.module or "").partition(".")[0])
    return names


def texts() -> list[Path]:
    """Every text file of the repository, made by a run or a build left out."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    made = {"__pycache__", "build", "runs"}
    return sorted(p for p in found if p.suffix in TEXT and not made & set(p.parts) and p.name != ".git")


def test_kernels_never_import_the_trainer() -> None:
    for path in (ROOT / "videor1_kernels").rglob("*.py"):
        assert "videor1" not in imports(path), path


def test_kernels_import_torch_and_triton_only() -> None:
    hosts = {"transformers"}  # of the integrations
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "videor1_kernels"}
    for path in (ROOT / "videor1_kernels").rglob("*.py"):
        extra = imports(path) - allowed - (hosts if path.parent.name == "integrations" else set())
        assert not extra, (path, extra)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        # Imports videor1_kernels itself too.
        ("videor1_kernels.integrations.transformers", ("transformers", "triton", "av", "videor1")),
        ("videor1.config", ("transformers", "torch")),
        ("videor1.data.prefetch", ("transformers", "peft")),  # what a decode worker loads
        ("videor1.video.media", ("transformers", "peft")),
    ],
)
def test_an_import_stays_light(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([n for n in {unwanted!r} if n in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_records_and_options_import_no_stage() -> None:
    for name in ("types", "config/options", "errors", "seeding"):
        tree = ast.parse((ROOT / "videor1" / f"{name}.py").read_text())
        stages = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and "videor1" in (n.module or "")}
        assert stages <= {"videor1.errors", "videor1_kernels.frames_to_patches"}, (name, stages)  # planes


def test_no_file_is_two_ideas_long() -> None:
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert SOURCES
    assert not long


def test_no_file_installs_the_project_from_an_index() -> None:
    """Its name there is not ours: extras are added in the clone, ``errors.install``."""
    index = re.compile(r"pip install [^\n]*videor1\[")
    assert index.search("pip install 'videor1" + "[server]'") is not None
    assert [str(path.relative_to(ROOT)) for path in texts() if index.search(path.read_text(errors="replace"))] == []


def test_no_file_names_a_local_path_or_a_private_host() -> None:
    folders = "|".join(("work", "tmp", "home", "root", "Users", "mnt"))
    private = re.compile(
        rf"(?<![\w.<*)])/(?:{folders})/\w"
        r"|\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2,3}\b"
        r"|https?://[\w.-]+\.(?:internal|local|corp|lan)\b"
    )
    assert private.search("see /" + "work/x") is not None
    assert private.search("http://" + "build.internal/x") is not None
    found = []
    for path in texts():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if match := private.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found
