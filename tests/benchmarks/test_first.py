"""The first minutes on a card: parts end at their limits, whatever the others did, and what they found is written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import first, first_looks


def part(name: str, code: str, seconds: int = 60) -> first.Part:
    return first.Part(name, name, seconds, lambda device, out, limit: ["-c", code])


def test_parts_end_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that fails, one that hangs with a child of its own, and one that passes."""
    write = f"open({str(tmp_path / 'first' / 'first-good.json')!r}, 'w').write('{{\"answer\": 42}}')"
    hang = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']).wait()"
    parts = (part("bad", "print('so it goes'); raise SystemExit(3)"), part("hangs", hang, 2), part("good", write))
    monkeypatch.setattr(first, "PARTS", parts)
    assert first.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "first" / "cpu-first.json").read_text())
    statuses = {name: p["status"] for name, p in found["parts"].items()}
    assert statuses == {"bad": "failed", "hangs": "out of time", "good": "passed"}
    assert found["parts"]["good"]["found"] == {"answer": 42}
    assert found["torch"] == torch.__version__
    assert "so it goes" in (tmp_path / "first" / "first-bad.log").read_text()
    assert "hangs: out of time in 2 s" in capsys.readouterr().out
    assert first.main(["--device", "cpu", "--out", str(tmp_path), "--only", "good"]) == 0
    with pytest.raises(SystemExit):
        first.main(["--only", "none"])
    assert "expected some of bad, hangs, good, got none" in capsys.readouterr().err


def test_a_result_of_before_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (tmp_path / "first-old.json").write_text('{"answer": 1}')
    old = (tmp_path / "first-old.json").stat().st_mtime - 1000
    os.utime(tmp_path / "first-old.json", (old, old))
    assert first.run_part(part("old", "pass"), "cpu", tmp_path, 60).found == {}


def test_memory_that_grows_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = iter([100 * first_looks.MIB, 200 * first_looks.MIB, 300 * first_looks.MIB])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(first_looks, "synchronize", lambda device: None)
    engine = first_looks._engine(torch.device("cpu"), 2)
    monkeypatch.setattr(first_looks, "_engine", lambda device, new_tokens: engine)
    seen: list[object] = []
    with pytest.raises(SystemExit, match="200 MiB more after 3 rollouts"):
        first_looks.memory(torch.device("cuda"), seen.append)
    assert len(seen) == 3


@pytest.mark.full  # .ci/run rehearses it whole
def test_the_rehearsal(tmp_path: Path) -> None:
    """All parts but the kernels' tests, on this machine, in small sizes."""
    assert first.main(["--device", "cpu", "--out", str(tmp_path), "--scale", "10", "--only", "smoke,memory,trace"]) == 0
    found = json.loads((tmp_path / "first" / "cpu-first.json").read_text())["parts"]
    assert set(found["smoke"]["found"]["kernels"]) == set(first_looks.KERNELS)
    assert len(found["memory"]["found"]["MiB after each rollout"]) == first_looks.ROLLOUTS
    assert found["trace"]["found"]["longest"][0]["calls"] > 0
    assert sys.executable in (tmp_path / "first" / "first-smoke.log").read_text()
