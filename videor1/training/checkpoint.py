"""Checkpoints: Hugging Face folders that transformers and vLLM load, with the trainer's state in a subfolder.

    checkpoints/step-100/            config.json, model.safetensors, tokenizer, chat template, processor files
    checkpoints/step-100/trainer/    state.json, optimizer.safetensors, adapter.safetensors (LoRA) or
                                     master.safetensors (bf16 runs); of several processes each writes its own
                                     optimizer-00001-of-00002.safetensors, with the master weights inside

A checkpoint is written to a temporary folder and then renamed, so that a folder named step-N is always complete. No
pickle is written or read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from videor1.errors import ConfigError
from videor1.model import VideoLM
from videor1.model.positions import POSITIONS_KEY, PositionRule, trained_rule
from videor1.model.save import save_model
from videor1.training.distributed.ranks import Ranks

_NAME = re.compile(r"step-(\d+)")
_PARTIAL = ".partial-"
_REPLACED, _DELETED = f"{_PARTIAL}replaced-", f"{_PARTIAL}doomed-"


class CheckpointError(OSError):
    """A checkpoint could not be written (full disk, no permission); earlier checkpoints are unchanged."""


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of each complete checkpoint of a run, oldest first."""
    folder = run_dir / "checkpoints"
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]), path) for match, path in found if match)


def save(
    run_dir: Path,
    step: int,
    model: VideoLM,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    *,
    keep: int | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Write the checkpoint of ``step``, then delete outdated ones.

    Deleted are the oldest beyond ``keep``, and those of later steps, which exist where a run was resumed from an
    earlier step.

    Args:
        optimizer: None writes the model only; a run cannot be resumed from such a checkpoint.
        state: the trainer's state, JSON values.
        keep: number of checkpoints to keep; None keeps all.
        ranks: the ranks of the run, which must all call this: the main process writes the model, and each rank its own
            part of the optimizer's state. None: this process alone.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: writing failed; nothing is left of the attempt, and older checkpoints are complete.
    """
    if ranks is None:
        ranks = Ranks()
        if optimizer is not None:
            ranks.prepare(model.hf, optimizer, 0.0)
    folder = run_dir / "checkpoints"
    partial = folder / f"{_PARTIAL}step-{step}"
    try:
        tensors = {} if optimizer is None else ranks.trainer_tensors(model.trainable())
        saved = None if optimizer is None else state | {"step": step}
        with ranks.gathered_parameters():
            ranks.on_main(lambda: _write_model(folder, partial, model, saved))
        if optimizer is not None:
            ranks.on_every_rank(lambda: save_file(_contiguous(tensors), partial / "trainer" / _optimizer_file(ranks)))
        ranks.on_main(lambda: _publish(folder, partial, step))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint step-{step} could not be written to {folder}: {error}") from error
    finally:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
    if ranks.is_main:
        _delete_old(run_dir, step, keep)
    return folder / f"step-{step}"


def _optimizer_file(ranks: Ranks) -> str:
    """Return the name of the file with this rank's part of the optimizer's state."""
    return (
        "optimizer.safetensors"
        if ranks.world == 1
        else (f"optimizer-{ranks.rank + 1:05}-of-{ranks.world:05}.safetensors")
    )


def _write_model(folder: Path, partial: Path, model: VideoLM, state: dict[str, Any] | None) -> None:
    """Write the model to the temporary folder ``partial``, and the trainer's state if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    _restore_replaced(folder)
    for stale in folder.glob(f"{_PARTIAL}*"):  # Left by a run that was killed while saving or deleting.
        shutil.rmtree(stale)
    partial.mkdir()
    save_model(model, partial)
    if state is not None:
        _save_trainer(partial / "trainer", model, state)


def _publish(folder: Path, partial: Path, step: int) -> None:
    """Rename a completely written checkpoint to its final name.

    A folder cannot be renamed over one that is not empty, so that an existing checkpoint is set aside first.
    """
    final = folder / f"step-{step}"
    _sync(partial)
    replaced = _set_aside(final, _REPLACED) if final.exists() else None
    os.replace(partial, final)
    _sync_folder(folder)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _delete_old(run_dir: Path, step: int, keep: int | None) -> None:
    earlier = [path for number, path in checkpoints(run_dir) if number <= step]
    later = [path for number, path in checkpoints(run_dir) if number > step]
    for old in later + earlier[: -keep if keep else 0]:
        shutil.rmtree(_set_aside(old, _DELETED), ignore_errors=True)


def _set_aside(checkpoint: Path, prefix: str) -> Path:
    """Rename a checkpoint before it is deleted, so that a kill leaves no incomplete one under its name."""
    aside = checkpoint.with_name(f"{prefix}{checkpoint.name}")
    os.replace(checkpoint, aside)
    return aside


def _restore_replaced(folder: Path) -> None:
    """Rename a checkpoint back that was set aside, if a kill came before its replacement got the name."""
    for aside in folder.glob(f"{_REPLACED}*"):
        name = folder / aside.name.removeprefix(_REPLACED)
        if not name.exists():
            os.replace(aside, name)


def _save_trainer(folder: Path, model: VideoLM, state: dict[str, Any]) -> None:
    folder.mkdir()
    if model.peft is not None:
        adapter = {name: p.detach() for name, p in model.trainable().items()}
        save_file(_contiguous(adapter), folder / "adapter.safetensors")
    elif model.compute_dtype != torch.float32 and next(model.hf.parameters()).dtype == torch.float32:
        master = {name: p.detach() for name, p in model.trainable().items()}
        save_file(_contiguous(master), folder / "master.safetensors")
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def read_trainer(folder: Path, model: VideoLM, fixed: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore the trained weights from a checkpoint, and read the trainer's state.

    Args:
        fixed: settings that must equal the saved state's ``fixed``: they decide which parameters are trained, and how.

    Returns:
        (the state, the tensors for ``Ranks.load_trainer_tensors``).

    Raises:
        ConfigError: there is no trainer state, it is damaged, or its run had other ``fixed`` values.
    """
    trainer = folder / "trainer"
    if not (trainer / "state.json").is_file():
        raise ConfigError(f"{folder}: no trainer state to resume from (save_only_model true, or not a checkpoint)")
    trained = model.trainable()
    try:
        state: dict[str, Any] = json.loads((trainer / "state.json").read_text(encoding="utf-8"))
        for name, value in fixed.items():
            saved = state["fixed"].get(name)
            if saved != value:
                raise ConfigError(
                    f"{folder}: saved by a run with {name} {saved!r}, this one has {value!r}; resume with the same, or "
                    "start a new run in another output_dir"
                )
        tensors = _optimizer_tensors(trainer)
        weights = {key.removesuffix("/master"): value for key, value in tensors.items() if key.endswith("/master")}
        for name in ("adapter.safetensors", "master.safetensors"):
            if not weights and (trainer / name).is_file():
                weights = load_file(trainer / name)
        weights = weights or _model_weights(folder, trained)
    except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise ConfigError(f"{folder}: a damaged checkpoint ({error!r}); resume from another one") from error
    different = [name for name in sorted(weights.keys() | trained.keys()) if not _same_shape(name, weights, trained)]
    if different:
        raise ConfigError(f"{folder}: its trained parameters are not this run's: {different[:5]} ({len(different)})")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    return state, tensors | {f"{name}/master": value for name, value in weights.items() if value.dtype == torch.float32}


def _optimizer_tensors(trainer: Path) -> dict[str, Tensor]:
    """Read the optimizer's state that all ranks of the saving run have written."""
    parts = sorted(trainer.glob("optimizer-*-of-*.safetensors")) or [trainer / "optimizer.safetensors"]
    expected = int(parts[0].stem.rpartition("-")[2]) if len(parts[0].stem.split("-")) > 1 else 1
    if len(parts) != expected:
        raise OSError(f"{len(parts)} of the {expected} parts of the optimizer's state")
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= load_file(part)
    return tensors


def _same_shape(name: str, weights: dict[str, Tensor], trained: dict[str, Any]) -> bool:
    return name in weights and name in trained and weights[name].shape == trained[name].shape


def _model_weights(folder: Path, trained: dict[str, Any]) -> dict[str, Tensor]:
    """Return the trained parameters from the model's files, read by from_pretrained, which knows the names in them."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    saved = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return {name: p.detach() for name, p in saved.named_parameters() if name in trained}


def resumed_rule(checkpoint: Path, requested: PositionRule | None) -> PositionRule:
    """Return the position rule of the run that wrote ``checkpoint``, which a resumed run keeps.

    Raises:
        ConfigError: ``requested`` is another rule, or the checkpoint is damaged.
    """
    try:
        recorded = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get(POSITIONS_KEY)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{checkpoint}: a damaged checkpoint ({error!r}); resume from another one") from error
    rule = trained_rule(checkpoint, recorded) or "paper"
    if requested not in (None, rule):
        raise ConfigError(
            f"model.positions: {checkpoint} was trained under {rule!r}, this run asks for {requested!r}; resume with "
            "the same, or start a new run in another output_dir with the checkpoint as its model_name_or_path"
        )
    return rule


def find_resume(resume: str, run_dir: Path) -> Path | None:
    """Return the checkpoint that the option ``resume`` names; None for ``auto`` in a run without any.

    Raises:
        ConfigError: there is no such folder.
    """
    if resume == "auto":
        _restore_replaced(run_dir / "checkpoints")
        found = checkpoints(run_dir)
        return found[-1][1] if found else None
    path = Path(resume)
    if not path.is_dir():
        raise ConfigError(f"resume: no checkpoint folder at {resume!r}; expected auto or .../checkpoints/step-N")
    return path


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sync(folder: Path) -> None:
    """Flush every file of a checkpoint to disk, and give it a new file's usual permissions.

    safetensors makes its files readable by their owner alone, so that a server under another user could not read them.
    """
    os.umask(mask := os.umask(0))
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
