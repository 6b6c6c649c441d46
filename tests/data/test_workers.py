"""Workers of the prefetcher that hang, are killed, die idle, cannot start or lose their parent."""

import collections
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forks import ForkServer
from patience import PATIENCE
from prefetchers import Work, alive, prefetcher, results, wait_for_end, wait_until

from videor1.data.workers import WorkerPool


def squares(*numbers: int) -> list[Work]:
    return [Work("square", number) for number in numbers]


def test_a_hang_in_native_code_is_killed() -> None:
    with prefetcher(timeout=1.0) as ahead:
        list(ahead.iterate(squares(1)))  # the worker is up
        assert results(ahead, [Work("hang in native code"), *squares(5)]) == ["timeout", 25]


def test_tensors_cross_as_plain_bytes() -> None:
    with prefetcher(depth=64) as ahead:
        out = results(ahead, [Work("tensor", n) for n in range(200)])
    assert len(os.listdir("/proc/self/fd")) < 150
    for n, (tensor, bf16) in enumerate(out):
        assert (tensor.dtype, tensor.shape) == (torch.uint8, (n,))
        assert not tensor.is_shared()
        assert torch.equal(bf16, torch.ones(3, dtype=torch.bfloat16))
        tensor.fill_(1)  # writable


def test_workers_ignore_ctrl_c_and_use_one_thread_and_leave_nothing_behind() -> None:
    before = threading.active_count()
    with prefetcher(workers=2) as ahead:
        for pid, handler, threads in results(ahead, [Work("pid", n) for n in range(3)]):
            assert pid != os.getpid()
            assert (handler, threads) == (signal.SIG_IGN, 1)
    wait_until(lambda: threading.active_count() <= before)


def never_up(writer: object) -> None:
    time.sleep(1000)


def test_making_it_does_not_wait_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("videor1.data.workers._init_worker", never_up)
    ahead = prefetcher(workers=2)
    ahead.close()
    ahead.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(ahead.iterate(squares(0)))


def test_close_kills_what_runs() -> None:
    ahead = prefetcher(workers=2, depth=3)
    pids = {next(ahead.iterate([Work("pid", n)]))[1][0] for n in range(8)}
    stream = ahead.iterate([*squares(1), Work("hang", 1), Work("hang", 2), Work("hang", 3)])
    next(stream)
    ahead.close()
    wait_for_end(pids)
    stream.close()


def test_a_worker_killed_while_idle_costs_nothing() -> None:
    with prefetcher(depth=2) as ahead:
        ((pid, _, _),) = results(ahead, [Work("pid")])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid))
        time.sleep(0.3)  # let the pool notice
        assert results(ahead, squares(*range(5))) == [0, 1, 4, 9, 16]
        assert not ahead.stats.errors


def test_a_worker_stopped_dead_while_it_holds_the_pipe_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    # SIGSTOP of an idle worker stands for one that was killed inside the pool's locks: no reply ever comes.
    monkeypatch.setattr(WorkerPool, "stall_seconds", 1.0)
    with prefetcher(timeout=1.0) as ahead:
        ((pid, _, _),) = results(ahead, [Work("pid")])
        os.kill(pid, signal.SIGSTOP)
        assert results(ahead, squares(*range(3))) == [0, 1, 4]
        assert ahead.stats.restarts == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_from_outside_costs_one_more_try(number: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with prefetcher(workers=2) as ahead:
        assert results(ahead, [*squares(2), Work("kill once", number, str(log)), *squares(3)]) == [4, number**2, 9]
        assert len(set(log.read_text().split())) == 2, "two workers had it"
        assert (ahead.stats.retries, ahead.stats.worker_deaths, dict(ahead.stats.errors)) == (1, 1, {})


@pytest.mark.parametrize("end", ["timeout", "killed", "closed"])
def test_what_a_worker_started_ends_with_it(end: str, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    work = Work("start a program and die" if end == "killed" else "start a program", 0, str(path))

    def programs() -> list[int]:
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    with prefetcher(depth=1, timeout=3.0 if end == "timeout" else PATIENCE) as ahead:
        if end == "closed":
            ahead._fill(collections.deque(), iter([work]))
            wait_until(lambda: len(programs()) == 2)
        else:
            assert results(ahead, [work]) == ["timeout" if end == "timeout" else "worker_died"]
            wait_for_end(programs())
    wait_for_end(programs())
    assert len(programs()) == 2


def die_at_start(writer: object) -> None:
    os._exit(1)


def test_workers_that_cannot_start_are_an_error_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    # As with a script whose entry is not guarded: every worker dies before it takes anything on.
    monkeypatch.setattr("videor1.data.workers._init_worker", die_at_start)
    monkeypatch.setattr(WorkerPool, "max_restarts", 1)
    with prefetcher() as ahead, pytest.raises(RuntimeError, match=r"broke down 2 times .*__main__.*data\.workers=0"):
        list(ahead.iterate(squares(0)))


IMPORTS = """
    import os, subprocess, sys, time
    from videor1.video.version import Key
    from videor1.data.prefetch import Prefetcher
    """
HANGS = f"""
    {IMPORTS}
    def load(item):
        program = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(os.getpid(), program.pid, flush=True)
        time.sleep(1000)

    if __name__ == "__main__":
        try:
            list(Prefetcher(load, workers=2, depth=3, timeout=500, key=Key).iterate([0, 1, 2]))
        except KeyboardInterrupt:
            sys.exit(5)
    """


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("scripts") / "log", ["videor1.data.prefetch", "videor1.video.version"])
    yield server
    server.close()


def run_script(scripts: ForkServer, folder: Path, body: str) -> int:
    """A program in a session of its own that takes Ctrl-C, also where these tests run in the background of a shell."""
    script = folder / "script.py"
    takes_it = "if __name__ == '__main__':\n    import signal\n    signal.signal(2, signal.default_int_handler)\n"
    script.write_text(takes_it + textwrap.dedent(body))
    (pid,) = scripts.start("forks:script", [str(script), str(folder), str(PATIENCE)])
    return pid


@pytest.mark.parametrize("end", ["killed", "ctrl-c"])
def test_workers_do_not_outlive_their_parent(end: str, scripts: ForkServer, tmp_path: Path) -> None:
    """Nor what they started, where it was killed. Ctrl-C needs no close, and leaves no workers' tracebacks."""
    script = run_script(scripts, tmp_path, HANGS)
    wait_until(lambda: scripts.log.exists() and scripts.log.read_text().count("\n") == 2)
    said = scripts.log.read_text()
    workers, programs = zip(*(map(int, line.split()) for line in said.splitlines()), strict=True)
    if end == "killed":
        os.kill(script, signal.SIGKILL)
        wait_for_end(programs)
    else:
        time.sleep(0.75)  # amid a wait of half a second: at its end, Python's own Condition may lose its lock to Ctrl-C
        os.killpg(script, signal.SIGINT)  # as a terminal does: the whole group
    assert scripts.wait() == [-signal.SIGKILL if end == "killed" else 5]
    assert end == "killed" or scripts.log.read_text() == said
    wait_for_end(workers)
    for pid in filter(alive, programs):  # that Ctrl-C has left
        os.kill(pid, signal.SIGKILL)


LEFT_OPEN = f"""
    {IMPORTS}
    def load(item):
        return item

    def held():
        with Prefetcher(load, workers=1, depth=1, timeout=500, key=Key) as ahead:
            assert list(ahead.iterate(range(2))) == [(0, 0), (1, 1)]
            yield

    if __name__ == "__main__":
        kept = held()
        next(kept)
    """


def test_an_interpreter_that_ends_with_open_workers_ends(tmp_path: Path) -> None:
    """It closes them when no thread can begin any more."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(LEFT_OPEN))
    subprocess.run([sys.executable, str(script)], check=True, timeout=PATIENCE)


STARTS = f"""
    {IMPORTS}
    def load(item):
        if item == 1:
            os._exit(1)
        time.sleep(0.5)
        return item

    if __name__ == "__main__":
        with Prefetcher(load, workers=1, depth=1, timeout=500, key=Key) as ahead:
            for _, result in ahead.iterate(range(3)):
                print(getattr(result, "kind", result))
            print(ahead.stats.restarts)
    """


def started_processes(session: int) -> Iterator[int]:
    """The resource tracker, the process that workers are forked from, and the workers."""
    from runs import session_members  # the workers, which import this file, need no trainer

    for pid in session_members(session):
        with contextlib.suppress(OSError):  # it has ended
            if b"from multiprocessing" in Path(f"/proc/{pid}/cmdline").read_bytes():
                yield pid


def test_ctrl_c_cannot_hit_a_worker_that_starts(scripts: ForkServer, tmp_path: Path) -> None:
    script, hit = run_script(scripts, tmp_path, STARTS), set()
    deadline = time.monotonic() + PATIENCE
    while alive(script):
        assert time.monotonic() < deadline, "waited too long"
        for pid in started_processes(script):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
                hit.add(pid)
        time.sleep(0.002)
    assert scripts.wait() == [0]
    assert scripts.log.read_text().split() == ["0", "worker_died", "2", "0"]
    assert len(hit) == 4  # the last one in place of the worker that died
