"""A release: what the sdist and the wheel hold, and that the wheel works where there is no checkout."""

from __future__ import annotations

import email
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ABOUT = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")
CODE = {"videor1": "videor1", "videor1_kernels": "videor1_kernels", "csrc": "videor1_kernels/csrc"}


def sources() -> dict[str, Path]:
    """What an installation must hold: every file of the packages and of csrc/, by its path there."""
    return {
        f"{place}/{file.relative_to(ROOT / folder).as_posix()}": file
        for folder, place in CODE.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of the sources, and the wheel made of that sdist alone, as ``python -m build`` does."""
    folder = tmp_path_factory.mktemp("release")
    copy = folder / "checkout"  # a build writes beside the sources
    for name in (*CODE, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ABOUT:
        shutil.copy(ROOT / name, copy)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", copy, cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(release: Path) -> Path:
    (path,) = release.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside of the checkout, with an environment ``venv`` that has the wheel. The other packages it takes
    from this environment by a path alone: the .pth files there, an editable installation's among them, do not count."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = json.loads(run(python, "-c", "import json, site; print(json.dumps(site.getsitepackages()))", cwd=folder))
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    installed |= {path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
    Path(site, "this_environment.pth").write_text("\n".join(sorted(installed)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def seen(elsewhere: Path) -> dict[str, Any]:
    names = [path.name for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".cu")]
    assert {"bindings.cpp", "frames_to_patches.cu"} < set(names)
    code = f"""
import contextlib, io, json, runpy, sys

def shown(command, *words):
    sys.argv = [command, *words]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_module(f"videor1.{{command}}", run_name="__main__")
    return out.getvalue()

helps = {{command: shown(command, "--help") for command in ("train", "evaluate", "report", "doctor")}}
heavy = "torch" in sys.modules
recipe = shown("train", "--config", "qwen2_5_vl_7b", "--print_config")
import torch, videor1, videor1.train, videor1_kernels
from videor1_kernels import extension
logp, _ = videor1_kernels.linear_logprob(torch.eye(3, 4), torch.eye(5, 4), torch.tensor([0, 1, 2]))
print(json.dumps({{
    "version": videor1.__version__,
    "packages": [videor1.__file__, videor1.train.__file__, videor1_kernels.__file__],
    "csrc": [str(extension._csrc(name)) for name in {names}],
    "logp": logp.tolist(),
    "helps": helps,
    "heavy": heavy,
    "recipe": recipe,
}}))"""
    return json.loads(run(elsewhere / "venv" / "bin" / "python", "-c", code, cwd=elsewhere))


def test_the_wheel_holds_the_packages_and_csrc_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {name: path.read_bytes() for name, path in sources().items()}
    kinds = {Path(name).suffix for name in held}
    assert {".cpp", ".cu", ".h", ".yaml", ".jinja", ".css", ".js", ".typed", ".py"} == kinds - {""}


def test_the_sdist_holds_what_builds_the_wheel(release: Path) -> None:
    """That the wheel is made of it alone shows in the test above; here, that half of the tests does not come along."""
    (path,) = release.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {*ABOUT, *(file.relative_to(ROOT).as_posix() for file in sources().values())} <= held
    assert not [name for name in held if name.startswith("tests")]


def test_the_version_is_one(wheel: Path, seen: dict[str, Any]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = email.message_from_bytes(archive.read(name))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## \[(\d[^]]*)\]", changes, re.MULTILINE)[0]
    assert {about["Version"], seen["version"], citation["version"], newest} == {PROJECT["version"]}
    assert {about["License-Expression"], citation["license"]} == {PROJECT["license"]}


def test_the_wheel_is_what_is_imported_and_computes(elsewhere: Path, seen: dict[str, Any]) -> None:
    for file in (*seen["packages"], *seen["csrc"]):
        assert Path(file).is_relative_to(elsewhere / "venv"), file
    assert seen["logp"] == pytest.approx([1 - math.log(math.e + 4)] * 3)
    (folder,) = {*seen["csrc"]}  # the sources of the compiled libraries
    headers, there = ({path.name for path in top.rglob("*.h")} for top in (ROOT / "csrc", Path(folder)))
    assert headers == there


def test_commands_and_recipes_are_found(seen: dict[str, Any]) -> None:
    assert not seen["heavy"]  # a help is shown without torch
    for command, shown in seen["helps"].items():
        assert "usage:" in shown.lower(), command
    recipe = yaml.safe_load((ROOT / "videor1" / "configs" / "qwen2_5_vl_7b.yaml").read_text(encoding="utf-8"))
    assert yaml.safe_load(seen["recipe"])["model_name_or_path"] == recipe["model_name_or_path"]
