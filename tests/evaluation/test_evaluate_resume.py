"""An evaluation that was stopped, killed or out of disk goes on to the same files; another one is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import runs
from evaluations import Oracle, answers, flags, results, run
from runs import Killed, largest_file
from safetensors.torch import load_file, save_file

import videor1.evaluation.run
from videor1 import evaluate
from videor1.config import EvaluateConfig
from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.evaluation import evaluator
from videor1.evaluation.files import _earlier_digest
from videor1.evaluation.suites import load_suite
from videor1.logs.jsonl import JsonlWriter
from videor1.model import load_model
from videor1.model.save import sampled_digest
from videor1.rollout import Request, Rollout
from videor1.types import Sample


@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_a_stop_and_a_resume_give_the_same_as_one_run(
    assets: Assets, benchmarks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    """Blocks of two; the last line that was written is cut in its middle."""
    root = Path(shutil.copytree(benchmarks, tmp_path / "data"))
    (root / "vsibench" / "scannet" / "scene0001_00.mp4").write_bytes(b"no video")
    options = {"benchmark": "videomme,vsibench", "data__root": root}
    monkeypatch.setattr(evaluator, "_CHUNK", 2)
    assert run(assets, tmp_path / "whole", **options) == 0
    append, calls = JsonlWriter.append, []

    def stopping(self: JsonlWriter, rows: Any) -> None:
        append(self, rows)
        if self.path.name == "answers.jsonl":
            calls.append(self)
            if len(calls) > stop_after:
                raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(JsonlWriter, "append", stopping)
        with pytest.raises(Killed):
            evaluate.main(flags(assets, tmp_path / "stopped", **options))
    file = tmp_path / "stopped" / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    before = answers(tmp_path / "stopped")
    assert 0 < len(before) < 9
    asked: list[int] = []
    answer_block = evaluator.Evaluator._answer_block

    def counting(self: Any, model: Any, engine: Any, block: list) -> Any:
        asked.extend(sample.index for sample, _ in block)
        return answer_block(self, model, engine, block)

    monkeypatch.setattr(evaluator.Evaluator, "_answer_block", counting)
    assert run(assets, tmp_path / "stopped", resume="auto", **options) == 0
    assert len(asked) == 11 - len(before)  # nothing is asked twice; what could not be read is tried again

    def lines(folder: Path) -> list[bytes]:
        return sorted((folder / "answers.jsonl").read_bytes().splitlines())

    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    assert (tmp_path / "stopped" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    skipped = [(tmp_path / name / "skipped.jsonl").read_bytes() for name in ("stopped", "whole")]
    assert skipped[0] == skipped[1]


def test_ctrl_c_says_how_to_go_on(
    assets: Assets, benchmarks: Path, tmp_path: Path, oracle, monkeypatch, capsys
) -> None:
    def interrupted(self: Any, requests: list[Request]) -> Rollout:
        if len(self.made) == 2:  # the second benchmark
            raise KeyboardInterrupt
        return Oracle.generate(self, requests)

    monkeypatch.setattr(oracle, "generate", interrupted)
    assert run(assets, tmp_path / "run", benchmark="videomme,vsibench", data__root=benchmarks) == 130
    error = capsys.readouterr().err
    command = f"python -m videor1.evaluate --resume auto --output_dir {tmp_path / 'run'}"
    assert f"6 of 11 questions are answered; go on with: {command}" in error


def test_a_full_disk_is_told_and_gone_on_from(
    assets: Assets, benchmarks: Path, tmp_path: Path, oracle, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    options = {"benchmark": "videomme,vsibench", "data__root": benchmarks}

    def full(self: JsonlWriter, rows: Any) -> None:
        if self.path.name == "answers.jsonl" and self.count:
            os.write(self._file.fileno(), b'{"benchmark": "vsib')  # as much as there was room for
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, rows)

    append = JsonlWriter.append
    with monkeypatch.context() as patched:
        patched.setattr(JsonlWriter, "append", full)
        assert run(assets, tmp_path / "run", **options) == 1
    assert "cannot be written: No space left on device; 6 of 11 questions are answered" in capsys.readouterr().err
    assert run_main(evaluate.main, ["--resume", "auto", "--output_dir", str(tmp_path / "run")]) == 0
    assert len(answers(tmp_path / "run")) == 11


def test_killed_and_resumed(assets: Assets, benchmarks: Path, tmp_path: Path) -> None:
    """The command itself, ended by SIGKILL after its first benchmark, where it is held."""
    options = {"benchmark": "videomme,mvbench,vsibench", "data__root": benchmarks, "max_completion_length": 16}
    killed = flags(assets, tmp_path / "killed", **options)
    process = runs.start("held_evaluate", killed)
    runs.wait_for_lines(process, tmp_path / "killed" / "answers.jsonl", 6)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "results.json").exists()
    assert run_main(evaluate.main, [*killed, "--resume=auto"]) == 0
    assert run(assets, tmp_path / "whole", **options) == 0
    for folder in ("killed", "whole"):
        assert len(answers(tmp_path / folder)) == 31
    assert sorted((tmp_path / "killed" / "answers.jsonl").read_bytes().splitlines()) == sorted(
        (tmp_path / "whole" / "answers.jsonl").read_bytes().splitlines()
    )
    assert (tmp_path / "killed" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()


@pytest.fixture
def finished(assets: Assets, benchmarks: Path, tmp_path: Path, oracle) -> dict[str, Any]:
    """The options of an evaluation that stands in ``tmp_path / "run"``."""
    options = {"benchmark": "videomme", "data__root": benchmarks}
    assert run(assets, tmp_path / "run", **options) == 0
    oracle.requests.clear()
    return options


def test_a_finished_evaluation_is_not_asked_again(assets: Assets, tmp_path: Path, oracle, finished) -> None:
    before = (tmp_path / "run" / "answers.jsonl").read_bytes()
    os.remove(tmp_path / "run" / "results.json")
    other = finished | {"data__workers": 1, "data__prefetch": 3}  # how fast, not what
    assert run(assets, tmp_path / "run", resume="auto", **other) == 0
    assert not oracle.requests
    assert (tmp_path / "run" / "answers.jsonl").read_bytes() == before
    assert results(tmp_path / "run")["videomme"]["overall"]["questions"] == 6


def test_a_used_folder_is_refused(assets: Assets, tmp_path: Path, finished, capsys: pytest.CaptureFixture) -> None:
    before = (tmp_path / "run" / "answers.jsonl").read_bytes()
    assert run(assets, tmp_path / "run", **finished) == 2
    assert "holds an evaluation already; go on with it by --resume auto" in capsys.readouterr().err
    assert (tmp_path / "run" / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"video__max_frames": 8}, "video.max_frames: 16 -> 8"),
        ({"max_completion_length": 5}, "max_completion_length: 4 -> 5"),
        ({"seed": 1}, "seed: 42 -> 1"),
        ({"benchmark": "videomme,mmvu"}, "benchmark: [videomme] -> [videomme, mmvu]"),
        ({"eval_temperature": 0.5}, "eval_temperature: 0.0 -> 0.5"),
    ],
)
def test_a_resume_with_other_options_is_refused(
    assets: Assets, tmp_path: Path, finished, capsys: pytest.CaptureFixture, change: dict[str, Any], named: str
) -> None:
    assert run(assets, tmp_path / "run", resume="auto", **finished | change) == 2
    error = capsys.readouterr().err
    assert "holds another evaluation" in error
    assert named in error


def test_a_resume_of_other_weights_is_refused(assets: Assets, tmp_path: Path, benchmarks: Path, oracle, capsys) -> None:
    model = Path(shutil.copytree(assets.model, tmp_path / "model"))
    options = {"benchmark": "videomme", "data__root": benchmarks, "model_name_or_path": model}
    assert run(assets, tmp_path / "run", **options) == 0
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor + 0.25 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert run(assets, tmp_path / "run", resume="auto", **options) == 2
    assert "model (digest of its weights): " in capsys.readouterr().err


def test_a_resume_on_other_questions_is_refused(
    assets: Assets, tmp_path: Path, benchmarks: Path, oracle, capsys
) -> None:
    root = Path(shutil.copytree(benchmarks, tmp_path / "data"))
    options = {"benchmark": "mmvu", "data__root": root}
    assert run(assets, tmp_path / "run", **options) == 0
    file = root / "mmvu" / "validation.json"
    file.write_text(file.read_text().replace("Which sort?", "Which one?"))
    assert run(assets, tmp_path / "run", resume="auto", **options) == 2
    assert "questions of mmvu: " in capsys.readouterr().err


def in_folder(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("room", [0, 300, 2000])
def test_a_full_disk_anywhere_is_one_message_and_gone_on_from(
    assets: Assets, benchmarks: Path, tmp_path: Path, oracle, capsys: pytest.CaptureFixture, room: int
) -> None:
    """No file can grow beyond ``room``: the state, a line or the results do not fit."""
    options = {"benchmark": "videomme,vsibench", "data__root": benchmarks}
    with largest_file(room):
        assert run(assets, tmp_path / "run", **options) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "cannot be written: File too large" in error
    assert "of 11 questions are answered; go on with: python -m videor1.evaluate --resume auto" in error
    assert not (tmp_path / "run" / "results.json").exists()
    assert run(assets, tmp_path / "run", resume="auto", **options) == 0
    assert len(answers(tmp_path / "run")) == 11
    assert in_folder(tmp_path / "run") == [
        "answers.jsonl",
        "config.yaml",
        "results.json",
        "skipped.jsonl",
        "state.json",
    ]


def test_results_are_whole_or_not_there(
    assets: Assets, benchmarks: Path, tmp_path: Path, oracle, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The disk is full when the results are written: the earlier ones stay."""
    options = {"benchmark": "videomme", "data__root": benchmarks}
    assert run(assets, tmp_path / "run", **options) == 0
    before = (tmp_path / "run" / "results.json").read_bytes()

    def full(path: Path, *_: object, **__: object) -> None:
        if Path(path).name == "results.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *_, **__)

    write = videor1.evaluation.run.write_atomic
    with monkeypatch.context() as patched:
        patched.setattr(videor1.evaluation.run, "write_atomic", full)
        assert run(assets, tmp_path / "run", resume="auto", **options) == 1
    assert "No space left on device; 6 of 6 questions are answered; go on with" in capsys.readouterr().err
    assert (tmp_path / "run" / "results.json").read_bytes() == before


def test_an_evaluation_and_its_data_may_be_moved(
    assets: Assets, benchmarks: Path, tmp_path: Path, oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model, the data and the run lie in one folder, which is named relative to another one."""
    project = tmp_path / "project"
    shutil.copytree(benchmarks, project / "data")
    shutil.copytree(assets.model, project / "model")
    monkeypatch.chdir(project)
    options = {"benchmark": "videomme", "data__root": "data", "model_name_or_path": "model"}
    assert run(assets, Path("runs/one"), **options) == 0
    os.remove(project / "runs" / "one" / "results.json")
    monkeypatch.chdir(tmp_path)
    oracle.requests.clear()
    assert run_main(evaluate.main, ["--resume", "auto", "--output_dir", "project/runs/one"]) == 0
    shutil.move(project, tmp_path / "new")
    os.remove(tmp_path / "new" / "runs" / "one" / "results.json")
    assert run_main(evaluate.main, ["--resume", "auto", "--output_dir", "new/runs/one"]) == 0
    assert not oracle.requests
    assert results(tmp_path / "new" / "runs" / "one")["videomme"]["overall"]["questions"] == 6


def test_an_evaluation_of_an_early_version_goes_on(
    assets: Assets, benchmarks: Path, tmp_path: Path, oracle, finished: dict[str, Any]
) -> None:
    model = load_model(EvaluateConfig(model_name_or_path=str(assets.model), device="cpu"))
    samples = [question.sample for question in load_suite("videomme", benchmarks).questions]
    early = {"model (digest of its weights)": sampled_digest(model), "questions of videomme": _earlier_digest(samples)}
    (tmp_path / "run" / "state.json").write_text(json.dumps(early))
    assert run(assets, tmp_path / "run", resume="auto", **finished) == 0
    early["questions of videomme"] = _earlier_digest(samples[:-1])
    (tmp_path / "run" / "state.json").write_text(json.dumps(early))
    assert run(assets, tmp_path / "run", resume="auto", **finished) == 2


def test_questions_have_the_digest_of_early_versions() -> None:
    path = Path("/data/a.mp4")
    sample = Sample(0, "7", "?", "video", "multiple choice", "<answer>A</answer>", path, Path("/data"), ("A. x",))
    early = (
        "Sample(index=0, problem_id='7', problem='?', data_type='video', problem_type='multiple choice', "
        f"solution='<answer>A</answer>', path={path!r}, options=('A. x',), data_source='', process='', start=None, "
        "end=None, frames_per_second=None)"
    )
    assert _earlier_digest([sample]) == hashlib.sha256(early.encode()).hexdigest()[:16]


@pytest.mark.parametrize("text", ["", "[]", "3", "{"])
def test_a_state_that_is_none(text: str, assets: Assets, tmp_path: Path, finished: dict[str, Any], capsys) -> None:
    (tmp_path / "run" / "state.json").write_text(text)
    assert run(assets, tmp_path / "run", resume="auto", **finished) == 1
    assert "state.json: cannot be read" in capsys.readouterr().err


def test_a_second_process_in_the_folder_is_refused(assets: Assets, benchmarks: Path, tmp_path: Path, capsys) -> None:
    options = {"benchmark": "videomme,mvbench", "data__root": benchmarks, "max_completion_length": 16}
    process = runs.start("held_evaluate", flags(assets, tmp_path / "run", **options))
    runs.wait_for_lines(process, tmp_path / "run" / "answers.jsonl", 6)
    assert run(assets, tmp_path / "run", resume="auto", **options) == 2
    assert f"is in use by process {process.pid} on" in capsys.readouterr().err
    process.kill()
    process.communicate()
    assert run(assets, tmp_path / "run", resume="auto", **options) == 0
