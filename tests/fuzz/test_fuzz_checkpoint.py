"""Whatever happens to a checkpoint's bytes is damage that is told, and never another exception."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import fuzz
from hypothesis import strategies as st

from videor1.config import TrainConfig
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.model import VideoLM, load_model
from videor1.model.manifest import MANIFEST
from videor1.training.checkpoint import find_damage, read_trainer, save
from videor1.training.optim import make_optimizer
from videor1.training.trainer_state import check_state

STATE: dict[str, Any] = {
    "position": [3, 4],
    "fixed": {"lora": None},
    "counters": {"nonfinite_steps": 2, "num_tokens": 5},
    "nonfinite_in_a_row": 0,
    "skipped": {"decode": 1},
    "pending_metrics": [],
    "evaluated_at": -1,
    "accuracy": 0.5,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def model(assets: Assets) -> VideoLM:
    return load_model(TrainConfig(model_name_or_path=str(assets.model), device="cpu", freeze_vision=True))


@pytest.fixture(scope="module")
def whole(model: VideoLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is whole; read only."""
    optimizer = make_optimizer(model.trainable(), TrainConfig())
    folder = save(tmp_path_factory.mktemp("fuzz"), 2, model, optimizer, STATE)
    assert find_damage(folder) is None
    return folder


@pytest.fixture(scope="module")
def scratch(whole: Path) -> Callable[[str, bytes], Path]:
    """Put a file with other content into a copy of the checkpoint in which everything else is as it was."""
    folder = Path(shutil.copytree(whole, whole.with_name("step-2-copy")))

    def put(name: str, data: bytes) -> Path:
        for path in whole.rglob("*"):
            copied = folder / path.relative_to(whole)
            if path.is_file() and (not copied.exists() or copied.read_bytes() != path.read_bytes()):
                shutil.copyfile(path, copied)
        (folder / name).write_bytes(data)
        return folder

    return put


def mutated(data: bytes, draw: Any) -> bytes:
    at = draw(st.integers(0, max(0, len(data) - 1)))
    kind = draw(st.sampled_from(["flip", "cut", "insert", "remove", "repeat"]))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
    if kind == "remove":
        return data[:at] + data[at + 1 :]
    return data + data[at:]


def test_any_change_is_noticed_by_the_manifest(
    whole: Path, scratch: Callable[[str, bytes], Path], fuzz_seconds: float
) -> None:
    def check(data: st.DataObject) -> None:
        names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
        name = data.draw(st.sampled_from([name for name in names if name != MANIFEST]))
        before = (whole / name).read_bytes()
        after = mutated(before, data.draw)
        damage = find_damage(scratch(name, after))
        assert (damage is None) == (after == before)

    fuzz(fuzz_seconds / 4, st.data(), check)


def test_a_changed_manifest_is_no_other_exception(
    whole: Path, scratch: Callable[[str, bytes], Path], fuzz_seconds: float
) -> None:
    def check(data: st.DataObject) -> None:
        document = json.loads((whole / MANIFEST).read_text())
        name = data.draw(st.sampled_from(sorted(document["files"])))
        if data.draw(st.booleans()):
            document["files"][data.draw(st.text(max_size=20) | st.just(name))] = data.draw(JSON)
            text = json.dumps(document).encode()
        else:
            text = mutated((whole / MANIFEST).read_bytes(), data.draw)
        find_damage(scratch(MANIFEST, text))

    fuzz(fuzz_seconds / 4, st.data(), check)


def test_without_a_manifest_it_is_read_or_refused(
    whole: Path, model: VideoLM, scratch: Callable[[str, bytes], Path], fuzz_seconds: float
) -> None:
    def check(data: st.DataObject) -> None:
        names = ["trainer/state.json", "trainer/optimizer.safetensors", "config.json", "model.safetensors"]
        name = data.draw(st.sampled_from(names))
        folder = scratch(name, mutated((whole / name).read_bytes(), data.draw))
        (folder / MANIFEST).unlink()
        if find_damage(folder) is None and name != "model.safetensors":
            with contextlib.suppress(ConfigError):
                read_trainer(folder, model, {"lora": None})

    fuzz(fuzz_seconds / 4, st.data(), check)


def test_a_state_is_read_or_refused(fuzz_seconds: float) -> None:
    def check(data: st.DataObject) -> None:
        state = copy.deepcopy(STATE) | {"step": 2}
        where: Any = state
        for _ in range(data.draw(st.integers(1, 2))):
            key = data.draw(st.sampled_from(sorted(where))) if isinstance(where, dict) and where else None
            if key is None:
                break
            inside, where = where, where[key]
        inside[key or "x"] = data.draw(JSON)
        with contextlib.suppress(ValueError):
            check_state(json.loads(json.dumps(state)), Path("step-2"))

    fuzz(fuzz_seconds / 4, st.data(), check)
