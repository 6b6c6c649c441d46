"""LoRA layers with few operations: peft's values and gradients, without its passes through fp32."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from videor1.model.lora import use_lean_lora

TOKENS, SIZE, OUT, RANK = 24, 64, 48, 8


class Model(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, OUT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(dtype: torch.dtype, *, lean: bool, bias: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    base = Model(bias).to(dtype)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=24, target_modules=["layer"], **options))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    if lean:
        assert use_lean_lora(model) == 1
    return model.train()


def run(model: Any, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """The output, and the gradients of the input and the adapters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        out = model(x)
    out.float().square().sum().backward()
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(TOKENS,), (1, TOKENS), (2, 3, 4)])
def test_values_and_gradients_are_pefts(shape: tuple[int, ...], bias: bool) -> None:
    x = torch.randn(*shape, SIZE, dtype=torch.float64)
    ours, theirs = (run(adapted(torch.float64, lean=lean, bias=bias).double(), x) for lean in (True, False))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_under_autocast_it_errs_no_more_than_peft(given: torch.dtype) -> None:
    """bf16 weights and fp32 adapters, as a run in bf16 has them."""
    x = torch.randn(1, TOKENS, SIZE).to(torch.bfloat16).to(given)
    exact_model = adapted(torch.bfloat16, lean=False)
    exact = run(exact_model.double(), x.double())
    ours, theirs = (run(adapted(torch.bfloat16, lean=lean), x, autocast=True) for lean in (True, False))
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        errors = [(made[name].double() - value).norm() for made in (ours, theirs)]
        assert errors[0] <= 1.1 * errors[1] + 1e-12, name


class Casts(TorchDispatchMode):
    """The sizes of what is converted to another dtype, and whether anything of the activations' size is fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.converted: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.converted.append(out.numel())
        return out


@pytest.mark.parametrize("lean", [False, True])
def test_no_activation_is_converted(lean: bool) -> None:
    """Only the adapters are, once each: weights far smaller than the activations of a packed row."""
    model, x = adapted(torch.bfloat16, lean=lean), torch.randn(4096, SIZE).bfloat16()
    with Casts() as casts, torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert (max(casts.converted) >= x.numel()) == (not lean)


@pytest.mark.parametrize("what", ["off", "merged", "dropout", "dora", "two", "fp32 adapters of bf16"])
def test_anything_beyond_is_pefts_own(what: str) -> None:
    options: dict[str, Any] = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}}.get(what, {})
    dtype = torch.bfloat16 if what.endswith("bf16") else torch.float32
    x, outs = torch.randn(TOKENS, SIZE, dtype=dtype), []
    for lean in (True, False):
        model = adapted(dtype, lean=lean, **options)
        if what == "off":
            model.disable_adapter_layers()
        elif what == "merged":
            model.merge_adapter()
        elif what == "two":
            torch.manual_seed(1)
            model.add_adapter("other", LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False))
            model.base_model.set_adapter(["default", "other"])
        torch.manual_seed(2)
        outs.append(model(x))
    assert torch.equal(*outs)


def test_with_dropout_an_evaluation_is_lean(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (adapted(torch.float32, lean=lean, lora_dropout=0.5).eval() for lean in (True, False))
    x = torch.randn(TOKENS, SIZE)
    expected = theirs(x)
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.forward", None)
    torch.testing.assert_close(ours(x), expected)
