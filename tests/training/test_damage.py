"""A resume from a damaged checkpoint stops, or goes back to the newest whole one and says so; early ones go on."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Lab, assert_same_run, entries, metrics, train_flags, trainer, write_data
from safetensors.torch import load_file, save_file
from torch import Tensor

from videor1.config import TrainConfig
from videor1.config.cli import run_main
from videor1.data import load_samples
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.model import VideoLM, load_model
from videor1.model.manifest import MANIFEST
from videor1.model.save import base_digest, sampled_digest
from videor1.train import main
from videor1.training.checkpoint import checkpoints, find_resume

OPTIONS = {"max_steps": 3, "save_steps": 1, "save_total_limit": 3}
VARIANTS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora__rank": 2}, "bf16": {"bf16": True}}
Damage = Callable[[Path], object]
Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Run folders with checkpoints of steps 1 to 3; read only."""
    made: dict[str, Path] = {}

    def run(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("saved") / variant
            trainer(assets, made[variant], **OPTIONS, **VARIANTS[variant]).train()
        return made[variant]

    return run


@pytest.fixture
def run_dir(saved: Saved, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved("full"), tmp_path / "run"))


def step(run_dir: Path, number: int = 3) -> Path:
    return run_dir / "checkpoints" / f"step-{number}"


def flip(path: Path, at: int = -9) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def state(folder: Path, **values: Any) -> None:
    file = folder / STATE
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edited(name: str, change: Callable[[dict[str, Tensor]], object]) -> Damage:
    """The file's tensors are changed, in a file that is whole."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return edit


def zero_moments(tensors: dict[str, Tensor]) -> None:
    for key in tensors:
        if "/exp_avg" in key:
            tensors[key].zero_()


def nan_weight(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def one_less(tensors: dict[str, Tensor]) -> None:
    del tensors[next((name for name in tensors if "q_proj" in name), next(iter(tensors)))]


def one_more(tensors: dict[str, Tensor]) -> None:
    tensors["more"] = torch.zeros(1)


def narrower(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name][:1].clone()


def rounded(tensors: dict[str, Tensor]) -> None:
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})


MODEL, STATE, OPTIMIZER = "model.safetensors", "trainer/state.json", "trainer/optimizer.safetensors"
ADAPTER, MASTER = "trainer/adapter.safetensors", "trainer/master.safetensors"
PART = "trainer/optimizer-{:05}-of-{:05}.safetensors"
DAMAGE: dict[str, Damage] = {
    "a bit of the weights": lambda f: flip(f / MODEL),
    "a bit of the moments": lambda f: flip(f / OPTIMIZER),
    "a bit of the template": lambda f: flip(f / "chat_template.jinja"),
    "weights cut": lambda f: os.truncate(f / MODEL, 5000),
    "moments cut": lambda f: os.truncate(f / OPTIMIZER, 5000),
    "moments gone": lambda f: (f / OPTIMIZER).unlink(),
    "step edited": lambda f: state(f, step=2),
    "state cut": lambda f: os.truncate(f / STATE, 40),
    "state gone": lambda f: (f / STATE).unlink(),
    "trainer gone": lambda f: shutil.rmtree(f / "trainer"),
    "adapter added": lambda f: shutil.copy(f / MODEL, f / ADAPTER),
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
    (message,) = said
    assert f"{step(run_dir)}: a damaged checkpoint (" in message
    assert message.endswith(f"; going on from {step(run_dir, 2)}")
    with pytest.raises(ConfigError, match=r"step-3: a damaged checkpoint .*resume from another one"):
        find_resume(str(step(run_dir)), run_dir)


def test_a_run_goes_on_from_the_whole_one_and_says_so(
    assets: Assets, run_dir: Path, saved: Saved, capfd: pytest.CaptureFixture[str]
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


def test_a_checkpoint_under_another_steps_name(run_dir: Path) -> None:
    step(run_dir).rename(step(run_dir, 9))
    said: list[str] = []
    assert find_resume("auto", run_dir, said.append) == step(run_dir, 2)
    assert "state.json says step 3, the folder's name step-9" in said[0]
    moved = step(run_dir, 9).rename(run_dir / "kept")  # a copy with a name of its own
    assert find_resume(str(moved), run_dir) == moved


def load_demo(assets: Assets) -> VideoLM:
    return load_model(TrainConfig(model_name_or_path=str(assets.model), device="cpu"))


def test_an_early_run_goes_on(assets: Assets, run_dir: Path, saved: Saved) -> None:
    """One of a version before manifests and digests of data."""
    for _, folder in checkpoints(run_dir):
        (folder / MANIFEST).unlink()
        fixed = json.loads((folder / STATE).read_text())["fixed"]
        fixed = {name: value for name, value in fixed.items() if "samples" not in name}
        state(folder, fixed=fixed | {"model_name_or_path (digest of its weights)": sampled_digest(load_demo(assets))})
    shutil.rmtree(step(run_dir))
    trainer(assets, run_dir, resume="auto", **OPTIONS).train()
    assert metrics(run_dir) == metrics(saved("full"))


OTHERS = "trained parameters are not this run's"
EARLY: dict[str, tuple[str, Damage, str]] = {
    "weights lack a tensor": ("full", edited(MODEL, one_less), "missing keys in its weights"),
    "weights have one more": ("full", edited(MODEL, one_more), "unexpected keys"),
    "weights of another shape": ("full", edited(MODEL, narrower), "cannot load|mismatched"),
    "weights of another dtype": ("full", edited(MODEL, rounded), "stored as BF16, the run saves F32"),
    "a NaN weight": ("full", edited(MODEL, nan_weight), "NaN or Inf in its weights"),
    "a pickle": ("full", lambda f: (f / MODEL).rename(f / "pytorch_model.bin"), "not a whole safetensors|neither"),
    "moments lack a tensor": ("full", edited(OPTIMIZER, one_less), "of every trained parameter"),
    "another step": ("full", lambda f: state(f, step=2), "state.json says step 2, the folder's name step-3"),
    "more not finite": ("full", lambda f: state(f, counters={"nonfinite_steps": 1}), "optimizer's step: expected 2"),
    "a strange part": (
        "full",
        lambda f: shutil.copy(f / OPTIMIZER, f / "trainer/optimizer-a-of-b.safetensors"),
        "expected all parts",
    ),
    "one part of two": ("full", lambda f: (f / OPTIMIZER).rename(f / PART.format(1, 2)), "expected all parts"),
    "adapters lack a tensor": ("lora", edited(ADAPTER, one_less), OTHERS),
    "adapters gone": ("lora", lambda f: (f / ADAPTER).unlink(), OTHERS),
    "master weights lack a tensor": ("bf16", edited(MASTER, one_less), OTHERS),
}


@pytest.mark.parametrize("kind", EARLY)
def test_what_is_noticed_without_a_manifest(kind: str, lab: Lab, saved: Saved) -> None:
    variant, damage, message = EARLY[kind]
    run_dir = Path(shutil.copytree(saved(variant), lab.folder / "run"))
    (step(run_dir) / MANIFEST).unlink()
    damage(step(run_dir))
    with pytest.raises(ConfigError, match=f"step-3: a damaged checkpoint .*({message})"):
        trainer(lab.assets, run_dir, resume=step(run_dir), **OPTIONS | {"max_steps": 4}, **VARIANTS[variant]).train()


def test_emptied_moments_are_told_without_a_manifest(
    assets: Assets, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (step(run_dir) / MANIFEST).unlink()
    edited(OPTIMIZER, zero_moments)(step(run_dir))
    trainer(assets, run_dir, resume="auto", **OPTIONS).train()
    assert "the optimizer's moments are all 0" in capfd.readouterr().err


def test_a_damaged_checkpoint_is_no_model(assets: Assets, run_dir: Path) -> None:
    flip(step(run_dir) / MODEL)
    with pytest.raises(ConfigError, match=r"step-3 is damaged, or was changed .*model.safetensors has changed"):
        trainer(assets, run_dir.parent / "next", model_name_or_path=step(run_dir))
    assert not (run_dir.parent / "next").exists()
    shutil.rmtree(step(run_dir, 2) / "trainer")  # not a part of the model
    trainer(assets, run_dir.parent / "next", model_name_or_path=step(run_dir, 2))


def test_the_digest_of_a_model_reads_every_value(assets: Assets) -> None:
    model = load_demo(assets)
    digests = [base_digest(model)]
    weight = model.hf.model.language_model.layers[0].mlp.up_proj.weight.detach().view(-1)
    whole = weight.clone()
    for at in (0, 1, 7, -1):
        weight[at] += 1e-6
        digests.append(base_digest(model))
        weight.copy_(whole)
    weight[[5, 6]] = whole[[6, 5]]
    assert len({*digests, base_digest(model)}) == 6


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
def own_data(assets: Assets, run_dir: Path) -> dict[str, Any]:
    """Options of the run to resume it, with a data file that may be written to."""
    data = write_data(run_dir.parent / "data.json", entries(assets.train))
    return OPTIONS | {"dataset_name": data, "data__root": assets.folder, "resume": "auto"}


def test_changed_data_is_noticed(assets: Assets, own_data: dict[str, Any], run_dir: Path) -> None:
    def digest(data: list[dict[str, Any]]) -> str:
        return load_samples(write_data(own_data["dataset_name"], data), root=assets.folder).digest()

    found = entries(assets.train)
    assert digest(found) == digest(found)
    assert len({digest(found), *(digest(change(found)) for change in DATA.values())}) == 1 + len(DATA)
    with pytest.raises(ConfigError, match=r"dataset_name \(digest of its samples\).*--data.changed_ok true"):
        trainer(assets, run_dir, **own_data).train()


def test_the_same_data_elsewhere_and_otherwise_written_goes_on(
    lab: Lab, own_data: dict[str, Any], run_dir: Path
) -> None:
    """Its samples count: not the form of the file, nor where the data lie."""
    moved = Path(shutil.copytree(lab.assets.folder, lab.folder / "moved"))
    lines = "".join(json.dumps(entry) + "\n" for entry in json.loads(lab.assets.train.read_text()))
    (moved / "train.jsonl").write_text(lines)
    trainer(lab.assets, run_dir, **own_data | {"dataset_name": moved / "train.jsonl", "data__root": moved}).train()


def test_changed_data_is_gone_on_with_if_asked_for(
    assets: Assets, own_data: dict[str, Any], run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_data(own_data["dataset_name"], entries(assets.train)[::-1])
    trainer(assets, run_dir, **own_data | {"max_steps": 4, "data__changed_ok": True}).train()
    error = capfd.readouterr().err
    assert "dataset_name (digest of its samples): " in error
    assert "the run goes on with what is there now" in error
    # From the next checkpoint on, the new data are the run's.
    trainer(assets, run_dir, **own_data | {"max_steps": 4}).train()


def test_changed_held_out_data_is_noticed(lab: Lab) -> None:
    dev = write_data(lab.folder / "dev.json", entries(lab.assets.dev))
    options = {"max_steps": 1, "save_steps": 0, "data__eval_path": dev, "data__root": lab.assets.folder}
    lab.sft("run", **options).train()
    write_data(dev, entries(lab.assets.dev)[::-1])
    with pytest.raises(ConfigError, match=r"data.eval_path \(digest of its samples\)"):
        lab.sft("run", resume="auto", **options | {"max_steps": 2}).train()
