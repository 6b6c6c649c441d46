"""The first minutes on a card, in this order: ``benchmarks/gpu.sh first``, or ``python -m benchmarks.first``.

Each part is a process of its own with its own time limit, and the next runs whatever the last did. Results are written
as they come, into a folder ``first``: ``<card>-first.json`` holds what is known after each part, ``first-<part>.log``
what it printed. With ``--device cpu`` everything runs in small sizes, to rehearse. Ends with 1 if a part failed or ran
out of time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import default_device
from benchmarks.record import RESULTS, card_name, file_name, surroundings
from videor1.atomic import write_atomic

ROOT = Path(__file__).parent.parent
KERNEL_TESTS = ("tests/kernels/test_[glops]*.py", "tests/kernels/test_triton_*.py")  # those that run Triton's kernels


@dataclass(frozen=True)
class Part:
    """One part: its command, given (device, folder of these looks, seconds).

    What the benchmarks record lies in the folder around it, as of their other runs.
    """

    name: str
    what: str
    seconds: int  # its time limit
    command: Callable[[str, Path, int], list[str]]


@dataclass
class Outcome:
    """How a part ended."""

    status: str = "not run"  # passed, failed, out of time
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)  # what it wrote


def _look(name: str) -> Callable[[str, Path, int], list[str]]:
    """A part of ``benchmarks.first_looks``, which writes first-<name>.json."""

    def command(device: str, out: Path, seconds: int) -> list[str]:
        return ["-m", "benchmarks.first_looks", name, "--device", device, "--out", str(out / f"first-{name}.json")]

    return command


def _measured(part: str, *sizes: str) -> Callable[[str, Path, int], list[str]]:
    def command(device: str, out: Path, seconds: int) -> list[str]:
        given = list(sizes) if device == "cuda" else _SMALL[part]
        budget = ["--seconds", str(max(10, seconds - 60))]  # what is begun then still ends within the limit
        return ["-m", "benchmarks.run", part, "--device", device, "--record", str(out.parent), *budget, *given]

    return command


_SMALL = {
    "kernels": ["--only", "tgrpo_advantages"],
    "step": ["--shape", "tiny", "--prompts", "1", "--generations", "2", "--completion", "4", "--frames", "4"],
}


def _tests(device: str, out: Path, seconds: int) -> list[str]:
    """Those of the kernels, on a card compiled in as many processes as there are cores for; here one file."""
    patterns = KERNEL_TESTS if device == "cuda" else ("tests/kernels/test_group_advantage.py",)
    files = [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    count = min(12, len(os.sched_getaffinity(0))) if device == "cuda" else 1
    return ["-m", "pytest", "-q", "-x", "-n", str(count), *files]


PARTS = (
    Part(
        "smoke",
        "versions, ceilings, the patch embedding, three bf16 T-GRPO steps through every kernel",
        60,
        _look("smoke"),
    ),
    Part("memory", "what three rollouts leave behind", 45, _look("memory")),
    Part("tests", "every operation against fp64, in bf16 too", 90, _tests),
    Part("kernels", "the kernels beside ceilings and peers", 120, _measured("kernels")),
    Part("step", "a whole step of the 7B's shapes, and the reference's", 130, _measured("step", "--shape", "7b")),
    Part("trace", "one decode step under the profiler", 35, _look("trace")),
)


def run_part(part: Part, device: str, out: Path, seconds: int) -> Outcome:
    """Run a part, with what it prints in its log; never raises for what it does."""
    command, began = [sys.executable, *part.command(device, out, seconds)], time.monotonic()
    outcome = Outcome()
    with (out / f"first-{part.name}.log").open("w", encoding="utf-8") as log:
        log.write(f"{' '.join(command)}\n")
        log.flush()
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            outcome.status = "failed" if process.wait(seconds) else "passed"
        except subprocess.TimeoutExpired:
            outcome.status = "out of time"
        finally:
            _end(process)
    outcome.seconds = time.monotonic() - began
    found = out / f"first-{part.name}.json"
    if found.exists() and found.stat().st_mtime >= time.time() - outcome.seconds - 1:
        outcome.found = json.loads(found.read_text(encoding="utf-8"))
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it started."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    process.wait()


def record(outcomes: dict[str, Outcome], device: torch.device, out: Path) -> Path:
    """Write what is known so far; return the file."""
    card = card_name(device)
    path = out / file_name(device, card, "first")
    known = surroundings(device, card) | {"parts": {name: asdict(outcome) for name, outcome in outcomes.items()}}
    write_atomic(path, json.dumps(known, indent=1) + "\n")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first", description=(__doc__ or "").partition("\n")[0])
    names = [part.name for part in PARTS]
    parser.add_argument("--only", metavar="PART,PART", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default_device().type)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the parts' time limits")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else names
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--only: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    folder = options.out.resolve() / "first"  # beside what the benchmarks record, which the report reads whole
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    outcomes: dict[str, Outcome] = {}
    for part in PARTS:
        if part.name not in wanted:
            continue
        limit = max(1, round(part.seconds * options.scale))
        print(f"{part.name}: {part.what} (at most {limit} s)", flush=True)
        outcomes[part.name] = outcome = run_part(part, options.device, folder, limit)
        path = record(outcomes, device, folder)
        print(
            f"{part.name}: {outcome.status} in {outcome.seconds:.0f} s; {folder / f'first-{part.name}.log'}", flush=True
        )
        for name, value in outcome.found.items():
            print(f"    {name}: {json.dumps(value)[:200]}", flush=True)
    print(f"Results: {path}")
    return int(any(outcome.status != "passed" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
