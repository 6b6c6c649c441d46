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


def saved(**values: object) -> TrainConfig:
    given = {"model_name_or_path": "model", "dataset_name": "data.json", "output_dir": "runs/one"}
    config = TrainConfig(**given | values)
    save_run_config(config, "runs/one", "runs/one")
    return config


def read(folder: Path) -> TrainConfig:
    return load_run_config(TrainConfig, folder / "config.yaml")


def test_relative_paths_are_written_as_absolute_ones(project: Path) -> None:
    data = DataConfig(root="media", eval_path="./dev.json", cache_dir="cache")
    config = saved(data=data)
    written = yaml.safe_load((project / "runs/one/config.yaml").read_text())
    found = [written["model_name_or_path"], written["dataset_name"], written["output_dir"]]
    found += [written["data"][name] for name in ("root", "eval_path", "cache_dir")]
    assert found == [f"{project}/{name}" for name in ("model", "data.json", "runs/one", "media", "dev.json", "cache")]
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


def test_each_of_several_paths_and_links_and_parents_as_they_are(project: Path) -> None:
    given = "shard-1.jsonl, more/*.jsonl,s3://bucket/x"
    assert absolute("dataset_name", given) == f"{project}/shard-1.jsonl,{project}/more/*.jsonl,s3://bucket/x"
    (project / "a,b.json").write_text("[]")
    assert absolute("dataset_name", "a,b.json") == f"{project}/a,b.json"
    # link/.. is the parent of the link's target
    assert absolute("data.root", "link/../media") == f"{project}/link/../media"


def test_a_run_that_was_moved_finds_its_own_files_and_those_outside(project: Path, tmp_path: Path) -> None:
    saved(data=DataConfig(eval_path="runs/one/demo/train.json", root="media"))
    moved = tmp_path / "deep" / "er" / "two"
    moved.parent.mkdir(parents=True)
    shutil.move(project / "runs" / "one", moved)
    found = read(moved)
    assert (found.model_name_or_path, found.dataset_name) == (f"{project}/model", f"{project}/data.json")
    assert (found.data.eval_path, found.data.root) == (f"{moved}/demo/train.json", f"{project}/media")


def test_a_copy_uses_its_own_files_and_those_outside_of_the_original(project: Path, tmp_path: Path) -> None:
    saved(model_name_or_path="runs/one/demo/model", data=DataConfig(root="media"))
    shutil.copytree(project, tmp_path / "copy")
    for folder in (tmp_path / "copy", project):
        found = read(folder / "runs" / "one")
        assert (found.model_name_or_path, found.data.root) == (f"{folder}/runs/one/demo/model", f"{project}/media")


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
    for folder, root in ((project, ""), (project / "other", f"{project}/")):
        monkeypatch.chdir(folder)
        found = read(project / "runs" / "one")
        assert (found.model_name_or_path, found.dataset_name) == (f"{root}model", f"{root}runs/one/demo/train.json")


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
