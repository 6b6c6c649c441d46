"""Everything a data file can get wrong: counted, logged with its path and skipped; a run of nothing else stops."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import run as run_evaluate
from media import cut, write_sound, write_video
from runs import entries, last_metrics, run_lines, sft_trainer, train_flags, trainer, write_data
from safetensors.torch import load_file

from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.train import main
from videor1.training.checkpoint import checkpoints

IN_ORDER = {"data__root": "/", "data__shuffle": False}
HALF = "\ud83d"  # of an emoji's surrogate pair
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def broken(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with one of each: kind of file -> path."""
    root = tmp_path_factory.mktemp("broken")
    clip = Path(entries(assets.train)[0]["path"])
    (root / "text.mp4").write_text("this is not a video\n" * 100)
    (root / "empty.mp4").write_bytes(b"")
    (root / "half.png").write_bytes((assets.folder / "clips" / "train-0003.png").read_bytes()[:60])
    (root / "folder.mp4").mkdir()
    data = bytearray(write_video(root / "fine.mp4", np.zeros((20, 64, 64, 3), np.uint8) + 90).read_bytes())
    start = data.index(b"mdat") + 4
    data[start : start + 600] = np.random.default_rng(0).bytes(600)
    (root / "corrupt.mp4").write_bytes(data)
    cut(clip, root / "cut.mp4")
    write_sound(root / "sound.mp4", with_empty_video=True)
    write_sound(root / "song.mp4")
    names = {"missing": "gone.mp4", "truncated": "cut.mp4", "no video": "text.mp4", "empty": "empty.mp4"}
    names |= {"no frames": "sound.mp4", "sound only": "song.mp4", "corrupt": "corrupt.mp4", "image": "half.png"}
    return {name: root / file for name, file in (names | {"folder": "folder.mp4"}).items()}


@pytest.mark.parametrize("workers", [0, 1])
def test_every_kind_of_broken_file_is_skipped_and_reported(
    workers: int, assets: Assets, broken: dict[str, Path], tmp_path: Path, capfd: Capture
) -> None:
    good, image = entries(assets.train)[0], entries(assets.train)[3]
    assert image["data_type"] == "image"
    bad = [(image if name == "image" else good) | {"path": str(path)} for name, path in broken.items()]
    data = write_data(tmp_path / "data.json", [*bad, good, image])
    trainer(assets, tmp_path / "run", dataset_name=data, data__workers=workers, max_steps=3, **IN_ORDER).train()
    lines = run_lines(tmp_path / "run", "skipped.jsonl")
    first_pass = [line for line in lines if line["draw"] < len(bad)]
    assert [line["path"] for line in first_pass] == [str(path) for path in broken.values()]
    assert all(line["split"] == "train" and line["kind"] and line["message"] for line in first_pass)
    row = last_metrics(tmp_path / "run")
    assert row["data/skipped"] == len(lines) == 2 * len(bad)  # the third step begins another pass
    counted = {key: value for key, value in row.items() if key.startswith("data/skipped/")}
    assert counted == Counter(f"data/skipped/{line['kind']}" for line in lines)
    assert counted["data/skipped/missing_file"] == 2
    screen = capfd.readouterr().err
    assert all(str(path) in screen for path in broken.values())
    rollouts = run_lines(tmp_path / "run", "rollouts.jsonl")
    assert [line["path"] for line in rollouts] == [good["path"], image["path"], good["path"]]


@pytest.mark.parametrize("stream", [False, True])
def test_every_kind_of_bad_entry_is_left_out_and_reported(
    stream: bool, assets: Assets, tmp_path: Path, capfd: Capture
) -> None:
    """Of SFT, which needs the most of an entry. The kinds themselves: tests/data/test_samples.py."""
    good = next(e for e in entries(assets.sft) if e["problem_type"] == "multiple choice")
    bad: list[tuple[str, Any]] = [("wrong_type", 7), ("empty_field", good | {"problem": " "})]
    bad += [("problem_type", good | {"problem_type": "multiple choise"}), ("solution", good | {"solution": "A"})]
    halves = {field: f"{good.get(field)}{HALF}" for field in ("problem", "problem_id", "data_source", "solution")}
    halves |= {"options": [*good["options"], f"D. {HALF}"], "process": f"<think>{HALF}</think>"}
    bad += [("bad_text", good | {field: value}) for field, value in halves.items()]
    bad += [("bad_path", good | {"path": f"{good['path']}{HALF}"})]
    data = tmp_path / "data.jsonl"
    lines = ["{no json", *(json.dumps(entry) for _, entry in bad), json.dumps(good)]
    data.write_text("\n".join(lines) + "\n")
    sft_trainer(assets, tmp_path / "run", dataset_name=data, data__stream=stream, max_steps=1, **IN_ORDER).train()
    skipped = run_lines(tmp_path / "run", "skipped.jsonl")
    assert [line["kind"] for line in skipped] == ["bad_json", *(kind for kind, _ in bad)]
    places = [f"byte {len(''.join(lines[:i])) + i}" if stream else f"line {i + 1}" for i in range(12)]
    assert [re.search(r"(?:line|byte) \d+", line["message"])[0] for line in skipped] == places  # type: ignore[index]
    assert {line["path"] for line in skipped} == {str(data)}
    row, kinds = last_metrics(tmp_path / "run"), Counter(line["kind"] for line in skipped)
    assert row["data/skipped"] == 12
    assert {kind: row[f"data/skipped/{kind}"] for kind in kinds} == kinds
    assert f"{places[0]}: does not parse as JSON" in (screen := capfd.readouterr().err)
    assert stream or "left out: 12 entries in all" in screen


def test_a_prompt_that_is_too_long_is_skipped_whole(assets: Assets, tmp_path: Path) -> None:
    good = entries(assets.train)[0]
    long = good | {"problem": "Which shape comes first? " * 200, "problem_id": "long"}
    data = write_data(tmp_path / "data.json", [long, good])
    trainer(assets, tmp_path / "run", dataset_name=data, **IN_ORDER, max_prompt_length=400, max_steps=2).train()
    row = last_metrics(tmp_path / "run")
    assert row["data/skipped/too_long"] == row["data/skipped"] == 2
    (line, _) = run_lines(tmp_path / "run", "skipped.jsonl")
    assert ("400" in line["message"], line["path"]) == (True, good["path"])
    assert {line["problem_id"] for line in run_lines(tmp_path / "run", "rollouts.jsonl")} == {str(good["problem_id"])}


def test_sft_skips_and_reports_too(assets: Assets, broken: dict[str, Path], tmp_path: Path) -> None:
    good = entries(assets.sft)[0]
    bad = [good | {"path": str(path)} for name, path in broken.items() if name != "image"]
    no_thought = {key: value for key, value in good.items() if key != "process"}
    long = good | {"process": "<think>" + "red " * 600 + "</think>"}
    wordy = good | {"problem": "Which shape comes first? " * 60}
    data = write_data(tmp_path / "data.json", [*bad, no_thought, long, wordy, good])
    limits = {"max_length": 500, "max_prompt_length": 200}
    sft_trainer(assets, tmp_path / "run", dataset_name=data, **IN_ORDER, **limits, max_steps=1).train()
    row = last_metrics(tmp_path / "run")
    assert row["data/skipped"] == len(bad) + 3
    assert row["data/skipped/missing_field"] == row["data/skipped/missing_file"] == 1
    assert row["data/skipped/too_long"] == 2
    messages = [line["message"] for line in run_lines(tmp_path / "run", "skipped.jsonl")]
    assert [limit for m in messages for limit in ("500", "200") if f"the limit is {limit}" in m] == ["500", "200"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_of_nothing_usable_stops_with_one_message(
    workers: int, assets: Assets, broken: dict[str, Path], tmp_path: Path, capfd: Capture
) -> None:
    good = entries(assets.train)[0]
    data = write_data(tmp_path / "data.json", [good | {"path": str(broken[name])} for name in ("missing", "empty")])
    flags = train_flags(assets, tmp_path / "run", dataset_name=data, data__root="/", data__workers=workers)
    assert run_main(main, flags) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: {data}: none of its 2 samples can be used (")
    assert "missing_file 1" in last
    assert str(broken["missing"]) in last or str(broken["empty"]) in last
    assert checkpoints(tmp_path / "run") == []


def test_samples_that_fail_later_stop_the_run_too(assets: Assets, tmp_path: Path) -> None:
    """The files vanish while the run runs (a network drive): the checkpoints before survive."""
    clips = [tmp_path / f"{i}.mp4" for i in range(3)]
    for clip, entry in zip(clips, entries(assets.train), strict=False):
        clip.write_bytes(Path(entry["path"]).read_bytes())
    given = [entry | {"path": clip.name} for clip, entry in zip(clips, entries(assets.train), strict=False)]
    data = write_data(tmp_path / "data.json", given)
    options = {"data__cache_mb": 0, "data__prefetch": 1, "max_steps": 9, "save_steps": 2}
    run = trainer(assets, tmp_path / "run", dataset_name=data, **options)
    original = run.train_batch

    def batch() -> None:
        if run.step == 4:
            for clip in clips:
                clip.unlink()
        original()

    run.train_batch = batch  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"none of its 3 samples can be used \(missing_file 3\)"):
        run.train()
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [2, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_name": "gone.json"}, "no such data file"),
        ({"data__eval_path": "gone.json"}, "no such data file"),
        ({"model_name_or_path": "./gone"}, "model_name_or_path: there is no folder './gone', and a hub id is of the"),
        ({"model_name_or_path": "gone"}, "model_name_or_path: there is no folder 'gone'"),
        ({"reward__functions": "toy_rewards:unever"}, "did you mean|has no 'unever'"),
        ({"reward__functions": "toy_reward:uneven"}, "toy_reward"),
        ({"device": "cuda:99"}, "device"),
        ({"device": "meta"}, "device: expected auto, cpu, cuda or cuda:N, got 'meta'"),
        ({"lora__rank": 2, "lora__target_modules": "nothing"}, "lora.target_modules: .*nothing"),
        ({"video__backend": "magic"}, "backend"),
    ],
)
def test_a_wrong_option_ends_before_training(
    change: dict[str, Any], message: str, assets: Assets, tmp_path: Path, capfd: Capture
) -> None:
    code = run_main(main, train_flags(assets, tmp_path / "run", max_steps=1, **change))
    error = capfd.readouterr().err.strip().splitlines()
    assert code in (1, 2)
    assert error[-1].startswith("error: ")
    assert re.search(message, error[-1])
    assert not (tmp_path / "run" / "rollouts.jsonl").exists() or not run_lines(tmp_path / "run", "rollouts.jsonl")


def test_a_model_that_is_not_there_leaves_no_folder(assets: Assets, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note.txt").write_text("mine")
    for name in ("run", "used"):
        with pytest.raises(ConfigError, match="there is no folder"):
            trainer(assets, tmp_path / name, model_name_or_path="a/b/c")
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "note.txt"]


def lose_tokenizer(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 99_999), "model_name_or_path: cannot load"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}'), "model_name_or_path: cannot load"),
        (lose_tokenizer, "tokenizer|cannot load"),
        (pickle_weights, "model_name_or_path: cannot load"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_message(
    damage: Callable[[Path], None], words: str, assets: Assets, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(assets.model, tmp_path / "model"))
    damage(folder)
    with pytest.raises(ConfigError, match=words):
        trainer(assets, tmp_path / "run", model_name_or_path=folder)


def test_a_reward_that_is_no_number_names_its_function(assets: Assets, tmp_path: Path) -> None:
    run = trainer(assets, tmp_path / "run", reward__functions="toy_rewards:not_finite", max_steps=1)
    with pytest.raises(ConfigError, match=r"toy_rewards:not_finite.*finite number"):
        run.train()


def test_an_evaluation_with_bad_samples_reports_them(
    assets: Assets, broken: dict[str, Path], tmp_path: Path, capfd: Capture
) -> None:
    good, gone = entries(assets.dev), str(broken["missing"])
    bad = [good[0] | {"path": gone}, good[0] | {"problem": f"Which {HALF} comes first?"}]
    data = write_data(tmp_path / "dev.json", [*good, *bad])
    paths = {"dataset_name": data, "data__eval_path": data, **IN_ORDER}
    trainer(assets, tmp_path / "run", **paths, max_steps=1).train()
    row = run_lines(tmp_path / "run", "metrics.jsonl")[-1]
    assert (row["eval/skipped"], row["eval/samples"]) == (1, len(good))  # one was no sample at all
    lines = run_lines(tmp_path / "run", "skipped.jsonl")
    kinds = [("train", "bad_text"), ("eval", "bad_text"), ("eval", "missing_file")]
    assert [(line["split"], line["kind"]) for line in lines] == kinds
    assert lines[-1]["path"] == gone
    text = write_data(tmp_path / "data.json", [*good, bad[1]])
    assert run_evaluate(assets, tmp_path / "eval", dataset_name=text, data__root="/") == 0
    assert "data: 1 row cannot be used; the first: " in capfd.readouterr().err
    assert len(run_lines(tmp_path / "eval", "answers.jsonl")) == len(good)
