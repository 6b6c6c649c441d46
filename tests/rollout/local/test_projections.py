"""Layers of a decode step with adapters: the same numbers as peft's, in few operations, from weights of now."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rollouts import TEXT, VIDEO, answer, ask
from tiny import log_prob_rounding, make_lm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import videor1_kernels as vk
from videor1.config import LoraConfig, TrainConfig
from videor1.model import VideoLM
from videor1.model.save import save_model
from videor1.plan.setup import Target, build_policy, make_fake, shape_of
from videor1.rollout import LocalEngine, SamplingOptions
from videor1.rollout.local import weights as weights_module
from videor1.rollout.local.decode import Decoder, Operations
from videor1.rollout.local.kv_cache import Capacity, KVCache
from videor1.rollout.local.projections import Projections, same_memory
from videor1.rollout.local.weights import DecodeWeights, copied_bytes
from videor1_kernels.testing import rounding

NAMES = ("q_proj", "k_proj", "v_proj")
LAST_NORM = "model.language_model.layers.1.input_layernorm.weight"


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


FORMS = pytest.mark.parametrize("packed", [True, False], ids=["packed", "as they are"])


@FORMS
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("targets", [NAMES, ("q_proj", "v_proj"), ("o_proj",)])
def test_as_peft(targets: tuple[str, ...], stacked: bool, packed: bool) -> None:
    """Also where some of the layers have no adapter, or none has; in one matrix, or in the layers' own."""
    model = adapted(target_modules=list(targets))
    layers = attention(model)
    x = torch.randn(5, layers[0].in_features, generator=torch.Generator().manual_seed(2))
    form: Any = {"packed": packed, "stacked": stacked}
    with model.inference():
        theirs = [layer(x) for layer in layers]
        first = Projections(layers, torch.float32, **form)
        assert close(first(x), theirs)
        bare = [getattr(layer, "base_layer", layer)(x) for layer in layers]
        assert close(first(x), bare) == (targets == ("o_proj",))
        with model.peft.disable_adapter():
            assert close(Projections(layers, torch.float32, **form)(x), bare)
            assert first.renew() == (targets == ("o_proj",))
        assert first.renew()
        assert torch.equal(first(x), Projections(layers, torch.float32, **form)(x))
        if targets == NAMES:  # merged or special
            layers[0].merge()
            layers[1].lora_B["default"].bias = nn.Parameter(torch.ones(layers[1].out_features))
            assert not first.renew()
            assert close(Projections(layers, torch.float32, **form)(x), [layer(x) for layer in layers])


def test_parameters_become_parts_of_the_matrix(tmp_path: Path) -> None:
    """No weight is in memory twice, where it may move; training, saving and copying go on as before."""
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    identities = {name: id(p) for name, p in model.hf.named_parameters()}
    assert copied_bytes(model) == 0
    with model.inference():
        weights = DecodeWeights(model)
    layer = model.hf.model.language_model.layers[0]
    three = [m.base_layer.weight for m in attention(model)]
    assert len({p.untyped_storage()._cdata for p in three}) == 1
    # Beside the parameters: what adapters give is scaled and cast, biases are joined.
    assert weights.bytes() < sum(
        p.nbytes for name, p in model.hf.named_parameters() if "lora" in name or "bias" in name
    )
    assert {name: id(p) for name, p in model.hf.named_parameters()} == identities
    assert all(torch.equal(p, before[name]) for name, p in model.hf.named_parameters())
    with model.inference():
        again = DecodeWeights(model)  # which finds the matrices
        assert all(map(same_memory, weights.layers[0].qkv.tensors()[:1], again.layers[0].qkv.tensors()[:1]))
    copy = model.frozen_copy()
    assert all(torch.equal(p, before[name]) for name, p in copy.hf.named_parameters())
    x = torch.randn(3, 64)
    output = layer.self_attn.q_proj(x).sum()
    three[0].requires_grad_()
    layer.self_attn.q_proj(x).sum().backward()
    torch.optim.SGD([three[0]], lr=0.1).step()
    with model.inference():
        assert weights.renew()
        assert close(weights.layers[0].qkv(x), [m(x) for m in attention(model)])
        assert not torch.equal(layer.self_attn.q_proj(x).sum(), output)
        model.source = str(tmp_path)  # which has no processor
        save_model(model, tmp_path)
    saved = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert torch.equal(saved["model.language_model.layers.1.input_layernorm.weight"], before[LAST_NORM])
    merged = three[1] + layer.self_attn.k_proj.get_delta_weight("default")
    assert torch.equal(saved["model.language_model.layers.0.self_attn.k_proj.weight"], merged)


def test_parameters_that_may_not_move_are_copied() -> None:
    """As those of an optimizer that has laid all parameters into one buffer."""
    model = make_lm()
    parameters = [p for layer in model.hf.model.language_model.layers for p in layer.parameters()]
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)
    joined = [*attention(model), layer_mlp(model).gate_proj, layer_mlp(model).up_proj]
    assert copied_bytes(model) == 2 * sum(m.weight.nbytes for m in joined)
    with model.inference():
        weights = DecodeWeights(model)
        x, layer = torch.randn(3, 64), weights.layers[0]
        assert weights.bytes() > copied_bytes(model)
        assert DecodeWeights(model, packed=False).bytes() < copied_bytes(model) / 8  # biases
        flat.mul_(0.5)
        assert weights.renew()
        assert close(layer.qkv(x), [m(x) for m in attention(model)])
    assert all(p.untyped_storage()._cdata == flat.untyped_storage()._cdata for p in parameters)


def test_which_decode_weights_are_chosen_and_why() -> None:
    """Where packing takes a second copy."""
    model = make_lm()
    both = layer_mlp(model)
    flat = torch.cat([both.gate_proj.weight.detach(), torch.zeros(1, 64), both.up_proj.weight.detach()])
    both.gate_proj.weight.data, both.up_proj.weight.data = flat[:96], flat[97:]
    copied = 2 * 96 * 64 * 4
    assert copied_bytes(model) == copied
    for asked, room, found in (
        ("auto", copied, "packed (a second copy takes 0 MiB, and there is room for it in 0)"),
        ("auto", copied - 1, "model (a second copy takes 0 MiB, and there is no room for it in 0)"),
        ("packed", 0, "packed (a second copy takes 0 MiB)"),
        ("model", copied, "model (as asked for)"),
    ):
        engine = LocalEngine(model, SamplingOptions(2), decode_weights=asked)  # type: ignore[arg-type]
        engine.room = room
        engine.generate([ask(model, TEXT, 1)])
        assert engine.choice == f"rollout.decode_weights: {found}"
    engine = LocalEngine(make_lm(), SamplingOptions(2))
    engine.generate([ask(model, TEXT, 1)])
    assert engine.choice.endswith("packed (no second copy: the model's parameters are parts of them)")
    assert engine.weights is None


def layer_mlp(model: VideoLM) -> Any:
    return model.hf.model.language_model.layers[0].mlp


class Launches(TorchDispatchMode):
    """Counts what would be launched on a GPU: all that computes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("new_empty", "empty", "detach", "device"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@FORMS
def test_operations_of_a_step(packed: bool) -> None:
    """Of bf16 layers with fp32 adapters: a product for weights and A where they are joined, one for B, and no cast."""
    model = adapted(target_modules=list(NAMES))
    layers = attention(model)
    for layer in layers:
        layer.base_layer.bfloat16()
    x = torch.randn(5, layers[0].in_features, dtype=torch.bfloat16)
    projections = Projections(layers, torch.bfloat16, packed=packed)
    with model.inference(), Launches() as operations:
        assert projections(x).dtype == torch.bfloat16
    products = sum(operations.counts[name] for name in ("mm", "addmm", "addmm_", "linear"))
    assert products == (1 if packed else len(layers) + 1) + 1
    assert not operations.counts["_to_copy"]
    assert not operations.counts["mul"]


def test_a_rollout_samples_the_adapted_policy() -> None:
    """As with every layer called as a module, before and after the adapters have changed."""

    class Modules(Projections):
        def __init__(self, layers: Any, dtype: torch.dtype, **form: Any) -> None:
            self.layers, self._form = layers, None

        def __call__(self, x: Tensor) -> Tensor:
            return torch.cat([layer(x) for layer in self.layers], 1)

        def joined(self) -> None:
            return None

    model = adapted()
    seen = []
    for _ in range(2):
        found = []
        for kind in (Projections, Modules):
            with patch.object(weights_module, "Projections", kind):
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


def launches_of_a_7b_step(layers: int, **form: Any) -> tuple[Counter[str], int]:
    """Of a 7B model with so many layers and LoRA on all linear ones, on fake tensors; and the memory of its decode
    weights beside the model's."""
    shape = shape_of("7b").to_dict()
    shape["vision_config"]["depth"] = shape["text_config"]["num_hidden_layers"] = layers
    del shape["text_config"]["layer_types"]
    config = TrainConfig(lora=LoraConfig(rank=64), freeze_vision=True)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = build_policy(Qwen2_5_VLConfig.from_dict(shape), config, Target(cuda=True, bf16=True), "meta")
    make_fake(model, fake)
    launched: Counter[str] = Counter()

    def stand_in(name: str, result: Callable[..., Any]) -> Callable[..., Any]:
        """For an operation that is one launch on a GPU."""

        def call(*args: Any) -> Any:
            launched[name] += 1
            return result(*args)

        return call

    layout = vk.DecodeLayout(torch.tensor([0, 9]), torch.tensor([0, 0]), torch.tensor([0]), torch.tensor([0, 1]))
    with fake, model.inference():
        cache = KVCache(Capacity(2, 9, 4, 1), model.hf.config.text_config, torch.bfloat16, model.device)
        decoder = Decoder(model, cache, range(16), weights=DecodeWeights(model, **form))
        decoder.operations = Operations(
            attention=stand_in("attention", lambda inputs, *_: inputs.q.new_empty(inputs.q.shape)),
            norm=stand_in("norm", lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape))),
            rotary=stand_in("rotary", lambda qkv, *_: qkv.new_empty(len(qkv), 28, 128)),
            silu=stand_in("silu", lambda gate_up, *_: gate_up.new_empty(len(gate_up), 18944)),
            gate=None,
            linear=None,
        )
        with Launches() as seen:
            decoder.states(torch.empty(2, dtype=torch.int64), torch.tensor([1, 2]), torch.tensor([1, 2]), layout)
    return seen.counts + launched, decoder.weights.bytes()


def test_launches_of_a_7b_layer() -> None:
    """12 with adapters on all seven of its linear layers, where peft's way takes 68."""
    (one, kept), (two, twice) = (launches_of_a_7b_step(layers) for layers in (1, 2))
    assert two - one == {"norm": 2, "rotary": 1, "attention": 1, "silu": 1, "addmm": 1, "mm": 3, "addmm_": 3}
    assert (two - one).total() == 12
    # Of a layer's 466 MB nothing is there twice: B of rank 64, block-diagonal for q, k and v, and their bias.
    assert twice - kept == 2 * 64 * (3 * 4608 + 3584 + 2 * 18944 + 3584) + 2 * (4608 + 3 * 64)
    (ones, _), (twos, _) = (launches_of_a_7b_step(layers, packed=False) for layers in (1, 2))
    assert (twos - ones).total() == 20
