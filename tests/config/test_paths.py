"""Paths in a run's config.yaml are found again from another folder, and where the run's folder was moved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from videor1.config import DataConfig, TrainConfig
from videor1.config.cli import changed_options, load_run_config, save_run_config
from videor1.config.paths import absolute


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and a run, which holds a model and data of its own; it is the current one."""
    for name in ("model", "runs/one/demo/model", "media", "other"):
        (tmp_path / "project" / name).mkdir(parents=True)
    for name in ("data.json", "runs/one/demo/train.json", "shard-1.jsonl"):
        (tmp_path / "project" / name).write_text("[]")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def saved(run: str = "runs/one", **values: object) -> TrainConfig:
    config = TrainConfig(model_name_or_path="model", dataset_name="data.json", output_dir=run)
    for name, value in values.items():
        setattr(config, name, value)
    save_run_config(config, run, run)
    return config


def read(folder: Path) -> TrainConfig:
    return load_run_config(TrainConfig, folder / "config.yaml")


def test_relative_paths_are_written_as_absolute_ones(project: Path) -> None:
    data = DataConfig(root="media", eval_path="./dev.json", cache_dir="cache")
    config = saved(data=data)
    written = yaml.safe_load((project / "runs/one/config.yaml").read_text())
    assert written["model_name_or_path"] == str(project / "model")
    assert written["dataset_name"] == str(project / "data.json")
    assert written["output_dir"] == str(project / "runs/one")
    assert written["data"]["root"] == str(project / "media")
    assert written["data"]["eval_path"] == str(project / "dev.json")
    assert written["data"]["cache_dir"] == str(project / "cache")
    assert config.data is data
    assert data.root == "media"  # the caller's config stays as it was


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_name_or_path", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("dataset_name", "hf://user/name/subset"),
        ("dataset_name", "s3://bucket/*.jsonl"),
        ("data.cache_dir", "~/cache"),
        ("data.root", "/media"),
        ("data.root", None),
        ("run_name", "model"),
        ("data.split", "train"),
    ],
)
def test_what_is_no_relative_path_stays(name: str, value: str | None, project: Path) -> None:
    assert absolute(name, value) == value


def test_each_of_several_paths(project: Path) -> None:
    given = "shard-1.jsonl, more/*.jsonl,s3://bucket/x"
    assert absolute("dataset_name", given) == f"{project}/shard-1.jsonl,{project}/more/*.jsonl,s3://bucket/x"
    (project / "a,b.json").write_text("[]")
    assert absolute("dataset_name", "a,b.json") == f"{project}/a,b.json"


def test_links_and_parents_are_kept(project: Path) -> None:
    """link/.. is the parent of the link's target."""
    assert absolute("data.root", "link/../media") == f"{project}/link/../media"


def test_from_another_working_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved()
    monkeypatch.chdir(project / "other")
    found = read(project / "runs" / "one")
    assert (found.model_name_or_path, found.dataset_name) == (str(project / "model"), str(project / "data.json"))


def test_a_run_that_was_moved_finds_its_own_files_and_those_outside(project: Path, tmp_path: Path) -> None:
    saved(data=DataConfig(eval_path="runs/one/demo/train.json", root="media"))
    moved = tmp_path / "deep" / "er" / "two"
    moved.parent.mkdir(parents=True)
    shutil.move(project / "runs" / "one", moved)
    found = read(moved)
    assert found.model_name_or_path == str(project / "model")
    assert found.data.eval_path == str(moved / "demo" / "train.json")
    assert found.data.root == str(project / "media")


def test_a_copy_uses_its_own_files(project: Path, tmp_path: Path) -> None:
    saved(model_name_or_path="runs/one/demo/model")
    shutil.copytree(project / "runs" / "one", tmp_path / "copy")
    assert read(tmp_path / "copy").model_name_or_path == str(tmp_path / "copy" / "demo" / "model")
    assert read(project / "runs" / "one").model_name_or_path == str(project / "runs" / "one" / "demo" / "model")


def test_a_whole_project_that_was_moved(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(dataset_name="shard-1.jsonl,*.jsonl")
    monkeypatch.chdir(tmp_path)
    shutil.move(project, tmp_path / "new")
    found = read(tmp_path / "new" / "runs" / "one")
    assert found.model_name_or_path == str(tmp_path / "new" / "model")
    assert found.dataset_name == f"{tmp_path}/new/shard-1.jsonl,{tmp_path}/new/*.jsonl"


def test_an_early_config_with_relative_paths(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "model_name_or_path: model\ndataset_name: runs/one/demo/train.json\noutput_dir: runs/one\n"
    (project / "runs" / "one" / "config.yaml").write_text(text)
    same = read(project / "runs" / "one")
    assert (same.model_name_or_path, same.dataset_name) == ("model", "runs/one/demo/train.json")
    monkeypatch.chdir(project / "other")
    found = read(project / "runs" / "one")
    assert found.model_name_or_path == str(project / "model")
    assert found.dataset_name == str(project / "runs" / "one" / "demo" / "train.json")


def test_the_same_file_by_another_name_is_no_change(project: Path) -> None:
    config = saved()
    assert changed_options(read(Path("runs/one")), config) == []
    other = TrainConfig(model_name_or_path="model", dataset_name="other.json", output_dir="runs/one")
    (change,) = changed_options(read(Path("runs/one")), other)
    assert change.startswith(f"dataset_name: {project}/data.json -> ")


def test_what_is_gone_is_named_as_it_was(project: Path, tmp_path: Path) -> None:
    saved(dataset_name="nowhere.json")
    shutil.move(project / "runs" / "one", tmp_path / "two")
    assert read(tmp_path / "two").dataset_name == str(project / "nowhere.json")
