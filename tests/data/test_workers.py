"""Workers of the prefetcher that hang, are killed, die idle, cannot start or lose their parent."""

import collections
import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from prefetchers import Work, alive, prefetcher, run_script, wait_until
from runs import session_members

from videor1.data.workers import WorkerPool
from videor1.types import SampleError


def test_a_hang_in_native_code_is_killed():
    with prefetcher(timeout=1.0) as ahead:
        list(ahead.iterate([Work("square", 1)]))  # the worker is up
        started = time.monotonic()
        (_, first), (_, second) = ahead.iterate([Work("hang in native code"), Work("square", 5)])
        assert isinstance(first, SampleError)
        assert first.kind == "timeout"
        assert second == 25
        assert time.monotonic() - started < PATIENCE


def test_tensors_cross_as_plain_bytes():
    with prefetcher(depth=64) as ahead:
        out = list(ahead.iterate([Work("tensor", n) for n in range(200)]))
    descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for n, (_, (tensor, bf16)) in enumerate(out):
        assert tensor.dtype == torch.uint8
        assert tensor.shape == (n,)
        assert not tensor.is_shared()
        assert torch.equal(bf16, torch.ones(3, dtype=torch.bfloat16))
        tensor.fill_(1)  # writable
    assert descriptors < 150


def test_workers_ignore_ctrl_c_and_use_one_thread():
    with prefetcher() as ahead:
        ((_, (pid, handler, threads)),) = ahead.iterate([Work("pid")])
        assert pid != os.getpid()
        assert handler == signal.SIG_IGN
        assert threads == 1


def never_up(writer):
    time.sleep(1000)


def test_making_it_does_not_wait_for_workers(monkeypatch):
    monkeypatch.setattr("videor1.data.workers._init_worker", never_up)
    started = time.monotonic()
    ahead = prefetcher(workers=2)
    ahead.close()
    assert time.monotonic() - started < PATIENCE
    ahead.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(ahead.iterate([Work("square")]))


def test_close_kills_what_runs():
    ahead = prefetcher(workers=2, depth=3)
    pids = {next(ahead.iterate([Work("pid", n)]))[1][0] for n in range(8)}
    stream = ahead.iterate([Work("square", 1), Work("hang", 1), Work("hang", 2), Work("hang", 3)])
    next(stream)
    started = time.monotonic()
    ahead.close()
    assert time.monotonic() - started < PATIENCE
    wait_until(lambda: not any(map(alive, pids)))
    stream.close()


def test_a_worker_killed_while_idle_costs_nothing():
    with prefetcher(depth=2) as ahead:
        ((_, (pid, _, _)),) = ahead.iterate([Work("pid")])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid))
        time.sleep(0.3)  # let the pool notice
        assert [r for _, r in ahead.iterate([Work("square", n) for n in range(5)])] == [0, 1, 4, 9, 16]
        assert not ahead.stats.errors


def test_a_worker_stopped_dead_while_it_holds_the_pipe_is_replaced(monkeypatch):
    # SIGSTOP of an idle worker stands for one that was killed inside the pool's locks: no reply ever comes.
    monkeypatch.setattr(WorkerPool, "stall_seconds", 1.0)
    with prefetcher(timeout=1.0) as ahead:
        ((_, (pid, _, _)),) = ahead.iterate([Work("pid")])
        os.kill(pid, signal.SIGSTOP)
        assert [r for _, r in ahead.iterate([Work("square", n) for n in range(3)])] == [0, 1, 4]
        assert ahead.stats.restarts == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_from_outside_costs_one_more_try(tmp_path, number):
    log = tmp_path / "log"
    with prefetcher(workers=2) as ahead:
        out = [r for _, r in ahead.iterate([Work("square", 2), Work("kill once", number, str(log)), Work("square", 3)])]
        assert out == [4, number * number, 9]
        assert len(set(log.read_text().split())) == 2, "two workers had it"
        assert (ahead.stats.retries, ahead.stats.worker_deaths, dict(ahead.stats.errors)) == (1, 1, {})


def test_a_second_kill_is_the_samples_fault():
    with prefetcher(workers=2) as ahead:
        out = [r for _, r in ahead.iterate([Work("square", 2), Work("kill"), Work("exit"), Work("square", 3)])]
        assert [getattr(r, "kind", r) for r in out] == [4, "worker_died", "worker_died", 9]
        assert "exit code -9" in out[1].message
        assert ahead.stats.retries == 1, "a crash is not tried again"
        assert ahead.stats.worker_deaths == 3


def programs(path):
    wait_until(lambda: path.exists() and len(path.read_text().split()) == 2)
    return [int(pid) for pid in path.read_text().split()]


@pytest.mark.parametrize("end", ["timeout", "killed", "closed"])
def test_what_a_worker_started_ends_with_it(tmp_path, end):
    path = tmp_path / "pids"
    work = Work("start a program and die" if end == "killed" else "start a program", 0, str(path))
    ahead = prefetcher(workers=1, depth=1, timeout=3.0 if end == "timeout" else PATIENCE)
    with ahead:
        stream = ahead.iterate([work])
        if end == "closed":
            ahead._fill(collections.deque(), iter([work]))
            pids = programs(path)
        else:
            ((_, error),) = stream
            assert error.kind == ("timeout" if end == "timeout" else "worker_died")
            pids = programs(path)
            wait_until(lambda: not any(map(alive, pids)))
    wait_until(lambda: not any(map(alive, pids)))


PROGRAM = """
    import os, subprocess, sys, time
    from videor1.video.version import Key
    from videor1.data.prefetch import Prefetcher

    def load(item):
        program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        print(os.getpid(), program.pid, flush=True)
        time.sleep(1000)

    if __name__ == "__main__":
        list(Prefetcher(load, workers=1, depth=1, timeout=500, key=Key).iterate([0]))
    """


def test_what_a_worker_started_does_not_outlive_a_killed_parent(tmp_path):
    script = run_script(tmp_path, PROGRAM)
    pids = [int(pid) for pid in script.stdout.readline().split()]
    assert len(pids) == 2
    script.kill()
    wait_until(lambda: not any(map(alive, pids)))
    script.communicate(timeout=PATIENCE)


def die_at_start(writer):
    os._exit(1)


def test_workers_that_cannot_start_are_an_error_not_a_hang(monkeypatch):
    # As with a script whose entry is not guarded: every worker dies before it takes anything on.
    monkeypatch.setattr("videor1.data.workers._init_worker", die_at_start)
    with prefetcher() as ahead, pytest.raises(RuntimeError, match=r"__main__.*data\.workers=0"):
        list(ahead.iterate([Work("square")]))


LOOP = """
    import os, sys, time
    from videor1.video.version import Key
    from videor1.data.prefetch import Prefetcher

    def load(item):
        if item < 2:
            return os.getpid()
        time.sleep(1000)

    if __name__ == "__main__":
        ahead = Prefetcher(load, workers=2, depth=3, timeout=500, key=Key)
        try:
            for _, pid in ahead.iterate([0, 1, 2, 3]):
                print(pid, flush=True)
        except KeyboardInterrupt:
            sys.exit(5)
    """


def test_ctrl_c_ends_everything_without_workers_tracebacks_even_unclosed(tmp_path):
    script = run_script(tmp_path, LOOP, start_new_session=True)
    pids = [int(script.stdout.readline()) for _ in range(2)]
    time.sleep(0.75)  # amid a wait of half a second: at its end, Python's own Condition may lose its lock to Ctrl-C
    os.killpg(script.pid, signal.SIGINT)  # as a terminal does: the whole group
    _, err = script.communicate(timeout=PATIENCE)
    assert script.returncode == 5
    assert err == ""
    wait_until(lambda: not any(map(alive, pids)))


STARTS = """
    import os, time
    from videor1.video.version import Key
    from videor1.data.prefetch import Prefetcher

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


def started_processes(session):
    """The resource tracker, the process that workers are forked from, and the workers."""
    for pid in session_members(session):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if b"from multiprocessing" in command:
            yield pid


def test_ctrl_c_cannot_hit_a_worker_that_starts(tmp_path):
    script = run_script(tmp_path, STARTS, start_new_session=True)
    hit = set()
    deadline = time.monotonic() + PATIENCE
    while script.poll() is None:
        assert time.monotonic() < deadline, "waited too long"
        for pid in started_processes(script.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
                hit.add(pid)
        time.sleep(0.002)
    out, err = script.communicate(timeout=PATIENCE)
    assert err == ""
    assert out.split() == ["0", "worker_died", "2", "0"]
    assert len(hit) == 4  # the last one in place of the worker that died


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = run_script(tmp_path, LOOP)
    pids = [int(script.stdout.readline()) for _ in range(2)]
    script.kill()
    script.communicate(timeout=PATIENCE)
    wait_until(lambda: not any(map(alive, pids)))


def test_no_thread_or_process_is_left_behind():
    before = threading.active_count()
    with prefetcher(workers=2) as ahead:
        list(ahead.iterate([Work("square", n) for n in range(3)]))
    wait_until(lambda: threading.active_count() <= before)
