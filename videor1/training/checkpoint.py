"""Checkpoints: Hugging Face folders that transformers and vLLM load, with the trainer's state in a subfolder.

    checkpoints/step-100/            config.json, model.safetensors, tokenizer, chat template, processor files
    checkpoints/step-100/trainer/    state.json, optimizer.safetensors, adapter.safetensors (LoRA) or
                                     master.safetensors (bf16 runs); of several processes each writes its own
                                     optimizer-00001-of-00002.safetensors, with the master weights inside
    checkpoints/step-100/videor1_manifest.json    a digest of every file

A checkpoint is written to a temporary folder and then renamed, so that a folder named step-N is always complete. What
happens to it later is noticed by its manifest when it is read again. No pickle is written or read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from videor1.errors import ConfigError
from videor1.model import VideoLM
from videor1.model.load import load_weights, read_config
from videor1.model.manifest import TRAINER, Entry, check_manifest, file_entry, write_manifest
from videor1.model.positions import POSITIONS_KEY, PositionRule, trained_rule
from videor1.model.save import save_model
from videor1.model.weights import WEIGHTS, stored_tensors, weight_files
from videor1.training.distributed.ranks import Ranks
from videor1.training.trainer_state import (
    STEP_NAME,
    check_optimizer,
    check_state,
    check_weights,
    has_empty_moments,
    updates_done,
)

_PART = re.compile(r"optimizer-(\d+)-of-(\d+)\.safetensors")
_PARTIAL = ".partial-"
_REPLACED, _DELETED = f"{_PARTIAL}replaced-", f"{_PARTIAL}doomed-"


class CheckpointError(OSError):
    """A checkpoint could not be written (full disk, no permission); earlier checkpoints are unchanged."""


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of each complete checkpoint of a run, oldest first."""
    folder = run_dir / "checkpoints"
    found = [(STEP_NAME.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]), path) for match, path in found if match)


def save(
    run_dir: Path,
    step: int,
    model: VideoLM,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    *,
    keep: int | None = None,
    finite_step: int | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Write the checkpoint of ``step``, then delete outdated ones, as :func:`delete_old` does.

    Args:
        optimizer: None writes the model only; a run cannot be resumed from such a checkpoint.
        state: the trainer's state, JSON values.
        keep: number of checkpoints to keep; None keeps all.
        finite_step: the last step whose loss and gradient were finite; None: this one. No checkpoint is deleted where
            it is an earlier one.
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
        known: dict[str, Entry] = {}
        if optimizer is not None:
            written = ranks.on_every_rank(lambda: _write_optimizer(partial, tensors, _optimizer_file(ranks)))
            for entry in ranks.gather(written):  # Each rank has read its own file again, and the main process the rest.
                known |= entry
        ranks.on_main(lambda: _publish(folder, partial, step, known))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint step-{step} could not be written to {folder}: {error}") from error
    finally:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
    if ranks.is_main and finite_step in (None, step):
        delete_old(run_dir, step, keep, finite_step=step)
    return folder / f"step-{step}"


def _optimizer_file(ranks: Ranks) -> str:
    """Return the name of the file with this rank's part of the optimizer's state."""
    if ranks.world == 1:
        return "optimizer.safetensors"
    return f"optimizer-{ranks.rank + 1:05}-of-{ranks.world:05}.safetensors"


def _write_optimizer(partial: Path, tensors: dict[str, Tensor], name: str) -> dict[str, Entry]:
    """Write this rank's part of the optimizer's state, and return its entry in the manifest."""
    file = partial / TRAINER / name
    save_file(_contiguous(tensors), file)
    return {f"{TRAINER}/{name}": file_entry(file)}


def _write_model(folder: Path, partial: Path, model: VideoLM, state: dict[str, Any] | None) -> None:
    """Write the model to the temporary folder ``partial``, and the trainer's state if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    _restore_replaced(folder)
    for stale in folder.glob(f"{_PARTIAL}*"):  # Left by a run that was killed while saving or deleting.
        shutil.rmtree(stale)
    partial.mkdir()
    save_model(model, partial)
    if state is not None:
        _save_trainer(partial / TRAINER, model, state)


def _publish(folder: Path, partial: Path, step: int, known: Mapping[str, Entry]) -> None:
    """Write the manifest of a completely written checkpoint, and rename it to its final name.

    A folder cannot be renamed over one that is not empty, so that an existing checkpoint is set aside first.
    """
    final = folder / f"step-{step}"
    write_manifest(partial, known)
    _sync(partial)
    replaced = _set_aside(final, _REPLACED) if final.exists() else None
    os.replace(partial, final)
    _sync_folder(folder)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def delete_old(run_dir: Path, step: int, keep: int | None, *, finite_step: int) -> None:
    """Delete outdated checkpoints.

    These are the oldest beyond ``keep``, and those of later steps, which exist where a run was resumed from an earlier
    step. The newest one that a finite step has followed is kept in any case: of a newer one it is not known yet whether
    its weights lead anywhere.

    Args:
        run_dir: the run's folder.
        step: the run's current step.
        keep: number of checkpoints to keep; None keeps all.
        finite_step: the last step whose loss and gradient were finite.
    """
    earlier = [path for number, path in checkpoints(run_dir) if number <= step]
    later = [path for number, path in checkpoints(run_dir) if number > step]
    proven = followed_checkpoint(run_dir, finite_step)
    for old in later + [path for path in earlier[: -keep if keep else 0] if path != proven]:
        shutil.rmtree(_set_aside(old, _DELETED), ignore_errors=True)


def followed_checkpoint(run_dir: Path, finite_step: int) -> Path | None:
    """Return the newest checkpoint that was followed by a step with a finite loss and gradient, the last such step
    being ``finite_step``; None if there is none."""
    followed = [path for number, path in checkpoints(run_dir) if number < finite_step]
    return followed[-1] if followed else None


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
    text = json.dumps(state, indent=2, sort_keys=True)  # Sorted, so that equal states are equal files.
    (folder / "state.json").write_text(text + "\n", encoding="utf-8")


def read_trainer(
    folder: Path,
    model: VideoLM,
    fixed: Mapping[str, Any],
    *,
    earlier: Mapping[str, Callable[[], Any]] | None = None,
    free: Mapping[str, str] | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore the trained weights from a checkpoint, and read the trainer's state.

    Args:
        folder: the checkpoint; :func:`find_resume` has checked its manifest.
        model: the model to restore the weights of.
        fixed: settings that must equal the saved state's ``fixed``: they decide which parameters are trained, and how,
            and on what. A checkpoint of an early version lacks the digests of the data.
        earlier: the values of settings of ``fixed`` as early versions computed them, which are accepted too.
        free: names of settings in ``fixed`` that may differ from the saved ones, with the option that allows it, or "".
            Where the option is given, the name of the setting is reported and the run goes on.
        report: called with what the user should know.

    Returns:
        (the state, the tensors for ``Ranks.load_trainer_tensors``).

    Raises:
        ConfigError: there is no trainer state, it is damaged, or its run had other ``fixed`` values.
    """
    trainer = folder / TRAINER
    if not (trainer / "state.json").is_file():
        raise ConfigError(f"{folder}: no trainer state to resume from (save_only_model true, or not a checkpoint)")
    trained: dict[str, Any] = dict(model.trainable())
    try:
        state = _read_state(folder)
        _check_fixed(folder, state["fixed"], fixed, earlier or {}, free or {}, report)
        tensors = _optimizer_tensors(trainer)
        check_optimizer(tensors, trained, updates_done(state))
        weights = {key.removesuffix("/master"): value for key, value in tensors.items() if key.endswith("/master")}
        for name in ("adapter.safetensors", "master.safetensors"):
            if not weights and (trainer / name).is_file():
                weights = load_file(trainer / name)
        weights = weights or _model_weights(folder, trained, model.compute_dtype)
        check_weights(weights, trained)
    except ConfigError:
        raise
    except (OSError, KeyError, ValueError, RecursionError, SafetensorError) as error:
        raise ConfigError(f"{folder}: a damaged checkpoint ({error}); resume from another one") from error
    if has_empty_moments(tensors):
        report(f"{folder}: the optimizer's moments are all 0: no step before it had a gradient, or they were emptied")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    return state, tensors | {f"{name}/master": value for name, value in weights.items() if value.dtype == torch.float32}


def _read_state(folder: Path) -> dict[str, Any]:
    """Read the trainer's state. Raises ValueError or OSError where it is not that of the checkpoint."""
    state: dict[str, Any] = json.loads((folder / TRAINER / "state.json").read_text(encoding="utf-8"))
    check_state(state, folder)
    return state


def _check_fixed(
    folder: Path,
    saved: Mapping[str, Any],
    fixed: Mapping[str, Any],
    earlier: Mapping[str, Callable[[], Any]],
    free: Mapping[str, str],
    report: Callable[[str], None],
) -> None:
    for name, value in fixed.items():
        if saved.get(name) == value or (name in free and name not in saved):
            continue
        if name in earlier and saved.get(name) == earlier[name]():
            continue
        if name in free and not free[name]:
            report(
                f"{name}: {saved[name]} when {folder} was saved, now {value}; the run goes on with what is there now"
            )
            continue
        how = f", or go on all the same with {free[name]}" if name in free else ""
        raise ConfigError(
            f"{folder}: saved by a run with {name} {saved.get(name)!r}, this one has {value!r}; resume with the same, "
            f"or start a new run in another output_dir{how}"
        )


def _optimizer_tensors(trainer: Path) -> dict[str, Tensor]:
    """Read the optimizer's state that all ranks of the saving run have written."""
    parts = [trainer / "optimizer.safetensors"]
    numbered = [(path, _PART.fullmatch(path.name)) for path in sorted(trainer.glob("optimizer-*.safetensors"))]
    if numbered:
        places = [(int(match[1]), int(match[2])) for _, match in numbered if match]
        count = places[0][1] if places else 0
        if places != [(number, count) for number in range(1, count + 1)] or parts[0].exists():
            raise OSError(f"expected all parts of the optimizer's state, got {[path.name for path, _ in numbered]}")
        parts = [path for path, _ in numbered]
    tensors: dict[str, Tensor] = {}
    for part in parts:
        found = load_file(part)
        if twice := sorted(tensors.keys() & found.keys()):
            raise OSError(f"{part.name}: {twice[0]} is in another part too")
        tensors |= found
    return tensors


def _model_weights(folder: Path, trained: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the trained parameters from the model's files, read by from_pretrained, which knows the names in them."""

    expected = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    try:
        stored = stored_tensors(weight_files(str(folder)))
        others = [name for name, tensor in stored.items() if tensor.dtype != expected]
        if others:
            raise ValueError(f"{others[0]} is stored as {stored[others[0]].dtype}, the run saves {expected}")
        config = read_config(str(folder))
        saved = load_weights(str(folder), config, torch.float32)
    except ConfigError as error:  # It names the folder as if the user had given it as a model.
        raise ValueError(str(error).removeprefix("model_name_or_path: ")) from error
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


def find_resume(resume: str, run_dir: Path, report: Callable[[str], None] = lambda _: None) -> Path | None:
    """Return the checkpoint that the option ``resume`` names; None for ``auto`` in a run without any.

    ``auto`` is the newest checkpoint that is whole. Damaged ones are reported and passed over.

    Args:
        resume: the option.
        run_dir: the run's folder.
        report: called with a message about each damaged checkpoint that is passed over.

    Raises:
        ConfigError: there is no such folder, or it is damaged, as are all others for ``auto``.
    """
    if resume != "auto":
        path = Path(resume)
        if not path.is_dir():
            raise ConfigError(f"resume: no checkpoint folder at {resume!r}; expected auto or .../checkpoints/step-N")
        if damage := find_damage(path):
            raise ConfigError(f"{path}: a damaged checkpoint ({damage}); resume from another one")
        return path
    _restore_replaced(run_dir / "checkpoints")
    damaged: list[str] = []
    for _, path in reversed(checkpoints(run_dir)):
        damage = find_damage(path)
        if damage is None:
            for message in damaged:
                report(f"{message}; going on from {path}")
            return path
        damaged.append(f"{path}: a damaged checkpoint ({damage})")
    if damaged:
        raise ConfigError(
            f"{damaged[0]}, and no other checkpoint of the run is whole ({len(damaged)} in all); restore one from a "
            "copy, or start a new run in another output_dir"
        )
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint, or None.

    Without a manifest, which early versions did not write, only the files' headers are read.
    """
    try:
        if not check_manifest(checkpoint, trainer=True):
            json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
            found = sorted(checkpoint.glob("*.safetensors")) + sorted((checkpoint / TRAINER).glob("*.safetensors"))
            for file in found or [checkpoint / WEIGHTS]:
                stored_tensors([file])
        if (checkpoint / TRAINER / "state.json").is_file():
            _read_state(checkpoint)
    except (OSError, ValueError, RecursionError) as error:  # ConfigError and DamagedError are ValueErrors
        return str(error)
    return None


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
