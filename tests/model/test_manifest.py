"""A manifest notices whatever happens to the files of a folder after it was written, and accepts what has no part."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from videor1.model.manifest import MANIFEST, DamagedError, check_manifest, file_entry, is_plain, write_manifest

Change = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "step-4"
    (made / "trainer").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 9)
    (made / "trainer" / "state.json").write_text('{"step": 4}')
    write_manifest(made)
    return made


def listed(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def flip(path: Path, at: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(bytes(data))


def turn_into_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def entry(name: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        document = listed(folder)
        document["files"].setdefault(name, dict(document["files"]["config.json"])).update(values)
        (folder / MANIFEST).write_text(json.dumps(document))

    return change


def manifest(text: str) -> Change:
    return lambda folder: (folder / MANIFEST).write_text(text)


def added(name: str) -> tuple[Change, str]:
    return lambda folder: (folder / name).write_bytes(b"x"), f"{name} was added"


DAMAGE: dict[str, tuple[Change, str]] = {
    "a bit": (lambda f: flip(f / "model.safetensors"), "model.safetensors has changed"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 50), "has 50 bytes instead of 2304"),
    "longer": (lambda f: os.truncate(f / "model.safetensors", 5000), "has 5000 bytes instead of 2304"),
    "empty": (lambda f: os.truncate(f / "config.json", 0), "config.json has 0 bytes"),
    "gone": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "a folder": (turn_into_a_folder, "model.safetensors is missing"),
    "added weights": added("model-2.safetensors"),
    "added pickle": added("pytorch_model.bin"),
    "added adapter": added("adapter_config.json"),
    "added template": added("chat_template.jinja"),
    "manifest empty": (manifest(""), "cannot be read"),
    "manifest cut": (lambda f: os.truncate(f / MANIFEST, 60), "cannot be read"),
    "manifest {}": (manifest("{}"), "cannot be read"),
    "manifest a list": (manifest("[]"), "cannot be read"),
    "manifest nested": (manifest("[" * 100_000), "cannot be read"),
    "manifest binary": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "cannot be read"),
    "no files": (manifest('{"version": 1, "files": {}}'), "lists config.json"),
    "files a list": (manifest('{"version": 1, "files": ["config.json"]}'), "lists config.json"),
    "later version": (manifest('{"version": 2, "files": {}}'), "expected version 1, got 2"),
    "leads out": (entry("../config.json"), "not the name of a file"),
    "absolute": (entry("/etc/hostname"), "not the name of a file"),
    "deeper": (entry("other/state.json"), "not the name of a file"),
    "no name": (entry(""), "not the name of a file"),
    "digest a number": (entry("config.json", blake2b=3), "64 hexadecimal digits"),
    "digest short": (entry("config.json", blake2b="ab"), "64 hexadecimal digits"),
    "digest another": (entry("config.json", blake2b="0" * 64), "config.json has changed"),
    "size negative": (entry("config.json", bytes=-1), "expected bytes"),
    "size a bool": (entry("config.json", bytes=True), "expected bytes"),
    "lists too much": (entry("model-2.safetensors"), "model-2.safetensors is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("trainer", [True, False])
def test_damage_is_noticed(kind: str, trainer: bool, folder: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(DamagedError, match=message):
        check_manifest(folder, trainer=trainer)


@pytest.mark.parametrize(
    "damage",
    [
        lambda trainer: (trainer / "state.json").write_text('{"step": 5}'),
        lambda trainer: (trainer / "state.json").unlink(),
        shutil.rmtree,
        lambda trainer: (trainer / "adapter.safetensors").write_bytes(b""),
    ],
)
def test_the_trainers_state_matters_to_a_resume_only(damage: Change, folder: Path) -> None:
    damage(folder / "trainer")
    assert check_manifest(folder, trainer=False)
    with pytest.raises(DamagedError, match=r"trainer/"):
        check_manifest(folder, trainer=True)


def test_what_has_no_part_in_loading_may_be_there(folder: Path) -> None:
    (folder / "README.md").write_text("A model card, as the hub adds one.")
    (folder / ".gitattributes").write_text("")
    (folder / "samples").mkdir()
    (folder / "samples" / "one.json").write_text("")
    moved = folder.rename(folder.with_name("elsewhere"))
    assert check_manifest(moved, trainer=True)
    assert check_manifest(Path(shutil.copytree(moved, folder)), trainer=True)
    # A folder without a manifest is not checked, unless it is a link to nowhere.
    (folder / MANIFEST).unlink()
    assert not check_manifest(folder, trainer=True)
    (folder / MANIFEST).symlink_to("nowhere")
    with pytest.raises(OSError, match=r"nowhere|No such file"):
        check_manifest(folder, trainer=True)
    # Plain names.
    assert all(map(is_plain, ["a", "a.b", "..a", "a..", "…"]))
    others = ["", ".", "..", "a/b", "/a", "a/", "../a", "a\\b", "C:a", "a\0", None, 3, ["a"]]
    assert not any(map(is_plain, others))


def test_the_digests_are_those_of_b2sum_or_given(folder: Path) -> None:
    tool = shutil.which("b2sum")
    for name, given in listed(folder)["files"].items() if tool else ():
        shown = subprocess.run([tool, "-l", "256", folder / name], capture_output=True, text=True, check=True).stdout
        assert shown.split()[0] == given["blake2b"]
    # Known entries are taken over.
    before, name = listed(folder), "trainer/state.json"
    write_manifest(folder, {name: file_entry(folder / name)})
    assert listed(folder) == before
    write_manifest(folder, {name: {"bytes": 1, "blake2b": "0" * 64}})
    assert listed(folder)["files"][name]["bytes"] == 1
