"""Commands on two ranks of DeepSpeed's ZeRO, one after another: one process imports what they need, and forks them."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from runs import ENVIRONMENT

from videor1.config.cli import run_main
from videor1.rollout import LocalEngine
from videor1.train import main as train


class RankServer:
    """The process that forks ranks. It stands for torchrun: the store through which they meet lies outside of them."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | ENVIRONMENT | {"DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, flags: list[str], command: str = "videor1.train:main") -> None:
        """Run a command, ``module:function``, on both ranks until it ends well."""
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        order = {"command": command, "flags": flags, "log": str(self.log), "environment": environment}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        codes = json.loads(self.process.stdout.readline())
        assert codes == [0, 0], self.log.read_text()[-3000:]

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def out_of_memory(argv: list[str] | None = None) -> int:
    """``videor1.train`` in which rank 1 runs out of memory at its second rollout."""
    calls: list[None] = []
    generate = LocalEngine.generate

    def failing(self: LocalEngine, requests: Any) -> Any:
        calls.append(None)
        if os.environ["RANK"] == "1" and len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return generate(self, requests)

    LocalEngine.generate = failing  # type: ignore[method-assign]
    return train(argv)


def run_rank(order: dict[str, Any], rank: int) -> NoReturn:
    """Be one rank, which writes into the log."""
    os.environ.update(order["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    module, _, function = order["command"].partition(":")
    code = 1
    try:
        code = run_main(getattr(importlib.import_module(module), function), order["flags"])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # without what DeepSpeed's threads do at an interpreter's end, which at times is an abort


def serve() -> int:
    """Fork the ranks of each line of stdin, and write their exit codes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    import deepspeed  # noqa: F401

    import videor1.training.distributed.zero  # noqa: F401

    for line in sys.stdin:
        order, ranks = json.loads(line), []
        for rank in (0, 1):
            ranks.append(os.fork())
            if not ranks[-1]:
                run_rank(order, rank)
        print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks], file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve())
