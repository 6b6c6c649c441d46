"""frames_to_patches: 16 frames of 1080p to 420x224, beside the chain of the Hugging Face video processor in torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import OURS, Case, Contender, Step, Work
from benchmarks.oracle import Expected
from videor1_kernels import frames_to_patches
from videor1_kernels.frames_to_patches.reference import (
    FACTOR,
    MEAN,
    PATCH,
    PATCH_COLUMNS,
    STD,
    YuvFrames,
    frames_to_patches_reference,
)

FRAMES, SOURCE, SIZE = 16, (1080, 1920), (224, 420)
# rms, in units of a standard deviation of pixels, where a level is 1.5e-2 and rounding to bf16 takes 1e-3 to 2e-3.
BOUND, BOUND_OF_OTHERS = 4e-3, 8e-3  # others may round between the resize's two passes
Inputs = Tensor | YuvFrames


def cases(device: torch.device) -> list[Case]:
    size = {"frames": FRAMES, "from": f"{SOURCE[1]}x{SOURCE[0]}", "to": f"{SIZE[1]}x{SIZE[0]}", "out": "bfloat16"}
    return [
        Case(
            op="frames_to_patches",
            title=title,
            size=size,
            dtype=torch.bfloat16,
            inputs=inputs,
            expected=_expected,
            work=_work,
            contenders=(
                Contender(OURS, _ours, does=DOES, graph=True),
                Contender("torch chain", _chain(_float_resize), does="fp32 RGB of all frames, operation by operation"),
                _compiled if device.type == "cuda" else _in_bytes,
            ),
        )
        for title, inputs in (("from NV12", _nv12), ("from RGB", _rgb))
    ]


DOES = {
    "native": "one pass; on a CPU besides what is counted, a window of rows in fp32 a thread (0.5 MiB)",
    "reference": "a few frames at a time in fp32",
}


def _waves(device: torch.device, height: int, width: int, shift: float) -> Tensor:
    """A picture's range of frequencies, with noise: uint8 [F, height, width]."""
    generator = torch.Generator(device).manual_seed(0)
    t, y, x = (torch.arange(n, device=device, dtype=torch.float32) for n in (FRAMES, height, width))
    waves = torch.sin(x / 37 + shift)[None, None] * torch.cos(y / 23)[None, :, None] + torch.sin(t)[:, None, None]
    noise = torch.randn(FRAMES, height, width, device=device, generator=generator)
    return (waves * 55 + 127 + 8 * noise).clamp_(0, 255).byte()


def _nv12(device: torch.device) -> YuvFrames:
    height, width = SOURCE
    uv = torch.stack([_waves(device, height // 2, width // 2, shift) for shift in (1.0, 2.0)], -1)
    return YuvFrames((_waves(device, height, width, 0.0), uv), matrix="709")


def _rgb(device: torch.device) -> Tensor:
    return torch.stack([_waves(device, *SOURCE, shift) for shift in (0.0, 1.0, 2.0)], -1)


def _work(inputs: Inputs) -> Work:
    planes = inputs.planes if isinstance(inputs, YuvFrames) else (inputs,)
    rows = FRAMES // 2 * SIZE[0] * SIZE[1] // PATCH**2
    return Work(0.0, sum(plane.nbytes for plane in planes) + rows * PATCH_COLUMNS * 2, "")


def _expected(inputs: Inputs) -> list[Expected]:
    patches = frames_to_patches_reference(inputs, size=SIZE, dtype=torch.float64)
    assert isinstance(patches, Tensor)
    rows = torch.arange(0, len(patches), 7, device=patches.device)
    expected = functools.partial(Expected, "patches", "patches", patches[rows], rows)
    return [expected(bound=BOUND_OF_OTHERS), expected(bound=BOUND, ours_only=True)]


def _ours(inputs: Inputs) -> Step:
    return lambda: {"patches": frames_to_patches(inputs, size=SIZE)}


def _chain(resize: Callable[[Tensor], Tensor]) -> Callable[..., Step]:
    """Convert, resize, round, normalise, cut: what the Hugging Face processor does, each over all frames."""

    def build(inputs: Inputs, normalize: Callable[[Tensor], Tensor] = _normalize) -> Step:
        def step() -> Mapping[str, Tensor]:
            if isinstance(inputs, YuvFrames):
                rgb = inputs.to_rgb(0, FRAMES, torch.float32).round_().byte()
            else:
                rgb = inputs.permute(0, 3, 1, 2)
            return {"patches": normalize(resize(rgb))}

        return step

    return build


_resize = functools.partial(F.interpolate, size=SIZE, mode="bicubic", antialias=True)


def _float_resize(rgb: Tensor) -> Tensor:
    return _resize(rgb.float()).clamp_(0, 255).round_()


def _byte_resize(rgb: Tensor) -> Tensor:
    return _resize(rgb).float()


def _normalize(levels: Tensor) -> Tensor:
    shift, scale = (255 * torch.tensor(x, device=levels.device)[:, None, None] for x in (MEAN, STD))
    frames = (levels - shift) / scale
    H, W = SIZE
    blocks = frames.view(FRAMES // 2, 2, 3, H // FACTOR, 2, PATCH, W // FACTOR, 2, PATCH)
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, PATCH_COLUMNS).bfloat16()


_compiled = Contender(
    "torch.compile of the chain's end", lambda inputs: _chain(_float_resize)(inputs, torch.compile(_normalize))
)
_in_bytes = Contender(
    "torch chain, 8-bit resize", _chain(_byte_resize), does="as torchvision resizes bytes: rounds between its passes"
)


def test_frames_to_patches(run_case):
    run_case()
