"""Linear layers by oneDNN: torch's own values and gradients, for the sizes that it is quicker for."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from videor1.model import cpu_linear
from videor1.model.cpu_linear import linear, use_onednn
from videor1_kernels.linear_logprob import tiles
from videor1_kernels.testing import assert_no_worse

pytestmark = pytest.mark.skipif(not tiles.has_onednn(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def _on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tiles, cpu_linear):
        monkeypatch.setattr(module, "onednn", lambda: True)


def run(layer: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    return [out.detach(), *torch.autograd.grad((out * out.cos()).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 300), (300,), (3, 100), (7,)], ids=str)
def test_values_and_gradients(shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x, calls = nn.Linear(96, 160, bias=bias), torch.randn(*shape, 96), []
    exact, plain = run(copy.deepcopy(layer).double(), x.double()), run(layer, x)
    monkeypatch.setattr(cpu_linear, "product", lambda a, b: calls.append(a.shape) or product(a, b))
    assert use_onednn(nn.Sequential(layer)) == 1
    for mine, theirs, right in zip(run(layer, x), plain, exact, strict=True):
        assert mine.shape == right.shape
        assert_no_worse(mine, theirs, right, terms=300)
    assert len(calls) == (0 if shape == (7,) else 3)
    # A copy computes with its own weights.
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
    assert not run(other, x)[1].any()


product = cpu_linear.product


def test_what_it_is_not_for_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "product", None)
    x, w = torch.randn(300, 96), torch.randn(160, 96)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(linear(x.to(dtype), w.to(dtype)), nn.functional.linear(x.to(dtype), w.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16
    assert use_onednn(nn.Sequential(nn.Linear(4, 4).double(), nn.ReLU())) == 0


def test_a_second_derivative_is_an_error() -> None:
    x, w = torch.randn(300, 96), torch.randn(160, 96, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(x, w).square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_it_is_taken_where_it_is_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for capability, taken in {"AVX512": True, "AVX2": False, "DEFAULT": True}.items():
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert tiles.onednn() == taken
        assert use_onednn(nn.Sequential(nn.Linear(4, 4))) == int(taken)
