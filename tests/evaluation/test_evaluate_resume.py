"""An evaluation that was stopped goes on where it was, and on the same model, questions and options only."""

import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from evaluations import Evaluate, Oracle, answers, flags, results, run
from patience import PATIENCE
from pyarrow import parquet
from runs import Killed, kill_at, largest_file
from safetensors.torch import load_file, save_file

from videor1 import evaluate as command
from videor1.config import EvaluateConfig
from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.evaluation import evaluator
from videor1.evaluation.suites import load_suite
from videor1.logs.jsonl import JsonlWriter
from videor1.model import load_model
from videor1.model.save import sampled_digest
from videor1.rollout import Request, Rollout
from videor1.types import Sample


@pytest.fixture(scope="module")
def two(benchmarks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The options of an evaluation on two benchmarks, of whose 11 questions 2 cannot be asked, in blocks of two
    questions; read only."""
    root = tmp_path_factory.mktemp("two")
    for name in ("videomme", "vsibench"):
        shutil.copytree(benchmarks / name, root / name)
    (root / "vsibench" / "scannet" / "scene0001_00.mp4").write_bytes(b"no video")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluator, "_CHUNK", 2)
        yield {"benchmark": "videomme,vsibench", "data__root": root}


@pytest.fixture(scope="module")
def whole(assets: Assets, two: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, run to its end; read only."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(assets, folder, **two) == 0
    return folder


def assert_same(folder: Path, expected: Path) -> None:
    lines = [sorted((f / "answers.jsonl").read_bytes().splitlines()) for f in (folder, expected)]
    assert lines[0] == lines[1]
    for name in ("results.json", "skipped.jsonl"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_a_stop_and_a_resume_give_the_same_as_one_run(
    assets: Assets, two: dict[str, Any], whole: Path, tmp_path: Path, stop_after: int
) -> None:
    """The last line that was written is cut in its middle."""
    with pytest.MonkeyPatch.context() as patched:
        kill_at(patched, JsonlWriter, "append", 2 * stop_after + 3)  # skipped.jsonl and answers.jsonl in turn
        with pytest.raises(Killed):
            command.main(flags(assets, tmp_path, **two))
    file = tmp_path / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    before = answers(tmp_path)
    assert 0 < len(before) < 9
    generate = evaluator.LocalEngine.generate
    with patch.object(evaluator.LocalEngine, "generate", autospec=True, side_effect=generate) as asked:
        assert run(assets, tmp_path, resume="auto", **two) == 0
    assert sum(len(call.args[1]) for call in asked.call_args_list) == 9 - len(before), "nothing is asked twice"
    assert_same(tmp_path, whole)


def hold(arguments: list[str]) -> None:
    """The command, which writes one block of answers and then waits to be killed."""
    append = JsonlWriter.append

    def append_and_wait(self: JsonlWriter, rows: Any) -> None:
        append(self, rows)
        if self.path.name == "answers.jsonl":
            time.sleep(PATIENCE)

    torch.set_num_threads(1)  # those of the parent are not there after a fork
    with patch.object(JsonlWriter, "append", append_and_wait):
        run_main(command.main, arguments)


def test_a_second_process_is_refused_and_a_killed_one_resumed(two: Any, whole: Path, evaluate: Evaluate) -> None:
    folder = evaluate.folder / "run"
    given = flags(evaluate.assets, folder, **two)
    process = multiprocessing.get_context("fork").Process(target=hold, args=(given,), daemon=True)
    process.start()
    deadline = time.monotonic() + PATIENCE
    while not (folder / "answers.jsonl").exists() or len(answers(folder)) < 2:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    told = evaluate(code=2, resume="auto", **two).err
    assert f"is in use by process {process.pid} on" in told
    process.kill()
    process.join()
    assert not (folder / "results.json").exists()
    evaluate(resume="auto", **two)
    assert_same(folder, whole)


def test_ctrl_c_says_how_to_go_on(evaluate: Evaluate, oracle: type[Oracle], two: dict[str, Any]) -> None:
    def interrupted(self: Oracle, requests: list[Request]) -> Rollout:
        if len(self.made) == 2:  # the second benchmark
            raise KeyboardInterrupt
        return Oracle.generate(self, requests)

    oracle.generate = interrupted  # type: ignore[method-assign]
    made = evaluate(code=130, **two)
    resume = f"python -m videor1.evaluate --resume auto --output_dir {shlex.quote(str(made.folder))}"
    assert f"6 of 11 questions are answered; go on with: {resume}" in made.err


FILES = ["answers.jsonl", "config.yaml", "results.json", "skipped.jsonl", "state.json"]


@pytest.mark.parametrize("room", [0, 300, 2000])
def test_a_full_disk_is_one_message_and_gone_on_from(evaluate: Evaluate, oracle: type[Oracle], room: int) -> None:
    """No file can grow beyond ``room``: the state, a line or the results do not fit."""
    options = {"benchmark": "videomme,vsibench"}
    with largest_file(room):
        made = evaluate(code=1, **options)
    written = len(made.answers) if (made.folder / "answers.jsonl").exists() else 0
    assert "Traceback" not in made.err
    assert f"cannot be written: File too large; {written} of 11 questions are answered; go on with: " in made.err
    assert f"python -m videor1.evaluate --resume auto --output_dir {shlex.quote(str(made.folder))}" in made.err
    assert not (made.folder / "results.json").exists()
    made = evaluate(resume="auto", **options)
    assert len(made.answers) == 11
    assert sorted(path.name for path in made.folder.iterdir()) == FILES


@pytest.fixture
def finished(evaluate: Evaluate, oracle: type[Oracle]) -> Path:
    """The folder ``run`` of an evaluation of videomme that is complete."""
    folder = evaluate(benchmark="videomme").folder
    oracle.requests.clear()
    return folder


def test_a_finished_evaluation(evaluate: Evaluate, oracle: type[Oracle], finished: Path) -> None:
    """Results are whole or not there: where the disk is full, the earlier ones stay. And it is not asked again."""
    before, given = (finished / "results.json").read_bytes(), (finished / "answers.jsonl").read_bytes()
    room = max((finished / name).stat().st_size for name in FILES if name != "results.json")
    assert room < len(before)
    with largest_file(room):
        told = evaluate(code=1, benchmark="videomme", resume="auto").err
    assert "File too large; 6 of 6 questions are answered; go on with" in told
    assert (finished / "results.json").read_bytes() == before
    assert sorted(path.name for path in finished.iterdir()) == FILES
    os.remove(finished / "results.json")
    options = {"data__workers": 1, "data__prefetch": 3}  # how fast, not what
    made = evaluate(benchmark="videomme", resume="auto", **options)
    assert made.results["videomme"]["overall"]["questions"] == 6
    told = evaluate(code=2, benchmark="videomme").err
    assert "holds an evaluation already; go on with it by --resume auto" in told
    assert not oracle.requests
    assert made.bytes("answers.jsonl") == given
    for text in ("", "[]", "3", "{"):
        (finished / "state.json").write_text(text)
        assert "state.json: cannot be read" in evaluate(code=1, benchmark="videomme", resume="auto").err


def test_what_a_resume_takes_for_another_evaluation(evaluate: Evaluate, finished: Path) -> None:
    model = Path(shutil.copytree(evaluate.assets.model, evaluate.folder / "model"))
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor + 0.25 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    root = Path(shutil.copytree(evaluate.benchmarks / "videomme", evaluate.folder / "data" / "videomme")).parent
    questions = root / "videomme" / "videomme" / "test-00000-of-00001.parquet"
    parquet.write_table(parquet.read_table(questions).slice(1), questions)
    for change, named in (
        ({"video__max_frames": 8}, "video.max_frames: 16 -> 8"),
        ({"max_completion_length": 5}, "max_completion_length: 4 -> 5"),
        ({"seed": 1}, "seed: 42 -> 1"),
        ({"benchmark": "videomme,mmvu"}, "benchmark: [videomme] -> [videomme, mmvu]"),
        ({"eval_temperature": 0.5}, "eval_temperature: 0.0 -> 0.5"),
        ({"model_name_or_path": model}, "model (digest of its weights): "),
        ({"data__root": root}, "questions of videomme: "),
    ):
        told = evaluate(code=2, resume="auto", **{"benchmark": "videomme"} | change).err
        assert "holds another evaluation" in told
        assert named in told
    # An evaluation of an early version goes on.
    model = load_model(EvaluateConfig(model_name_or_path=str(evaluate.assets.model), device="cpu"))
    samples = [question.sample for question in load_suite("videomme", evaluate.benchmarks).questions]
    early = {"model (digest of its weights)": sampled_digest(model), "questions of videomme": early_digest(samples)}
    (finished / "state.json").write_text(json.dumps(early))
    evaluate(benchmark="videomme", resume="auto")
    early["questions of videomme"] = early_digest(samples[:-1])
    (finished / "state.json").write_text(json.dumps(early))
    evaluate(code=2, benchmark="videomme", resume="auto")


def test_an_evaluation_and_its_data_may_be_moved(evaluate: Evaluate, oracle: type[Oracle], monkeypatch: Any) -> None:
    """The model, the data and the run lie in one folder, which is named relative to another one."""
    project = evaluate.folder / "project"
    shutil.copytree(evaluate.benchmarks / "videomme", project / "data" / "videomme")
    shutil.copytree(evaluate.assets.model, project / "model")
    monkeypatch.chdir(project)
    evaluate(benchmark="videomme", data__root="data", model_name_or_path="model", output_dir="runs/one")
    monkeypatch.chdir(evaluate.folder)
    oracle.requests.clear()

    def go_on(folder: str) -> None:
        os.remove(evaluate.folder / folder / "results.json")
        assert run_main(command.main, ["--resume", "auto", "--output_dir", folder]) == 0
        assert results(evaluate.folder / folder)["videomme"]["overall"]["questions"] == 6

    go_on("project/runs/one")
    shutil.move(project, evaluate.folder / "new")
    go_on("new/runs/one")
    assert not oracle.requests


def early_digest(samples: list[Sample]) -> str:
    """As early versions computed it, from samples that had these fields."""
    digest = hashlib.sha256()
    for sample in samples:
        names = ("index", "problem_id", "problem", "data_type", "problem_type", "solution", "path", "options")
        names += ("data_source", "process", "start", "end", "frames_per_second")
        text = ", ".join(f"{name}={getattr(sample, name)!r}" for name in names)
        digest.update(f"Sample({text})".encode())
    return digest.hexdigest()[:16]
