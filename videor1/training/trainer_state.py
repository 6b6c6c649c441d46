"""Checks of what a checkpoint holds beside the model: the trainer's state, and the optimizer's tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, float32

from videor1.model.weights import nonfinite

STEP_NAME = re.compile(r"step-(\d+)")

_MOMENTS = ("exp_avg", "exp_avg_sq")


def check_state(state: Any, folder: Path) -> None:
    """Check the contents of a checkpoint's ``trainer/state.json``.

    Raises:
        ValueError: it is not the state of this checkpoint, or a number in it cannot be.
    """
    if not isinstance(state, dict):
        raise ValueError(f"state.json: expected an object, got {state!r:.60}")
    step = _count(state, "step", None)
    named = STEP_NAME.fullmatch(folder.name)
    if named and int(named[1]) != step:
        raise ValueError(f"state.json says step {step}, the folder's name {folder.name}")
    if not isinstance(state.get("fixed"), dict):
        raise ValueError("state.json: expected fixed, the settings of its run")
    _check_position(state.get("position"), step)
    counters = state.get("counters", {})
    for name in ("counters", "skipped", "survived"):
        counts = state.get(name, {})
        if not isinstance(counts, dict):
            raise ValueError(f"state.json: {name}: expected counts by name, got {counts!r:.60}")
        for kind in counts:
            _count(counts, kind, f"{name}.{kind}")
    in_a_row = _count(state, "nonfinite_in_a_row", None, 0)
    if in_a_row > counters.get("nonfinite_steps", in_a_row) or counters.get("nonfinite_steps", 0) > step:
        raise ValueError(
            f"state.json: of {step} steps {counters.get('nonfinite_steps')} were not finite, and {in_a_row} in a row"
        )
    evaluated = state.get("evaluated_at", -1)
    if type(evaluated) is not int or not -1 <= evaluated <= step:
        raise ValueError(f"state.json: evaluated_at: expected a step up to {step}, got {evaluated!r:.60}")
    if type(state.get("accuracy", 0.0)) not in (int, float):
        raise ValueError(f"state.json: accuracy: expected a number, got {state['accuracy']!r:.60}")
    rows = state.get("pending_metrics", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"state.json: pending_metrics: expected a list of objects, got {rows!r:.60}")
    moments = state.get("reward_moments", {})
    if not isinstance(moments, dict) or not all(map(_are_moments, moments.values())):
        raise ValueError(
            f"state.json: reward_moments: expected averages [m1, m2, weight] by problem type, got {moments!r:.80}"
        )


def _are_moments(values: Any) -> bool:
    """Whether these are averages of a number and of its square, and the weight in (0, 1] that both have."""
    if not isinstance(values, list) or len(values) != 3 or any(type(value) is not float for value in values):
        return False
    first, second, weight = values
    # The square of a mean is at most the mean of squares; equal ones may differ by their rounding.
    return all(map(math.isfinite, values)) and 0 < weight <= 1 + 1e-9 and first**2 <= second * weight * (1 + 1e-9)


def _count(values: Mapping[str, Any], name: str, shown: str | None, default: int | None = None) -> int:
    value = values.get(name, default)
    if type(value) is not int or value < 0:  # bool is an int too, but no count
        raise ValueError(f"state.json: {shown or name}: expected a whole number, at least 0, got {value!r:.60}")
    return value


def _check_position(position: Any, step: int) -> None:
    """Check the position in the data: one, or a list with one per rank; each a number of draws, or a stream's."""
    ranks = position if isinstance(position, list) else [position]
    for one in ranks:
        numbers = {k: v for k, v in one.items() if k != "data"} if isinstance(one, dict) else {"draws": one}
        if any(type(value) is not int or value < 0 for value in numbers.values()) or "draws" not in numbers:
            raise ValueError(f"state.json: position: expected the number of draws, got {position!r:.80}")
        if isinstance(one, dict) and not isinstance(one.get("data"), str):
            raise ValueError(f"state.json: position: expected a stream's with the digest of its data, got {one!r:.80}")
    if not ranks or (step and not any(one["draws"] if isinstance(one, dict) else one for one in ranks)):
        raise ValueError(f"state.json: position: expected draws after {step} steps, got {position!r:.80}")


def updates_done(state: Mapping[str, Any]) -> int | None:
    """Return how many steps have changed the weights; None where an early version has not counted the others."""
    skipped = state.get("counters", {}).get("nonfinite_steps")
    return None if skipped is None else state["step"] - skipped


def check_weights(weights: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Check the trained weights of a checkpoint: the run's names, shapes and dtypes (or fp32), and finite values.

    Raises:
        ValueError: they are not.
    """
    different = [n for n in sorted(weights.keys() | trained.keys()) if not _fits(weights.get(n), trained.get(n))]
    if different:
        raise ValueError(f"its trained parameters are not this run's: {_some(different)}")
    if bad := nonfinite(weights):
        raise ValueError(f"NaN or Inf in its weights: {_some(bad)}")


def check_optimizer(tensors: Mapping[str, Tensor], trained: Mapping[str, Tensor], updates: int | None) -> None:
    """Check that the optimizer's state is whole: AdamW's moments and step of every trained parameter, and no others.

    Args:
        tensors: named ``<parameter>/<field>``.
        trained: the trained parameters.
        updates: how many updates the optimizer has made; None if that is not known.

    Raises:
        ValueError: a tensor is missing, of another shape or dtype, of no trained parameter, or holds what AdamW never
            writes.
    """
    fields: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        if field != "master":
            fields.setdefault(name, {})[field] = tensor
    unknown = sorted(fields.keys() - trained.keys())
    if unknown:
        raise ValueError(f"optimizer state of parameters that are not trained here: {_some(unknown)}")
    masters = [name for name in trained if f"{name}/master" in tensors]
    if masters and len(masters) != len(trained):
        raise ValueError(f"master weights of {len(masters)} of {len(trained)} trained parameters")
    if not fields and not updates:
        return  # The optimizer has no state before its first step.
    missing = [name for name in trained if fields.get(name, {}).keys() != {*_MOMENTS, "step"}]
    if missing:
        raise ValueError(
            f"expected {', '.join(_MOMENTS)} and step of every trained parameter; not so: {_some(missing)}"
        )
    steps = {float(fields[name]["step"]) if fields[name]["step"].numel() == 1 else -1.0 for name in trained}
    if len(steps) != 1 or (updates is not None and steps != {float(updates)}) or min(steps) < 1:
        expected = "one number" if updates is None else str(updates)
        raise ValueError(f"the optimizer's step: expected {expected} for every parameter, got {sorted(steps)[:5]}")
    for moment in _MOMENTS:
        found = {name: fields[name][moment] for name in trained}
        if different := [name for name in trained if not _fits(found[name], trained[name])]:
            raise ValueError(f"{moment} of another shape or dtype than its parameter: {_some(different)}")
        if bad := nonfinite(found):
            raise ValueError(f"NaN or Inf in {moment}: {_some(bad)}")
    negative = [name for name in trained if fields[name]["exp_avg_sq"].numel() and fields[name]["exp_avg_sq"].min() < 0]
    if negative:
        raise ValueError(f"negative numbers in exp_avg_sq: {_some(negative)}")


def has_empty_moments(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether all second moments are 0: no step has had a gradient, or they were emptied."""
    squares = [tensor for key, tensor in tensors.items() if key.endswith("/exp_avg_sq")]
    return bool(squares) and not any(bool(tensor.any()) for tensor in squares)


def _fits(tensor: Tensor | None, parameter: Tensor | None) -> bool:
    if tensor is None or parameter is None:
        return False
    return tensor.shape == parameter.shape and tensor.dtype in (parameter.dtype, float32)


def _some(names: Sequence[str]) -> str:
    return f"{list(names[:5])} ({len(names)} in all)"
