"""Work for a prefetcher's workers, and scripts and processes to be watched."""

import collections
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

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


def work(item):
    """Runs in a worker."""
    if item.name == "hang":
        time.sleep(1000)
    if item.name == "hang in native code":
        collections.deque(itertools.repeat(0), maxlen=0)  # an endless loop in C: Python never sees SIGTERM
    if item.name == "exit":
        os._exit(7)
    if item.name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if item.name == "kill once":  # the system does so where memory runs out
        log = Path(item.path)
        log.write_text(f"{log.read_text() if log.exists() else ''}{os.getpid()}\n")
        if len(log.read_text().split()) == 1:
            os.kill(os.getpid(), item.number)
    if item.name.startswith("start a program"):
        program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        Path(item.path).write_text(f"{os.getpid()} {program.pid}")
        if item.name == "start a program and die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)
    if item.name == "raise":
        raise KeyError("something")
    if item.name == "sys.exit":
        sys.exit(3)
    if item.name == "bad":
        raise SampleError("missing_file", "no such file", item.path)
    if item.name == "option":
        raise ConfigError("video.backend: no")
    if item.name == "slow":
        time.sleep(0.3)
    if item.name == "pid":
        return os.getpid(), signal.getsignal(signal.SIGINT), torch.get_num_threads()
    if item.name == "write":
        with open(item.path, "a") as file:
            file.write(f"{item.number}\n")
    if item.name == "tensor":
        return torch.full((item.number,), 7, dtype=torch.uint8), torch.ones(3, dtype=torch.bfloat16)
    return item.number * item.number


def prefetcher(workers=1, depth=4, timeout=PATIENCE, cache_bytes=0, key=Key):
    return Prefetcher(work, workers=workers, depth=depth, timeout=timeout, cache_bytes=cache_bytes, key=key)


def run_script(tmp_path, body, **kwargs):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(body))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(script)], text=True, env=environment, **pipes, **kwargs)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def sample(path, data_type="video", index=0):
    return Sample(index, str(index), "Which?", data_type, "free-form", "<answer>x</answer>", path=path)
