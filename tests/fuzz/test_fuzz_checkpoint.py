"""Whatever happens to a checkpoint's bytes is damage that is told, and never another exception."""

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import VALUES, damaged, fuzz
from hypothesis import strategies as st

from videor1.config import TrainConfig
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.model import VideoLM, load_model
from videor1.model.manifest import MANIFEST
from videor1.training.checkpoint import find_damage, read_trainer, save
from videor1.training.optim import make_optimizer
from videor1.training.trainer_state import check_state

STATE: dict[str, Any] = {"position": [3, 4], "fixed": {"lora": None}, "skipped": {"decode": 1}, "evaluated_at": -1}
STATE |= {"counters": {"nonfinite_steps": 2, "num_tokens": 5}, "nonfinite_in_a_row": 0, "accuracy": 0.5}
STATE |= {"pending_metrics": []}
Put = Callable[[str, bytes], Path]


@pytest.fixture(scope="module")
def model(assets: Assets) -> VideoLM:
    return load_model(TrainConfig(model_name_or_path=str(assets.model), device="cpu", freeze_vision=True))


@pytest.fixture(scope="module")
def whole(model: VideoLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = save(tmp_path_factory.mktemp("fuzz"), 2, model, make_optimizer(model.trainable(), TrainConfig()), STATE)
    assert find_damage(folder) is None
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def put(whole: dict[str, bytes], tmp_path: Path) -> Put:
    """Write a file with other content into a copy of the checkpoint in which everything else is as it was."""
    folder, changed = tmp_path / "step-2", set(whole)

    def write(name: str, data: bytes) -> Path:
        for restored in changed | {MANIFEST}:
            (folder / restored).parent.mkdir(parents=True, exist_ok=True)
            (folder / restored).write_bytes(whole[restored])
        changed.clear()
        changed.add(name)
        (folder / name).write_bytes(data)
        return folder

    return write


def draw_damage(data: st.DataObject, whole: dict[str, bytes], names: list[str]) -> tuple[str, bytes]:
    name = data.draw(st.sampled_from(names))
    return name, data.draw(damaged(st.just(whole[name])))


def test_any_change_is_noticed_by_the_manifest(whole: dict[str, bytes], put: Put, fuzz_times: int) -> None:
    def check(data: st.DataObject) -> None:
        name, after = draw_damage(data, whole, sorted(whole.keys() - {MANIFEST}))
        assert (find_damage(put(name, after)) is None) == (after == whole[name])

    fuzz(100 * fuzz_times, st.data(), check)


def test_a_changed_manifest_is_no_other_exception(whole: dict[str, bytes], put: Put, fuzz_times: int) -> None:
    def check(data: st.DataObject) -> None:
        _, text = draw_damage(data, whole, [MANIFEST])
        if data.draw(st.booleans()):
            document = json.loads(whole[MANIFEST])
            names = st.sampled_from(sorted(document["files"]))
            document["files"][data.draw(st.text(max_size=20) | names)] = data.draw(VALUES)
            text = json.dumps(document).encode()
        find_damage(put(MANIFEST, text))

    fuzz(150 * fuzz_times, st.data(), check)


def test_without_a_manifest_it_is_read_or_refused(
    whole: dict[str, bytes], model: VideoLM, put: Put, fuzz_times: int
) -> None:
    names = ["trainer/state.json", "trainer/optimizer.safetensors", "config.json", "model.safetensors"]

    def check(data: st.DataObject) -> None:
        name, after = draw_damage(data, whole, names)
        folder = put(name, after)
        (folder / MANIFEST).unlink()
        if find_damage(folder) is None and name != "model.safetensors":
            with contextlib.suppress(ConfigError):
                read_trainer(folder, model, {"lora": None})

    fuzz(100 * fuzz_times, st.data(), check)


def test_a_state_is_read_or_refused(fuzz_times: int) -> None:
    def check(data: st.DataObject) -> None:
        inside: Any = copy.deepcopy(STATE) | {"step": 2}
        state = inside
        key = data.draw(st.sampled_from(sorted(inside)))
        if data.draw(st.booleans()) and isinstance(inside[key], dict) and inside[key]:
            inside = inside[key]
            key = data.draw(st.sampled_from(sorted(inside)))
        inside[key] = data.draw(VALUES)
        with contextlib.suppress(ValueError):
            check_state(json.loads(json.dumps(state)), Path("step-2"))

    fuzz(500 * fuzz_times, st.data(), check)
