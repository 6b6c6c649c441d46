"""The vision tower passes all windows to its attention at once, reads nothing back, and computes what it did before."""

import copy

import pytest
import torch
from spies import Calls
from tiny import make_lm, make_media
from torch import Tensor

from videor1.model import VideoLM, vision
from videor1.model.families import QWEN2_5_VL
from videor1.video.patches import normalize_patches
from videor1_kernels.testing import rounding

MEDIA = [make_media("video", (3, 8, 12), seed=1), make_media("image", (1, 4, 20), seed=2)]  # windows of several sizes
GRID = torch.tensor([media.grid_thw for media in MEDIA])


def features(model: VideoLM) -> Tensor:
    return torch.cat(model.vision_features(MEDIA))


def test_as_window_by_window() -> None:
    """Features and gradients equal those of transformers' own loop over windows, to the bit."""
    model, plain = make_lm(), make_lm()
    plain.visual.config._attn_implementation = "sdpa"
    ours, theirs = features(model), features(plain)
    assert torch.equal(ours, theirs)
    weights = torch.randn_like(ours)
    gradients = [
        torch.autograd.grad((out * weights).sum(), [*lm.visual.parameters()])
        for lm, out in ((model, ours), (plain, theirs))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    # One call a layer, and nothing read back: on the meta device, whose values cannot be read, as on a GPU, in bf16.
    visual = make_lm().visual
    config = copy.deepcopy(visual.config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        tower = type(visual)(config).to(torch.bfloat16)
    vision.prepare(tower)
    meta = torch.device("meta")
    pixels = torch.cat([media.patches for media in MEDIA]).to(meta)
    lengths = QWEN2_5_VL.tower_inputs(GRID, tower.config, meta, torch.bfloat16)
    assert {value.device.type for value in lengths.values() if isinstance(value, Tensor)} == {"meta"}
    with Calls() as calls:
        out = tower(normalize_patches(pixels, torch.bfloat16), grid_thw=GRID, **lengths)
    assert out.pooler_output.shape[0] == sum(t * h * w for t, h, w in GRID.tolist()) // 4
    assert len(calls.varlen) == config.depth
    heads = config.num_heads, config.hidden_size // config.num_heads
    assert {args[0].shape for args in calls.varlen} == {(len(pixels), *heads)}
    frames, windows = (max(n for n in lengths[key].shape) - 1 for key in ("cu_seqlens", "cu_window_seqlens"))
    full = [len(args[3]) - 1 == frames for args in calls.varlen]
    assert [i for i, whole in enumerate(full) if whole] == list(config.fullatt_block_indexes)
    assert windows > frames
    assert {args[5] for args in calls.varlen} == {8 * 12, lengths["max_window_seqlen"]}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_lengths(device: str) -> None:
    """Those of windows stay on the host where each is computed by itself."""
    lengths = QWEN2_5_VL.tower_inputs(GRID, make_lm().visual.config, torch.device(device), torch.float32)
    assert lengths["cu_seqlens"].tolist() == [0, 96, 192, 288, 368]
    assert lengths["cu_window_seqlens"].tolist()[-1] == 368
    assert lengths["max_seqlen"] == 96
    assert lengths["max_window_seqlen"] == max(lengths["cu_window_seqlens"].diff().tolist())
    assert lengths["window_index"].device.type == lengths["position_ids"].device.type == device


def test_patches_are_embedded_by_a_product() -> None:
    """Of the layer's own parameters; a layer of another shape stays a convolution."""
    visual = make_lm().visual
    layer = visual.patch_embed.proj.double()
    assert isinstance(layer, vision.PatchProduct)
    patches = normalize_patches(MEDIA[0].patches, torch.float64).view(-1, *layer.weight.shape[1:])
    expected = torch.nn.Conv3d.forward(layer, patches)
    product = layer(patches)
    assert product.shape == expected.shape
    assert (product - expected).abs().max() <= rounding(patches[0].numel(), 100.0, torch.float64)
    assert expected.abs().max() < 100
    with Calls() as calls:
        assert layer.to("meta")(patches.to("meta")).shape == expected.shape
    assert not any("convolution" in name for name in calls.names)
    visual.patch_embed.proj = torch.nn.Conv3d(3, 8, 2, stride=1)
    visual.config._attn_implementation = "eager"
    vision.prepare(visual)
    assert type(visual.patch_embed.proj) is torch.nn.Conv3d
    assert visual.config._attn_implementation == "eager"
