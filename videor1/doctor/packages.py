"""Compare installed packages with the ranges that videor1 declares, and list its extras and environment variables.

The ranges come from the installed distribution, or from the checkout's ``pyproject.toml`` if videor1 is not installed,
so that there is no second list to maintain.
"""

from __future__ import annotations

import importlib
import os
import platform
import tomllib
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from videor1.doctor.rows import Finding
from videor1.errors import install

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

FIRST = ("torch", "triton", "transformers")
DEVELOPMENT = ("test", "bench", "lint")  # extras for work on videor1 itself
# These are compiled against one version of torch and may fail to load although they are installed.
IMPORTED = {"flash-attn": "flash_attn"}
REPORTED = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "VIDEOR1_NATIVE",
    "XDG_CACHE_HOME",
    "CXX",
    "CC",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "WANDB_PROJECT",
    "TRACKIO_PROJECT",
)
SECRET = ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY")  # reported as set, never with their values


@dataclass
class Declared:
    """The requirements that videor1 declares, as far as they apply to this machine."""

    source: str  # where the requirements were read from, in words
    version: str  # of videor1
    python: str  # the supported range of Python
    needed: list[Requirement] = field(default_factory=list)
    extras: dict[str, list[Requirement]] = field(default_factory=dict)  # by the name of the extra


def declared() -> Declared:
    """Return the requirements of the installed distribution, or of the checkout if there is none.

    Raises:
        FileNotFoundError: videor1 is not installed and there is no ``pyproject.toml``.
    """
    from packaging.requirements import Requirement

    try:
        about = metadata.metadata("videor1")
    except metadata.PackageNotFoundError:
        return _declared_by_checkout()
    made = Declared("the installed package's metadata", about["Version"], about["Requires-Python"] or "")
    made.extras = {extra: [] for extra in about.get_all("Provides-Extra") or []}
    for requirement in map(Requirement, metadata.requires("videor1") or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            made.needed.append(requirement)
            continue
        for extra, members in made.extras.items():
            if requirement.marker.evaluate({"extra": extra}):
                members.append(requirement)
    return made


def _declared_by_checkout() -> Declared:
    from packaging.requirements import Requirement

    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if not path.is_file():
        raise FileNotFoundError(f"videor1 is not installed, and there is no {path}: its requirements are not known")
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]

    def applicable(lines: list[str]) -> list[Requirement]:
        found = [Requirement(line) for line in lines]
        return [requirement for requirement in found if requirement.marker is None or requirement.marker.evaluate()]

    source = "pyproject.toml (videor1 is not installed)"
    made = Declared(source, project["version"], project["requires-python"])
    made.needed = applicable(project["dependencies"])
    made.extras = {extra: applicable(lines) for extra, lines in project.get("optional-dependencies", {}).items()}
    return made


def versions() -> list[Finding]:
    """List videor1, Python, and every package that training needs."""
    needs = declared()
    rows = [Finding("videor1", f"{needs.version}; ranges from {needs.source}"), _python(needs.python)]
    order = {name: place for place, name in enumerate(FIRST)}
    for requirement in sorted(needs.needed, key=lambda r: (order.get(r.name.lower(), len(order)), r.name.lower())):
        rows.append(_needed(requirement))
    return rows


def _python(supported: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    allowed = SpecifierSet(supported)
    shown = _range(allowed)
    running = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if allowed.contains(platform.python_version(), prereleases=True):
        return Finding("python", f"{running} (supported: {shown})", "ok")
    return Finding("python", f"{running}, outside of {shown}", "broken", f"make an environment with a Python {shown}")


def _needed(requirement: Requirement) -> Finding:
    name = requirement.name
    supported = _range(requirement.specifier)
    found = installed(name)
    fix = f"pip install '{name}{supported}'"
    if found is None:
        return Finding(name, f"not installed (supported: {supported})", "broken", fix)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(name, f"{found}, outside of {supported}", "broken", fix)
    build = f", {_torch_build()}" if name == "torch" else ""
    return Finding(name, f"{found}{build} (supported: {supported})", "ok")


def _range(specifiers: SpecifierSet) -> str:
    return ",".join(sorted(map(str, specifiers), reverse=True))  # The reverse order puts ">=" before "<".


def installed(name: str) -> str | None:
    """Return the version of a distribution, or None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch_build() -> str:
    try:
        import torch
    except Exception as error:  # torch is installed and does not load; the self-check reports this as well.
        return f"which does not load ({error})"
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip else "built for the CPU"


def extras() -> list[Finding]:
    """List the optional packages with the command that installs each."""
    return [
        _extra(extra, members, install(extra))
        for extra, members in declared().extras.items()
        if extra not in DEVELOPMENT
    ]


def _extra(extra: str, members: list[Requirement], fix: str) -> Finding:
    if not members:
        return Finding(extra, "not for this system", "absent")
    found = {member.name: installed(member.name) for member in members}
    present = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    missing = [name for name, version in found.items() if version is None]
    if missing:
        but = f" ({present} is)" if present else ""
        return Finding(extra, f"{', '.join(missing)} not installed{but}", "absent", fix)
    outside = [m for m in members if not m.specifier.contains(found[m.name] or "", prereleases=True)]
    if outside:
        return Finding(extra, f"{present}, outside of {', '.join(map(str, outside))}", "warning", fix)
    if extra in IMPORTED:
        try:
            importlib.import_module(IMPORTED[extra])
        except Exception as error:  # an ImportError, or the error of a missing shared library
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return Finding(extra, f"{present} does not load: {reason}", "warning", f"build it for this torch: {fix}")
    return Finding(extra, present, "ok")


def environment() -> list[Finding]:
    """List the environment variables that affect a run. Keys and tokens are reported only as set."""
    rows = [_variable(name, os.environ[name]) for name in REPORTED if os.environ.get(name)]
    rows += [Finding(name, "set (not shown)") for name in SECRET if os.environ.get(name)]
    return rows or [Finding("none", "none of those that change what runs is set")]


def _variable(name: str, value: str) -> Finding:
    if name == "TRITON_INTERPRET" and _on_gpu():
        return Finding(name, f"{value}: kernels are interpreted, not compiled", "warning", "unset TRITON_INTERPRET")
    return Finding(name, value)


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
