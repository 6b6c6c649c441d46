"""Commands in processes that need not import anything: one process has imported what they need, and forks them.

Decode workers import this file again, so that it imports little by itself.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from patience import PATIENCE

TRAINERS = ["videor1.train", "videor1.sft", "videor1.training.tgrpo", "videor1.training.sft"]
# deepspeed's optimizers bring torch's compiler along, which takes seconds.
RANKS = ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "videor1.training.distributed.zero", *TRAINERS]
RANKS += ["videor1.report.page", "videor1.report.curves", "matplotlib.pyplot", "videor1.video.decoders.pyav"]


class ForkServer:
    """Runs ``module:function`` on a command line, one after another, with ``log`` for their outputs."""

    def __init__(self, log: Path, modules: list[str], **variables: str) -> None:
        from runs import ENVIRONMENT

        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            env=os.environ | ENVIRONMENT | {"DS_ACCELERATOR": "cpu"} | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, command: str, flags: list[str], world: int = 1) -> list[int]:
        """The process, or its ranks: this process stands for torchrun, with the store through which they meet."""
        from torch.distributed import TCPStore

        environment = {}
        if world > 1:
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port), "WORLD_SIZE": str(world)}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        self.log.unlink(missing_ok=True)
        order = {"command": command, "flags": flags, "log": str(self.log), "environment": environment, "world": world}
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self.wait()

    def wait(self) -> list[int]:
        """The exit codes of what was started."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def run_ranks(self, flags: list[str], command: str = "forks:only_train") -> None:
        self.start(command, flags, world=2)
        codes = self.wait()
        assert codes == [0, 0], self.log.read_text()[-3000:]

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def only_train(argv: list[str]) -> int:
    """``videor1.train`` without its curves and its report."""
    from videor1.config import TrainConfig
    from videor1.config.cli import parse
    from videor1.training.tgrpo import Trainer

    Trainer(parse(TrainConfig, argv, prog="train", description="")).train()
    return 0


def out_of_memory(argv: list[str]) -> int:
    """``videor1.train`` in which rank 1 runs out of memory at its second rollout."""
    import torch

    from videor1.rollout import LocalEngine
    from videor1.train import main

    calls: list[None] = []
    generate = LocalEngine.generate

    def failing(self: LocalEngine, requests: Any) -> Any:
        calls.append(None)
        if os.environ["RANK"] == "1" and len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return generate(self, requests)

    LocalEngine.generate = failing  # type: ignore[method-assign]
    return main(argv)


def counted(argv: list[str]) -> int:
    """``videor1.train``, of which each rank writes into a folder, which comes first, how many numbers of parameters are
    gathered at once, and when."""
    import deepspeed

    from videor1.rollout import LocalEngine

    found = {"copying": 0, "rollout": 0}
    now = {"phase": "", "open": 0}

    class Counting(deepspeed.zero.GatheredParameters):
        def __init__(self, parameters: Any, *args: Any, **options: Any) -> None:
            self.size = sum(p.ds_numel for p in parameters)
            super().__init__(parameters, *args, **options)

        def __enter__(self) -> None:
            now["open"] += self.size
            if now["phase"]:
                found[now["phase"]] = max(found[now["phase"]], now["open"])
            super().__enter__()

        def __exit__(self, *error: Any) -> None:
            now["open"] -= self.size
            super().__exit__(*error)

    def during(phase: str, call: Any) -> Any:
        def inside(engine: LocalEngine, *args: Any) -> Any:
            found[phase], now["phase"] = max(found[phase], now["open"]), phase
            sizes = {"visual": engine.model.visual, "embedding": engine.model.hf.get_input_embeddings()}
            sizes |= {"layer": engine.model.hf.model.language_model.layers[0], "all": engine.model.hf}
            found.update({name: sum(p.ds_numel for p in module.parameters()) for name, module in sizes.items()})
            try:
                return call(engine, *args)
            finally:
                now["phase"] = ""

        return inside

    deepspeed.zero.GatheredParameters = Counting
    LocalEngine.generate = during("rollout", LocalEngine.generate)  # type: ignore[method-assign]
    LocalEngine.weights_changed = during("copying", LocalEngine.weights_changed)  # type: ignore[method-assign]
    only_train(argv[1:])
    Path(argv[0], f"gathered-{os.environ['RANK']}.json").write_text(json.dumps(found))
    return 0


def script(argv: list[str]) -> int:
    """A file run as ``python file`` in a folder, within a number of CPU seconds."""
    path, folder, seconds = argv
    os.chdir(folder)
    sys.argv[:] = [path]
    runpy.run_path(path, run_name="__main__")
    assert time.process_time() < float(seconds)
    return 0


def held(argv: list[str]) -> int:
    """A training command, whose module comes first, that waits for a signal once its first metrics line is written."""
    from videor1.training.loop import Loop

    stopping = Loop._stopping

    def stopping_when_told(self: Loop) -> bool:
        deadline = time.monotonic() + PATIENCE
        while self.step >= self.config.logging_steps and not self._stop and time.monotonic() < deadline:
            time.sleep(0.01)
        return stopping(self)

    Loop._stopping = stopping_when_told  # type: ignore[method-assign]
    return importlib.import_module(argv[0]).main(argv[1:])


def run(order: dict[str, Any], rank: int) -> int:
    """Be the process, or one of the ranks, and write into the log."""
    from videor1.config.cli import run_main

    if order["world"] == 1:
        os.setsid()
        gc.unfreeze()  # or the interpreter ends with things that nothing has freed, which some libraries tell
    else:
        os.environ.update(order["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(file, stream)
    module, _, function = order["command"].partition(":")
    code = 1
    try:
        code = run_main(getattr(importlib.import_module(module), function), order["flags"])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    if order["world"] > 1:
        os._exit(code)  # without what DeepSpeed's threads do at an interpreter's end, which at times is an abort
    return code


def serve(modules: list[str]) -> int:
    """Fork what each line of stdin asks for, and write the ids of the processes, then their exit codes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # no collection in a process walks over what it has from here
    for line in sys.stdin:
        order, pids = json.loads(line), []
        for rank in range(order["world"]):
            pids.append(os.fork())
            if not pids[-1]:
                return run(order, rank)
        print(pids, file=answers, flush=True)
        print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
