"""A resume from a damaged checkpoint stops, or goes back to the newest whole one and says so; early ones go on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, entries, metrics, sft_trainer, train_flags, trainer, write_data
from safetensors.torch import load_file, save_file

from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.model import load_model
from videor1.model.manifest import MANIFEST
from videor1.model.save import base_digest, sampled_digest
from videor1.train import main
from videor1.training.checkpoint import checkpoints, find_resume
from videor1.training.trainer_state import check_optimizer

OPTIONS = {"max_steps": 3, "save_steps": 1, "save_total_limit": 3}
VARIANTS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora__rank": 2}, "bf16": {"bf16": True}}


@pytest.fixture(scope="module")
def saved(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run folders with checkpoints of steps 1 to 3; read only."""
    made: dict[str, Path] = {}

    def run(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("saved") / variant
            trainer(assets, made[variant], **OPTIONS, **VARIANTS[variant]).train()
        return made[variant]

    return run


@pytest.fixture
def run_dir(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved("full"), tmp_path / "run"))


def step(run_dir: Path, number: int = 3) -> Path:
    return run_dir / "checkpoints" / f"step-{number}"


def flip(path: Path, at: int = -9) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    found = load_file(path)
    change(found)
    save_file(found, path, metadata={"format": "pt"})


def state(folder: Path, **values: Any) -> None:
    file = folder / "trainer" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def zero_moments(found: dict[str, torch.Tensor]) -> None:
    for key in found:
        if "/exp_avg" in key:
            found[key].zero_()


def nan_weight(found: dict[str, torch.Tensor]) -> None:
    next(iter(found.values())).view(-1)[0] = float("nan")


OPTIMIZER, MODEL, STATE = "trainer/optimizer.safetensors", "model.safetensors", "trainer/state.json"
DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of the weights": lambda f: flip(f / MODEL),
    "a bit of the moments": lambda f: flip(f / OPTIMIZER),
    "a bit of a header": lambda f: flip(f / MODEL, 20),
    "a bit of the template": lambda f: flip(f / "chat_template.jinja"),
    "a NaN weight": lambda f: tensors(f / MODEL, nan_weight),
    "a tensor gone": lambda f: tensors(f / MODEL, lambda t: t.pop(next(iter(t)))),
    "a tensor added": lambda f: tensors(f / MODEL, lambda t: t.update(more=torch.zeros(1))),
    "weights cut": lambda f: os.truncate(f / MODEL, 5000),
    "moments cut": lambda f: os.truncate(f / OPTIMIZER, 5000),
    "moments emptied": lambda f: tensors(f / OPTIMIZER, zero_moments),
    "moments gone": lambda f: (f / OPTIMIZER).unlink(),
    "step edited": lambda f: state(f, step=2),
    "position edited": lambda f: state(f, position=1),
    "state cut": lambda f: os.truncate(f / STATE, 40),
    "state gone": lambda f: (f / STATE).unlink(),
    "trainer gone": lambda f: shutil.rmtree(f / "trainer"),
    "adapter added": lambda f: shutil.copy(f / MODEL, f / "trainer" / "adapter.safetensors"),
    "pickle added": lambda f: (f / "pytorch_model.bin").write_bytes(b"x"),
    "pickle instead": lambda f: (f / MODEL).rename(f / "pytorch_model.bin"),
    "index added": lambda f: (f / "model.safetensors.index.json").write_text("{}"),
    "manifest emptied": lambda f: (f / MANIFEST).write_text("{}"),
    "manifest cut": lambda f: os.truncate(f / MANIFEST, 99),
    "everything gone": lambda f: [p.unlink() for p in f.rglob("*") if p.is_file()],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_auto_goes_back_to_the_newest_whole_one(kind: str, run_dir: Path) -> None:
    DAMAGE[kind](step(run_dir))
    said: list[str] = []
    assert find_resume("auto", run_dir, said.append) == step(run_dir, 2)
    assert len(said) == 1
    assert f"{step(run_dir)}: a damaged checkpoint (" in said[0]
    assert said[0].endswith(f"; going on from {step(run_dir, 2)}")
    with pytest.raises(ConfigError, match=r"step-3: a damaged checkpoint .*resume from another one"):
        find_resume(str(step(run_dir)), run_dir)


def test_a_run_goes_on_from_the_whole_one_and_says_so(
    assets: Assets, run_dir: Path, saved: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    flip(step(run_dir) / MODEL)
    shutil.rmtree(step(run_dir, 2) / "trainer")
    assert run_main(main, train_flags(assets, run_dir, resume="auto", **OPTIONS)) == 0
    error = capfd.readouterr().err
    assert "step-3: a damaged checkpoint (" in error
    assert "step-2: a damaged checkpoint (" in error
    assert error.count(f"going on from {step(run_dir, 1)}") == 2
    assert_same_run(run_dir, saved("full"))


def test_no_whole_checkpoint_is_no_new_start(assets: Assets, run_dir: Path) -> None:
    for number in (1, 2, 3):
        flip(step(run_dir, number) / MODEL)
    before = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"step-3: a damaged .*no other checkpoint of the run is whole \(3 in all\)"):
        trainer(assets, run_dir, resume="auto", **OPTIONS)
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_under_another_steps_name(assets: Assets, run_dir: Path) -> None:
    step(run_dir).rename(step(run_dir, 9))
    said: list[str] = []
    assert find_resume("auto", run_dir, said.append) == step(run_dir, 2)
    assert "state.json says step 3, the folder's name step-9" in said[0]
    moved = step(run_dir, 9).rename(run_dir / "kept")  # a copy with a name of its own
    assert find_resume(str(moved), run_dir) == moved


def as_early(run_dir: Path, assets: Assets) -> None:
    """As a version before manifests and digests of data wrote it."""
    for _, folder in checkpoints(run_dir):
        (folder / MANIFEST).unlink()
        file = folder / "trainer" / "state.json"
        found = json.loads(file.read_text())
        model = load_model(trainer_config(assets))
        found["fixed"] = {name: value for name, value in found["fixed"].items() if "samples" not in name}
        found["fixed"]["model_name_or_path (digest of its weights)"] = sampled_digest(model)
        file.write_text(json.dumps(found))


def trainer_config(assets: Assets) -> Any:
    from videor1.config import TrainConfig

    return TrainConfig(model_name_or_path=str(assets.model), device="cpu")


def test_an_early_run_goes_on(assets: Assets, run_dir: Path, saved: Callable[[str], Path]) -> None:
    as_early(run_dir, assets)
    shutil.rmtree(step(run_dir))
    trainer(assets, run_dir, resume="auto", **OPTIONS).train()
    assert metrics(run_dir) == metrics(saved("full"))


def missing(found: dict[str, torch.Tensor]) -> None:
    del found[next(name for name in found if "q_proj" in name)]


def narrower(found: dict[str, torch.Tensor]) -> None:
    name = next(name for name in found if "q_proj" in name)
    found[name] = found[name][:1].clone()


def rounded(found: dict[str, torch.Tensor]) -> None:
    found.update({name: tensor.bfloat16() for name, tensor in found.items()})


EARLY: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "weights lack a tensor": ("full", lambda f: tensors(f / MODEL, missing), "missing keys in its weights"),
    "weights have one more": (
        "full",
        lambda f: tensors(f / MODEL, lambda t: t.update(more=torch.zeros(1))),
        "unexpected keys",
    ),
    "weights of another shape": ("full", lambda f: tensors(f / MODEL, narrower), "cannot load|mismatched"),
    "weights of another dtype": ("full", lambda f: tensors(f / MODEL, rounded), "stored as BF16, the run saves F32"),
    "a NaN weight": ("full", lambda f: tensors(f / MODEL, nan_weight), "NaN or Inf in its weights"),
    "a pickle": ("full", lambda f: (f / MODEL).rename(f / "pytorch_model.bin"), "not a whole safetensors|neither"),
    "moments lack a tensor": (
        "full",
        lambda f: tensors(f / OPTIMIZER, lambda t: t.pop(next(iter(t)))),
        "of every trained parameter",
    ),
    "moments gone": ("full", lambda f: tensors(f / OPTIMIZER, lambda t: t.clear()), "of every trained parameter"),
    "another step": ("full", lambda f: state(f, step=2), "state.json says step 2, the folder's name step-3"),
    "a step of text": ("full", lambda f: state(f, step="3"), "step: expected a whole number"),
    "no position": ("full", lambda f: state(f, position=None), "position: expected"),
    "more steps not finite": (
        "full",
        lambda f: state(f, counters={"nonfinite_steps": 1}),
        "the optimizer's step: expected 2",
    ),
    "a strange part": (
        "full",
        lambda f: (f / "trainer" / "optimizer-a-of-b.safetensors").write_bytes((f / OPTIMIZER).read_bytes()),
        "expected all parts",
    ),
    "one part of two": (
        "full",
        lambda f: (f / OPTIMIZER).rename(f / "trainer" / "optimizer-00001-of-00002.safetensors"),
        "expected all parts",
    ),
    "adapters lack a tensor": (
        "lora",
        lambda f: tensors(f / "trainer" / "adapter.safetensors", lambda t: t.pop(next(iter(t)))),
        "trained parameters are not this run's",
    ),
    "adapters have one more": (
        "lora",
        lambda f: tensors(f / "trainer" / "adapter.safetensors", lambda t: t.update(more=torch.zeros(1))),
        "trained parameters are not this run's",
    ),
    "adapters gone": (
        "lora",
        lambda f: (f / "trainer" / "adapter.safetensors").unlink(),
        "trained parameters are not this run's",
    ),
    "a NaN in an adapter": (
        "lora",
        lambda f: tensors(f / "trainer" / "adapter.safetensors", nan_weight),
        "NaN or Inf in its weights",
    ),
    "master weights lack a tensor": (
        "bf16",
        lambda f: tensors(f / "trainer" / "master.safetensors", lambda t: t.pop(next(iter(t)))),
        "trained parameters are not this run's",
    ),
    "master weights of another dtype": (
        "bf16",
        lambda f: tensors(f / "trainer" / "master.safetensors", rounded),
        "trained parameters are not this run's",
    ),
}


@pytest.mark.parametrize("kind", EARLY)
def test_what_is_noticed_without_a_manifest(
    kind: str, assets: Assets, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    variant, damage, message = EARLY[kind]
    run_dir = Path(shutil.copytree(saved(variant), tmp_path / "run"))
    (step(run_dir) / MANIFEST).unlink()
    damage(step(run_dir))
    with pytest.raises(ConfigError, match=f"step-3: a damaged checkpoint .*({message})"):
        trainer(assets, run_dir, resume=step(run_dir), **OPTIONS | {"max_steps": 4}, **VARIANTS[variant]).train()


def test_emptied_moments_are_told_without_a_manifest(
    assets: Assets, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (step(run_dir) / MANIFEST).unlink()
    tensors(step(run_dir) / OPTIMIZER, zero_moments)
    trainer(assets, run_dir, resume="auto", **OPTIONS).train()
    assert "the optimizer's moments are all 0" in capfd.readouterr().err


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_optimizer_of_a_run_is_whole(variant: str, assets: Assets, saved: Callable[[str], Path]) -> None:
    run = trainer(assets, saved(variant), resume="auto", **OPTIONS, **VARIANTS[variant])
    check_optimizer(load_file(step(saved(variant)) / OPTIMIZER), dict(run.model.trainable()), 3)
    run._leave_folder()


def test_a_damaged_checkpoint_is_no_model(assets: Assets, run_dir: Path) -> None:
    flip(step(run_dir) / MODEL)
    with pytest.raises(ConfigError, match=r"step-3 is damaged, or was changed .*model.safetensors has changed"):
        trainer(assets, run_dir.parent / "next", model_name_or_path=step(run_dir))
    assert not (run_dir.parent / "next").exists()
    shutil.rmtree(step(run_dir, 2) / "trainer")  # not a part of the model
    trainer(assets, run_dir.parent / "next", model_name_or_path=step(run_dir, 2))


@pytest.mark.parametrize("at", [0, 1, 7, -1])
def test_the_digest_of_a_model_reads_every_value(at: int, assets: Assets) -> None:
    model = load_model(trainer_config(assets))
    before, sampled = base_digest(model), sampled_digest(model)
    weight = model.hf.model.language_model.layers[0].mlp.up_proj.weight.detach().view(-1)
    weight[at] += 1e-6
    assert base_digest(model) != before
    weight[at] -= 1e-6
    other = weight[5].clone()
    weight[5] = weight[6]
    weight[6] = other
    assert base_digest(model) != before
    assert sampled


DATA: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "added": lambda e: [*e, e[0] | {"problem_id": 99}],
    "repeated": lambda e: [*e, e[0]],
    "gone": lambda e: e[:-1],
    "reversed": lambda e: e[::-1],
    "shuffled": lambda e: [*e[1:], e[0]],
    "problem": lambda e: [*e[:-1], e[-1] | {"problem": e[-1]["problem"] + " "}],
    "solution": lambda e: [*e[:-1], e[-1] | {"solution": "<answer>D</answer>"}],
    "options": lambda e: [e[0] | {"options": e[0]["options"][::-1]}, *e[1:]],
    "path": lambda e: [e[0] | {"path": e[1]["path"]}, *e[1:]],
    "id": lambda e: [e[0] | {"problem_id": "other"}, *e[1:]],
    "bad entry before": lambda e: [{"problem": "none"}, *e],
}


@pytest.fixture
def own_data(assets: Assets, saved: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    """Options of the saved run with a data file that may be written to, and a copy of the run on that data."""
    data = write_data(tmp_path / "data.json", entries(assets.train))
    options = OPTIONS | {"dataset_name": data, "data__root": assets.folder}
    shutil.copytree(saved("full"), tmp_path / "run")
    return options


@pytest.mark.parametrize("kind", DATA)
def test_changed_data_is_noticed(kind: str, assets: Assets, own_data: dict[str, Any], tmp_path: Path) -> None:
    write_data(own_data["dataset_name"], DATA[kind](entries(assets.train)))
    with pytest.raises(ConfigError, match=r"dataset_name \(digest of its samples\).*--data.changed_ok true"):
        trainer(assets, tmp_path / "run", resume="auto", **own_data).train()


def test_the_same_data_elsewhere_and_otherwise_written_goes_on(
    assets: Assets, own_data: dict[str, Any], tmp_path: Path
) -> None:
    """Its samples count: not the form of the file, nor where the data lie."""
    shutil.copytree(assets.folder, tmp_path / "moved")
    lines = "".join(json.dumps(entry) + "\n" for entry in json.loads(Path(assets.train).read_text()))
    (tmp_path / "moved" / "train.jsonl").write_text(lines)
    options = own_data | {"dataset_name": tmp_path / "moved" / "train.jsonl", "data__root": tmp_path / "moved"}
    trainer(assets, tmp_path / "run", resume="auto", **options).train()


def test_changed_data_is_gone_on_with_if_asked_for(
    assets: Assets, own_data: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_data(own_data["dataset_name"], entries(assets.train)[::-1])
    options = own_data | {"max_steps": 4, "data__changed_ok": True}
    trainer(assets, tmp_path / "run", resume="auto", **options).train()
    error = capfd.readouterr().err
    assert "dataset_name (digest of its samples): " in error
    assert "the run goes on with what is there now" in error
    # From the next checkpoint on, the new data are the run's.
    trainer(assets, tmp_path / "run", resume="auto", **own_data | {"max_steps": 4}).train()


def test_changed_held_out_data_is_noticed(assets: Assets, tmp_path: Path) -> None:
    dev = write_data(tmp_path / "dev.json", entries(assets.dev))
    options = {"max_steps": 1, "save_steps": 0, "data__eval_path": dev, "data__root": assets.folder}
    options["dataset_name"] = write_data(tmp_path / "sft.json", entries(assets.sft))
    sft_trainer(assets, tmp_path / "run", **options).train()
    write_data(dev, entries(assets.dev)[::-1])
    with pytest.raises(ConfigError, match=r"data.eval_path \(digest of its samples\)"):
        sft_trainer(assets, tmp_path / "run", resume="auto", **options | {"max_steps": 2}).train()
