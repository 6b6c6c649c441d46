"""AdamW's groups and state, the schedule's values, and steps that change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from videor1.config import TrainConfig
from videor1.training.optim import guarded_step, learning_rate, load_state_tensors, make_optimizer, state_tensors


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"layer.weight": (3, 4), "layer.bias": (3,), "norm": (4,), "patches": (2, 3, 2, 2, 2)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        # 3 steps of warm-up of 11: (s + 1) / 4, then the rest of 8 steps from the peak down.
        ("constant", [0.25, 0.5, 0.75] + [1.0] * 8),
        ("linear", [0.25, 0.5, 0.75] + [1 - i / 8 for i in range(8)]),
        ("cosine", [0.25, 0.5, 0.75] + [math.cos(math.pi * i / 16) ** 2 for i in range(8)]),
    ],
)
def test_schedule(kind: str, values: list[float]) -> None:
    config = TrainConfig(learning_rate=2e-4, warmup_steps=3, lr_scheduler_type=kind)  # type: ignore[arg-type]
    assert [learning_rate(step, 11, config) for step in range(11)] == pytest.approx([2e-4 * v for v in values])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedule_ends_at_zero_and_never_goes_below(kind: str) -> None:
    config = TrainConfig(learning_rate=1.0, lr_scheduler_type=kind)  # type: ignore[arg-type]
    assert learning_rate(0, 10, config) == 1
    assert learning_rate(10, 10, config) == pytest.approx(0, abs=1e-12)
    assert learning_rate(25, 10, config) == pytest.approx(0, abs=1e-12)
    assert learning_rate(0, 0, config) == 1


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_warm_up_longer_than_the_run(kind: str) -> None:
    config = TrainConfig(learning_rate=1.0, warmup_steps=9, lr_scheduler_type=kind)  # type: ignore[arg-type]
    assert [learning_rate(step, 4, config) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_only_matrices_decay() -> None:
    named = parameters()
    optimizer = make_optimizer(named, TrainConfig(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95, learning_rate=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"layer.weight": 0.3, "layer.bias": 0.0, "norm": 0.0, "patches": 0.3}
    assert {name: decay[id(p)] for name, p in named.items()} == expected
    assert all(group["betas"] == (0.8, 0.95) for group in optimizer.param_groups)
    before = {name: p.detach().clone() for name, p in named.items()}
    for p in named.values():
        p.grad = torch.zeros_like(p)
    guarded_step(optimizer, named, 0.1, 1.0)
    for name, p in named.items():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * expected[name]))


def test_only_vectors() -> None:
    named = {"norm": nn.Parameter(torch.ones(3))}
    assert len(make_optimizer(named, TrainConfig()).param_groups) == 1


def test_guarded_step_clips_to_the_norm_and_takes_the_rate() -> None:
    """The first AdamW step moves every weight by the rate; the moment tells the clipped gradient."""
    named = parameters()
    optimizer = make_optimizer(named, TrainConfig(weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in named.items()}
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


def test_small_gradients_are_not_scaled_up() -> None:
    named = {"w": nn.Parameter(torch.zeros(2, 2))}
    optimizer = make_optimizer(named, TrainConfig())
    named["w"].grad = torch.full((2, 2), 0.1)
    guarded_step(optimizer, named, 0.01, 5.0)
    torch.testing.assert_close(optimizer.state[named["w"]]["exp_avg"], torch.full((2, 2), 0.01))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_a_nonfinite_norm_changes_nothing(value: float) -> None:
    """3e38 is finite, the norm of many is not."""
    named = parameters()
    optimizer = make_optimizer(named, TrainConfig())
    for p in named.values():
        p.grad = torch.ones_like(p)
    guarded_step(optimizer, named, 0.01, 1.0)
    before = {name: p.detach().clone() for name, p in named.items()}
    moments = {key: t.clone() for key, t in state_tensors(optimizer, named).items()}
    for p in named.values():
        p.grad = torch.full_like(p, value)
    norm, finite = guarded_step(optimizer, named, 0.5, 1.0)
    assert not finite
    assert not math.isfinite(norm)
    assert all(p.grad is None for p in named.values())
    assert all(torch.equal(p, before[name]) for name, p in named.items())
    after = state_tensors(optimizer, named)
    assert after.keys() == moments.keys()
    assert all(torch.equal(after[key], moments[key]) for key in moments)


def test_no_gradient_is_a_gradient_of_zero() -> None:
    """Whether a batch has nothing to learn from, or leaves that out, is one step: momentum and decay go on."""
    left_out, kept = parameters(), parameters()
    for named in (left_out, kept):
        optimizer = make_optimizer(named, TrainConfig(weight_decay=0.5))
        for i in range(3):
            for p in named.values():
                p.grad = torch.ones_like(p) if i == 0 else torch.zeros_like(p) if named is kept else None
            norm, finite = guarded_step(optimizer, named, 0.1, 1.0)
            assert finite
            assert (norm == 0) == (i > 0)
    for name, p in left_out.items():
        assert torch.equal(p, kept[name])
        assert not torch.equal(p, parameters()[name])


def test_state_round_trip_is_exact_and_independent() -> None:
    one, other = parameters(), parameters()
    first, second = (make_optimizer(named, TrainConfig()) for named in (one, other))

    def step(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=generator)
        stepped = {name: p for name, p in named.items() if name != "norm" or seed > 1}
        named["norm"].grad = named["norm"].grad if seed > 1 else None
        guarded_step(optimizer, stepped, 0.01, 1.0)

    step(one, first, 0)
    step(one, first, 1)
    saved = {key: t.clone() for key, t in state_tensors(first, one).items()}
    assert not any(key.startswith("norm/") for key in saved)  # not stepped yet
    with torch.no_grad():
        for name, p in other.items():
            p.copy_(one[name])
    load_state_tensors(second, other, saved)
    for seed in (2, 3):
        step(one, first, seed)
        step(other, second, seed)
    assert all(torch.equal(p, other[name]) for name, p in one.items())
    one_state, other_state = state_tensors(first, one), state_tensors(second, other)
    assert one_state.keys() == other_state.keys()
    assert all(torch.equal(one_state[key], other_state[key]) for key in one_state)
    assert any(not torch.equal(saved[key], other_state[key]) for key in saved)  # the loaded tensors were copied


def test_state_of_unknown_parameters_is_refused() -> None:
    named = parameters()
    optimizer = make_optimizer(named, TrainConfig())
    with pytest.raises(ValueError, match=r"not trained here: \['gone'\]"):
        load_state_tensors(optimizer, named, {"gone/exp_avg": torch.zeros(1)})
