"""The JSON file of a run: the machine, the versions, the commit, the ceilings and the rows."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Measurement
from benchmarks.measure import Ceilings
from videor1.atomic import write_atomic

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("triton", "liger-kernel", "trl", "cut-cross-entropy", "transformers", "pytest-benchmark")
REQUIRED = (
    "schema",
    "part",
    "card",
    "driver",
    "cuda",
    "python",
    "torch",
    "packages",
    "commit",
    "dirty",
    "date",
    "tests",
    "complete",
    "ceilings",
    "rows",
)


@dataclass
class Record:
    """One run of one part on one device."""

    part: str
    device: torch.device
    ceilings: Ceilings
    expected_rows: int  # of the whole part: a run of fewer says that it is not complete
    tests: str = "not run"  # of tests/kernels, just before on the same machine: passed, failed or not run
    rows: list[Measurement] = field(default_factory=list)
    card: str = field(init=False)  # with the number of torch's threads now

    def __post_init__(self) -> None:
        self.card = card_name(self.device)

    @property
    def path(self) -> str:
        """File name: the card's name and the part."""
        return file_name(self.device, self.card, self.part)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "part": self.part,
            **surroundings(self.device, self.card),
            "tests": self.tests,
            "complete": len(self.rows) >= self.expected_rows,
            "ceilings": self.ceilings.to_json(),
            "rows": [row.to_json() for row in self.rows],
        }

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / self.path
        write_atomic(target, json.dumps(self.to_json(), indent=1) + "\n")
        return target


def load(path: Path) -> dict[str, Any]:
    """A record from its file. ValueError for one that is not such a file, or lacks a field."""
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: expected the JSON of a benchmark run, got text that does not parse") from error
    absent = [key for key in REQUIRED if key not in data] if isinstance(data, dict) else list(REQUIRED)
    if absent:
        raise ValueError(f"{path.name}: expected the fields of a benchmark run, but it has no {', '.join(absent)}")
    if data["schema"] != SCHEMA:
        raise ValueError(f"{path.name}: expected schema {SCHEMA}, got {data['schema']!r}; record the run again")
    return data


def file_name(device: torch.device, card: str, part: str) -> str:
    """The card's name and the part."""
    name = "cpu" if device.type == "cpu" else card.lower()
    return f"{re.sub('[^a-z0-9]+', '-', name).strip('-')}-{part}.json"


def surroundings(device: torch.device, card: str) -> dict[str, Any]:
    """What a result was found on and with, and when."""
    commit, dirty = revision()
    return {
        "card": card,
        "driver": driver(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": versions(),
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def card_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    match = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    model = match[1].strip() if match else platform.processor() or platform.machine()
    count = torch.get_num_threads()
    return f"CPU: {model}, {count} thread{'s' * (count != 1)}"


@functools.cache
def driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(command) or None


@functools.cache
def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def revision() -> tuple[str | None, bool | None]:
    """(commit, whether the working tree differs from it). Where there is no repository, the environment variable
    BENCH_COMMIT names the commit, with ``-dirty`` behind it if the tree differed; else (None, None)."""
    root = Path(__file__).parent.parent
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    if commit:
        return commit, bool(_output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"]))
    given = os.environ.get("BENCH_COMMIT")
    return (given.removesuffix("-dirty"), given.endswith("-dirty")) if given else (None, None)


def failures(rows: Sequence[Measurement]) -> list[Measurement]:
    return [row for row in rows if row.status == "failed"]


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.strip().splitlines()), "")
