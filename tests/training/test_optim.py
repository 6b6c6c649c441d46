"""AdamW's groups and state, the schedule's values, and steps that change nothing."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from videor1.config import TrainConfig
from videor1.training.optim import guarded_step, learning_rate, load_state_tensors, make_optimizer, state_tensors

Named = dict[str, nn.Parameter]


def parameters() -> Named:
    generator = torch.Generator().manual_seed(0)
    shapes = {"layer.weight": (3, 4), "layer.bias": (3,), "norm": (4,), "patches": (2, 3, 2, 2, 2)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def set_gradients(named: Named, value: float) -> None:
    for p in named.values():
        p.grad = torch.full_like(p, value)


def copied(tensors: dict[str, Tensor] | Named) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(one: dict[str, Tensor] | Named, other: dict[str, Tensor] | Named) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("constant", [1.0] * 8),
        ("linear", [1 - i / 8 for i in range(8)]),
        ("cosine", [math.cos(math.pi * i / 16) ** 2 for i in range(8)]),
    ],
)
def test_schedule(kind: Any, values: list[float]) -> None:
    config = TrainConfig(learning_rate=2e-4, warmup_steps=3, lr_scheduler_type=kind)
    # 3 steps of warm-up of 11: (s + 1) / 4, then the rest of 8 steps from the peak down.
    expected = [2e-4 * value for value in (0.25, 0.5, 0.75, *values)]
    assert [learning_rate(step, 11, config) for step in range(11)] == pytest.approx(expected)
    config = TrainConfig(learning_rate=1.0, lr_scheduler_type=kind)  # ends at 0, and never goes below
    assert learning_rate(0, 10, config) == learning_rate(0, 0, config) == 1
    last = float(kind == "constant")
    assert [learning_rate(step, 10, config) for step in (10, 25)] == pytest.approx([last, last], abs=1e-12)
    config = TrainConfig(learning_rate=1.0, warmup_steps=9, lr_scheduler_type=kind)  # longer than the run
    assert [learning_rate(step, 4, config) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_only_matrices_decay() -> None:
    named = parameters()
    optimizer = make_optimizer(named, TrainConfig(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95, learning_rate=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"layer.weight": 0.3, "layer.bias": 0.0, "norm": 0.0, "patches": 0.3}
    assert {name: decay[id(p)] for name, p in named.items()} == expected
    assert all(group["betas"] == (0.8, 0.95) for group in optimizer.param_groups)
    before = copied(named)
    set_gradients(named, 0.0)
    guarded_step(optimizer, named, 0.1, 1.0)
    for name, p in named.items():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * expected[name]))
    assert len(make_optimizer({"norm": nn.Parameter(torch.ones(3))}, TrainConfig()).param_groups) == 1


def test_guarded_step_clips_to_the_norm_and_takes_the_rate() -> None:
    """The first AdamW step moves every weight by the rate; the moment tells the clipped gradient."""
    named = parameters()
    optimizer = make_optimizer(named, TrainConfig(weight_decay=0.0))
    before = copied(named)
    gradients = {name: torch.randn(p.shape) for name, p in named.items()}
    for name, p in named.items():
        p.grad = gradients[name].clone()
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    found, finite = guarded_step(optimizer, named, 0.01, 0.5)
    assert finite
    assert found == pytest.approx(norm, rel=1e-6)
    for name, p in named.items():
        assert p.grad is None
        torch.testing.assert_close(p.detach(), before[name] - 0.01 * gradients[name].sign(), atol=1e-5, rtol=0)
        moment = optimizer.state[p]["exp_avg"] / (1 - 0.9)
        torch.testing.assert_close(moment, gradients[name] * 0.5 / norm, rtol=1e-4, atol=1e-7)
    optimizer = make_optimizer(named, TrainConfig())
    set_gradients(named, 0.1)
    guarded_step(optimizer, named, 0.01, 5.0)  # a small gradient is not scaled up
    for p in named.values():
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full_like(p, 0.01))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_a_nonfinite_norm_changes_nothing(value: float) -> None:
    """3e38 is finite, the norm of many is not."""
    named = parameters()
    optimizer = make_optimizer(named, TrainConfig())
    set_gradients(named, 1.0)
    guarded_step(optimizer, named, 0.01, 1.0)
    before, moments = copied(named), copied(state_tensors(optimizer, named))
    set_gradients(named, value)
    norm, finite = guarded_step(optimizer, named, 0.5, 1.0)
    assert not finite
    assert not math.isfinite(norm)
    assert all(p.grad is None for p in named.values())
    assert_equal(named, before)
    assert_equal(state_tensors(optimizer, named), moments)


class OnCard(nn.Parameter):
    """A parameter that says it is on a GPU; torch has fused AdamW for CPUs too."""

    is_cuda = True


@pytest.mark.parametrize("kind", [nn.Parameter, OnCard])
def test_state_round_trip_is_exact_and_independent(kind: type[nn.Parameter]) -> None:
    """On a GPU AdamW is fused, and its step counter lies with the parameter, where the fused update wants it."""
    one, other = ({name: kind(p.detach()) for name, p in parameters().items()} for _ in range(2))
    first, second = (make_optimizer(named, TrainConfig()) for named in (one, other))
    assert all(bool(group["fused"]) == (kind is OnCard) for group in first.param_groups)

    def step(named: Named, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=generator)
        stepped = {name: p for name, p in named.items() if name != "norm" or seed > 1}
        named["norm"].grad = named["norm"].grad if seed > 1 else None
        guarded_step(optimizer, stepped, 0.01, 1.0)

    step(one, first, 0)
    step(one, first, 1)
    saved = copied(state_tensors(first, one))
    assert not any(key.startswith("norm/") for key in saved)  # not stepped yet
    with torch.no_grad():
        for name, p in other.items():
            p.copy_(one[name])
    load_state_tensors(second, other, saved)
    for seed in (2, 3):
        step(one, first, seed)
        step(other, second, seed)
    assert_equal(one, other)
    state = state_tensors(second, other)
    assert_equal(state_tensors(first, one), state)
    assert any(not torch.equal(saved[key], state[key]) for key in saved)  # the loaded tensors were copied
    with pytest.raises(ValueError, match=r"not trained here: \['gone'\]"):
        load_state_tensors(second, other, {"gone/exp_avg": torch.zeros(1)})
    there = {name: nn.Parameter(p.detach().to("meta")) for name, p in one.items()}
    elsewhere = torch.optim.AdamW(there.values(), fused=False)
    elsewhere.param_groups[0]["fused"] = True
    load_state_tensors(elsewhere, there, saved)
    assert {value.device.type for kept in elsewhere.state.values() for value in kept.values()} == {"meta"}
