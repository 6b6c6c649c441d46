"""The trainer's state and the optimizer's tensors are only accepted whole."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from videor1.training.trainer_state import check_optimizer, check_state, check_weights, has_empty_moments, updates_done

STATE: dict[str, Any] = {"step": 4, "position": 9, "fixed": {}, "nonfinite_in_a_row": 1, "skipped": {"decode": 2}}
STATE |= {
    "counters": {"nonfinite_steps": 1, "failed_checkpoints": 0, "num_tokens": 77},
    "survived": {"worker_deaths": 0},
}
STATE |= {"pending_metrics": [{"loss": math.nan}], "evaluated_at": -1, "accuracy": math.nan}
STREAM = {"draws": 9, "epoch": 0, "window": 1, "row": 3, "data": "abc-1-1"}
FOLDER = Path("checkpoints/step-4")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position": [5, 4]},
        {"position": STREAM},
        {"position": [STREAM, STREAM]},
        {"evaluated_at": 4, "accuracy": 0.5},
        {"accuracy": 1},
        {"counters": {"nonfinite_steps": 4, "num_tokens": 0}, "nonfinite_in_a_row": 4},
        {"reward_moments": {"OCR": [0.25, 0.5, 0.5], "regression": [0.0, 0.0, 0.01]}},
        {"something": "of a later version"},
    ],
)
def test_states_that_are_right(changes: dict[str, Any]) -> None:
    check_state(STATE | changes, FOLDER)
    check_state(STATE | changes, Path("elsewhere"))  # a copy may have any name that is no other step's
    check_state({"step": 4, "position": 1, "fixed": {}}, FOLDER)  # an early one
    check_state(STATE | {"step": 0, "position": 0, "counters": {}, "nonfinite_in_a_row": 0}, Path("step-0"))
    assert updates_done({"step": 4}) is None
    assert updates_done(STATE) == 3


@pytest.mark.parametrize(
    "changes",
    [
        *({"step": value} for value in (5, -4, "4", 4.0, True, None, [4], 10**30)),
        *({"position": value} for value in (-1, "9", 9.0, True, None, [], [9, -1], [9, "x"], 0, [0, 0], {})),
        *({"position": STREAM | change} for change in ({"row": -1}, {"epoch": "0"}, {"data": 3}, {"draws": None})),
        *({"counters": value} for value in (None, [], {"num_tokens": -1}, {"num_tokens": 1.5}, {"x": True})),
        {"counters": {"nonfinite_steps": 5}},
        {"counters": {"nonfinite_steps": 0}},  # though one in a row
        *({"nonfinite_in_a_row": value} for value in (-1, "1", None, 2)),
        *({"skipped": value} for value in ([], {"decode": -1}, {"decode": "2"})),
        *({"survived": value} for value in (3, {"worker_deaths": None})),
        *({"pending_metrics": value} for value in ({}, [3], "x")),
        *({"evaluated_at": value} for value in (5, -2, "4", 1.0, None)),
        *({"accuracy": value} for value in ("high", None, [])),
        *({"fixed": value} for value in (None, [], "x")),
        *({"reward_moments": value} for value in (None, [], {"OCR": 1.0}, {"OCR": [0.1, 0.1]})),
        *({"reward_moments": {"OCR": value}} for value in ([0.5, 0.2, 1.0], [0.1, 1.0, 0.0], [0.1, 1.0, 2.0])),
        *({"reward_moments": {"OCR": value}} for value in ([math.nan, 1.0, 1.0], [0.1, math.inf, 1.0], [0, 0, 1])),
    ],
    ids=repr,
)
def test_states_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"state\.json"):
        check_state(STATE | changes, FOLDER)


@pytest.mark.parametrize("state", [None, [], "x", 3, {}])
def test_what_is_no_state(state: Any) -> None:
    with pytest.raises(ValueError, match=r"state\.json"):
        check_state(state, FOLDER)


TRAINED = {"a.weight": torch.zeros(2, 3), "b": torch.zeros(4)}
MASTERS = {f"{name}/master": value for name, value in TRAINED.items()}


def optimizer(step: float = 3.0) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in TRAINED.items():
        tensors |= {f"{name}/exp_avg": torch.randn_like(parameter), f"{name}/exp_avg_sq": torch.rand_like(parameter)}
        tensors[f"{name}/step"] = torch.tensor(step)
    return tensors


def test_the_optimizers_tensors_that_are_right() -> None:
    for tensors, updates in ((optimizer(), 3), (optimizer(), None), ({}, 0), ({}, None), (MASTERS, 0)):
        check_optimizer(tensors, TRAINED, updates)
    check_optimizer(optimizer() | MASTERS, TRAINED, 3)


def drop(prefix: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(prefix)]


def put(key: str, *size: int, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: torch.zeros(*size, dtype=dtype)})


def poison(key: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[key].view(-1)[-1].fill_(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(""), "of every trained parameter; not so: .*2 in all"),
        (drop("b/exp_avg_sq"), "of every trained parameter; not so: .'b'"),
        (lambda t: t.pop("b/exp_avg"), "not so: .'b'"),
        (drop("a.weight/exp_avg_sq"), "not so: .'a.weight'"),
        (drop("b/step"), "not so: .'b'"),
        (drop("b/"), "not so: .'b'"),
        (put("b/max_exp_avg_sq", 4), "not so: .'b'"),
        (put("c/exp_avg", 4), "parameters that are not trained here: .'c'"),
        (put("exp_avg", 4), "not trained here: .''"),
        (put("b/exp_avg", 5), "exp_avg of another shape or dtype"),
        (put("b/exp_avg_sq", 2, 2), "exp_avg_sq of another shape"),
        (put("b/exp_avg", 4, dtype=torch.float64), "exp_avg of another shape or dtype"),
        (put("b/exp_avg", 4, dtype=torch.float16), "exp_avg of another shape or dtype"),
        (put("b/exp_avg", 4, dtype=torch.int32), "exp_avg of another shape or dtype"),
        (poison("b/exp_avg", math.nan), "NaN or Inf in exp_avg: .'b'"),
        (poison("a.weight/exp_avg_sq", math.inf), "NaN or Inf in exp_avg_sq: .'a.weight'"),
        (poison("b/exp_avg_sq", -1e-9), "negative numbers in exp_avg_sq: .'b'"),
        (poison("b/step", 2.0), "the optimizer's step: expected 3"),
        (put("b/step", 2), "the optimizer's step: expected 3"),
        (poison("b/step", math.nan), "the optimizer's step: expected 3"),
        (put("b/master", 4), "master weights of 1 of 2"),
    ],
)
def test_the_optimizers_tensors_that_are_not_whole(change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    tensors = optimizer()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        check_optimizer(tensors, TRAINED, 3)


def test_the_optimizers_step_is_the_states_and_its_moments_are_not_empty() -> None:
    tensors = optimizer()
    for updates in (2, 4, 0):
        with pytest.raises(ValueError, match=f"expected {updates} for every parameter"):
            check_optimizer(tensors, TRAINED, updates)
    with pytest.raises(ValueError, match="expected one number for every parameter"):
        check_optimizer(optimizer(0.0), TRAINED, None)
    assert not has_empty_moments(tensors)
    assert not has_empty_moments({})
    for key in tensors:
        if key.endswith("exp_avg_sq"):
            tensors[key].zero_()
    assert has_empty_moments(tensors)


def test_weights() -> None:
    check_weights(TRAINED, TRAINED)
    for name, value in (("b", torch.zeros(5)), ("c", torch.zeros(1)), ("b", torch.zeros(4).double())):
        with pytest.raises(ValueError, match="are not this run's"):
            check_weights(TRAINED | {name: value}, TRAINED)
    with pytest.raises(ValueError, match="are not this run's"):
        check_weights({"b": TRAINED["b"]}, TRAINED)
    with pytest.raises(ValueError, match="NaN or Inf in its weights"):
        check_weights(TRAINED | {"b": torch.tensor([1, 2, 3, math.nan])}, TRAINED)
