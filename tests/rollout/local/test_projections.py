"""Layers of a decode step with adapters: the same numbers as peft's, in few operations, from weights of now."""

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rollouts import TEXT, VIDEO, answer, ask
from tiny import log_prob_rounding, make_lm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import videor1_kernels as vk
from videor1.config import LoraConfig
from videor1.model import VideoLM
from videor1.rollout import SamplingOptions
from videor1.rollout.local import decode
from videor1.rollout.local import projections as module
from videor1.rollout.local.projections import Projections
from videor1.rollout.local.step import DecodeStep
from videor1.side_by_side import as_on_a_card
from videor1_kernels.testing import rounding

NAMES = ("q_proj", "k_proj", "v_proj")


def adapted(**options: Any) -> VideoLM:
    """A model whose adapters do something: B starts at 0."""
    model = make_lm()
    model.add_lora(LoraConfig(rank=4, alpha=6, **options), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
    return model


def attention(model: VideoLM) -> list[nn.Module]:
    layer = model.hf.model.language_model.layers[0].self_attn
    return [getattr(layer, name) for name in NAMES]


def close(ours: Tensor, theirs: list[Tensor]) -> bool:
    return bool((ours - torch.cat(theirs, 1)).abs().max() <= rounding(64, 10.0))


@pytest.mark.parametrize("most", [2**26, 0], ids=["joined", "as they are"])
@pytest.mark.parametrize("targets", [NAMES, ("q_proj", "v_proj"), ("o_proj",)])
def test_as_peft(targets: tuple[str, ...], most: int) -> None:
    """Also where some of the layers have no adapter, or none has; in one matrix, or in the layers' own."""
    model = adapted(target_modules=list(targets))
    layers = attention(model)
    x = torch.randn(5, layers[0].in_features, generator=torch.Generator().manual_seed(2))
    with model.inference(), patch.object(module, "MOST_COPIED", most):
        ours, theirs = Projections(layers, torch.float32)(x), [layer(x) for layer in layers]
        assert close(ours, theirs)
        bare = [getattr(layer, "base_layer", layer)(x) for layer in layers]
        assert close(ours, bare) == (targets == ("o_proj",))
        with model.peft.disable_adapter():
            assert close(Projections(layers, torch.float32)(x), bare)
        if targets == NAMES:  # merged or special
            layers[0].merge()
            layers[1].lora_B["default"].bias = nn.Parameter(torch.ones(layers[1].out_features))
            assert close(Projections(layers, torch.float32)(x), [layer(x) for layer in layers])


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("most", [2**26, 0], ids=["joined", "as they are"])
def test_operations_of_a_step(most: int) -> None:
    """Of bf16 layers with fp32 adapters: a product for weights and A where they are joined, one for B, and no cast."""
    model = adapted(target_modules=list(NAMES))
    layers = attention(model)
    for layer in layers:
        layer.base_layer.bfloat16()
    x = torch.randn(5, layers[0].in_features, dtype=torch.bfloat16)
    with patch.object(module, "MOST_COPIED", most):
        projections = Projections(layers, torch.bfloat16)
    with model.inference(), Operations() as operations:
        assert projections(x).dtype == torch.bfloat16
    products = sum(operations.counts[name] for name in ("mm", "addmm", "addmm_", "linear"))
    assert products == (1 if most else len(layers) + 1) + 1
    assert not operations.counts["_to_copy"]
    assert not operations.counts["mul"]


def test_a_rollout_samples_the_adapted_policy() -> None:
    """As with every layer called as a module, before and after the adapters have changed."""

    class Modules(Projections):
        def __init__(self, layers: Any, dtype: torch.dtype) -> None:
            self.layers = layers

        def __call__(self, x: Tensor) -> Tensor:
            return torch.cat([layer(x) for layer in self.layers], 1)

        def joined(self) -> None:
            return None

    model = adapted()
    seen = []
    for _ in range(2):
        found = []
        for kind in (Projections, Modules):
            with patch.object(decode, "Projections", kind):
                groups = answer(model, [ask(model, VIDEO, 3), ask(model, TEXT, 2)], SamplingOptions(5))
            found.append([c for group in groups for c in group])
        for ours, theirs in zip(*found, strict=True):
            assert ours.token_ids.tolist() == theirs.token_ids.tolist()
            assert (ours.logp - theirs.logp).abs().max() <= log_prob_rounding(theirs.logp)
        seen.append(torch.cat([c.logp for c in found[0]]))
        with torch.no_grad():
            for name, parameter in model.hf.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-1.5)
    assert not torch.equal(*seen)


def test_launches_of_a_layer() -> None:
    """With adapters on all seven of its layers: 13, where peft's way was 68."""
    model = adapted()
    step, launched = None, []
    start, requests = DecodeStep.__init__, [ask(model, TEXT, 2)]

    def kept(self: DecodeStep, *args: Any, **kwargs: Any) -> None:
        nonlocal step
        start(self, *args, **kwargs)
        step = self.decoder

    with patch.object(DecodeStep, "__init__", kept), as_on_a_card():
        answer(model, requests, SamplingOptions(3))
    assert step is not None
    layers, operations = len(step.layers), step.operations
    for name in operations._fields:

        def call(*args: Any, name: str = name) -> Any:
            launched.append(name)
            with torch._C._DisableTorchDispatch():
                return getattr(operations, name)(*args)

        step.operations = step.operations._replace(**{name: call})
    layout = vk.DecodeLayout(torch.tensor([0, 9]), torch.tensor([0, 0]), torch.tensor([0]), torch.tensor([0, 1]))
    given = torch.tensor([3, 4]), torch.tensor([step.first + 1] * 2), torch.tensor([2, 2]), layout
    with model.inference(), Operations() as seen:
        step.states(*given)
    products = sum(seen.counts[name] for name in ("mm", "addmm", "addmm_", "linear"))
    assert Counter(launched) == {"norm": 2 * layers, "rotary": layers, "attention": layers, "silu": layers}
    assert products == 8 * layers
