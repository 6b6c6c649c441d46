"""Work for a prefetcher's workers, and scripts and processes to be watched."""

import collections
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from patience import PATIENCE

from videor1.data.prefetch import Prefetcher
from videor1.errors import ConfigError
from videor1.types import Sample, SampleError
from videor1.video.version import Key


@dataclass(frozen=True)
class Work:
    """What a worker is to do."""

    name: str
    number: int = 0
    path: str = "/data/clip.mp4"


def work(item: Work) -> Any:
    """Runs in a worker."""
    match item.name:
        case "hang":
            time.sleep(1000)
        case "hang in native code":
            collections.deque(itertools.repeat(0), maxlen=0)  # an endless loop in C: Python never sees SIGTERM
        case "exit":
            os._exit(7)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill once":  # the system does so where memory runs out
            with open(item.path, "a+") as log:
                log.write(f"{os.getpid()}\n")
                log.seek(0)
                first = len(log.read().split()) == 1
            if first:
                os.kill(os.getpid(), item.number)
        case "start a program" | "start a program and die":
            program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
            Path(item.path).write_text(f"{os.getpid()} {program.pid}")
            if item.name.endswith("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        case "raise":
            raise KeyError("something")
        case "sys.exit":
            sys.exit(3)
        case "bad":
            raise SampleError("missing_file", "no such file", item.path)
        case "option":
            raise ConfigError("video.backend: no")
        case "slow":
            time.sleep(0.3)
        case "pid":
            return os.getpid(), signal.getsignal(signal.SIGINT), torch.get_num_threads()
        case "write":
            with open(item.path, "a") as file:
                file.write(f"{item.number}\n")
        case "tensor":
            return torch.full((item.number,), 7, dtype=torch.uint8), torch.ones(3, dtype=torch.bfloat16)
    return item.number * item.number


def prefetcher(workers: int = 1, depth: int = 4, timeout: float = PATIENCE, cache_bytes: int = 0) -> Prefetcher:
    return Prefetcher(work, workers=workers, depth=depth, timeout=timeout, cache_bytes=cache_bytes, key=Key)


def results(ahead: Prefetcher, items: Iterable[Any]) -> list[Any]:
    """Of every item its result, or the kind of its error."""
    return [getattr(result, "kind", result) for _, result in ahead.iterate(items)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def wait_for_end(pids: Iterable[int]) -> None:
    wait_until(lambda: not any(map(alive, pids)))


def sample(path: Path | None, data_type: Any = "video", index: int = 0) -> Sample:
    return Sample(index, str(index), "Which?", data_type, "free-form", "<answer>x</answer>", path=path)
