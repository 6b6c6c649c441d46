"""Options that put other libraries' kernels into the model: wired as their signatures ask, with the same results.

Their kernels need a GPU: here flash-attn and Liger's norm are stood in for by the formulas they compute; Liger's own
classes are checked for what is relied on.
"""

import inspect
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rollouts import answer, ask
from runs import trainer
from tiny import GRADIENT_ROUNDING, log_prob_rounding, make_lm, make_media, make_prompt
from tiny_families import family_media, family_prompt, make_family_lm
from torch.nn.functional import scaled_dot_product_attention, silu

from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.model.families import FAMILIES
from videor1.model.liger import use_liger
from videor1.rollout import SamplingOptions
from videor1.training.passes import completion_logp, pack


@pytest.mark.parametrize("options", [{"model__liger": True}, {"model__attention": "flash_attention_2"}])
def test_what_refuses_them(options: Any, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU, and a machine without the package."""
    with pytest.raises(ConfigError, match="they run on a GPU, and this run is on a CPU"):
        trainer(assets, tmp_path, **options)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.rms_norm", None)
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[liger\]"'):
        use_liger(make_lm().hf)


def test_prompts_by_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def varlen(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, most_q: int, most_k: int, *, softmax_scale: Any, causal: bool
    ) -> Any:
        calls.append(most_q)
        assert causal
        assert cu_q.dtype == torch.int32
        assert most_q == most_k == int(cu_q.diff().max())
        rows = []
        for start, stop in zip(cu_q.tolist(), cu_q[1:].tolist(), strict=False):
            a, b, c = (x[start:stop].transpose(0, 1) for x in (q, k, v))
            row = scaled_dot_product_attention(a, b, c, is_causal=True, scale=softmax_scale, enable_gqa=True)
            rows.append(row.transpose(0, 1))
        return torch.cat(rows)

    model = make_lm()
    prompts = [make_prompt(make_media(seed=1)), make_prompt(problem="What comes last?", draw=1)]
    requests, options = [ask(model, prompt, 1) for prompt in prompts], SamplingOptions(6, 0.0)
    plain = answer(model, requests, options)
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=varlen))
    model.flash = True
    flash = answer(model, requests, options)
    assert calls
    for (one,), (other,) in zip(plain, flash, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        torch.testing.assert_close(one.logp, other.logp, rtol=0, atol=log_prob_rounding(one.logp))


def liger_norm_forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What LigerRMSNorm computes with casting_mode llama or gemma, from the attributes that it reads."""
    assert (self.offset, self.casting_mode) in ((0.0, "llama"), (1.0, "gemma"))
    assert (self.in_place, self.row_mode) == (False, None)
    wide = hidden.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
    if self.casting_mode == "gemma":
        return ((self.offset + self.weight.float()) * normal).to(hidden.dtype)
    return (self.offset + self.weight) * normal.to(hidden.dtype)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_liger_in_the_model(model_type: str) -> None:
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import rms_norm, rope, swiglu

    model = make_family_lm(model_type)
    modeling: Any = sys.modules[type(model.hf).__module__]
    turned, rotary = [], modeling.apply_rotary_pos_emb

    def liger_rotary(q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None, unsqueeze_dim: int = 1) -> Any:
        turned.append(q.shape)
        return rotary(q, k, cos, sin, unsqueeze_dim)

    # What use_liger relies on, in the installed version.
    norm = rms_norm.LigerRMSNorm(8, eps=1e-5)
    assert (norm.offset, norm.casting_mode, norm.row_mode) == (0.0, "llama", None)
    reads = inspect.getsource(rms_norm.LigerRMSNorm.forward)
    settings = ("variance_epsilon", "offset", "casting_mode", "in_place", "row_mode")
    assert all(f"self.{name}" in reads for name in settings)
    taken = list(inspect.signature(liger_rotary).parameters)
    assert list(inspect.signature(rope.liger_rotary_pos_emb).parameters)[: len(taken)] == taken
    assert "gate_proj" in inspect.getsource(swiglu.LigerSwiGLUMLP.forward)

    model.hf.train()
    prompt = family_prompt(model, family_media(model_type))
    row = pack(model, [prompt], [[torch.arange(5), torch.arange(7)]])
    plain = completion_logp(model, row)
    plain.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.hf.named_parameters()}
    model.hf.zero_grad()
    with (
        patch.object(rms_norm.LigerRMSNorm, "forward", liger_norm_forward),
        patch.object(swiglu, "_swiglu_dispatch", lambda gate, up: silu(gate) * up),
        patch.object(rope, "liger_rotary_pos_emb", liger_rotary),
        patch.object(modeling, "apply_rotary_pos_emb", rotary),  # is put back afterwards
    ):
        names = set(model.hf.state_dict())
        use_liger(model.hf)
        replaced = [m for m in model.hf.modules() if hasattr(m, "casting_mode")]
        layers = model.hf.model.language_model.layers
        layer = next(layer for layer in layers if hasattr(layer, "self_attn"))
        heads = model.family.head_norms(layer.self_attn) or ()
        assert {*heads, layer.input_layernorm} <= set(replaced)
        assert set(model.hf.state_dict()) == names, "checkpoints stay as they are"
        liger = completion_logp(model, row)
        liger.sum().backward()
    assert len(turned) == (0 if model_type == "qwen3_5" else len(layers)), "once a layer, and never a part of a head"
    torch.testing.assert_close(liger, plain, rtol=0, atol=log_prob_rounding(plain))
    for name, parameter in model.hf.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= GRADIENT_ROUNDING * gradients[name].norm(), name
