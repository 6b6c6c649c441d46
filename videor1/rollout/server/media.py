"""Media as a server with OpenAI's API takes them: 8-bit patches converted back to frames and sent without loss.

A server that follows the fields of :func:`media_fields` computes exactly the patches that the trainer trains on.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from videor1.types import Media
from videor1.video.shuffle import shuffled_patches
from videor1_kernels.frames_to_patches import PATCH

_TOKENS_PER_SECOND = 2  # tokens_per_second of every Qwen2.5-VL's vision config


def media_frames(media: Media, permutation: tuple[int, ...] | None = None, unit: str = "frame") -> Tensor:
    """Return the frames from which ``media.patches`` were cut: uint8 RGB [2T, height, width, 3]; of an image [1, ...].

    Args:
        permutation: applied first, to the frames or temporal patches; None: in order.
        unit: what ``permutation`` is of, "frame" or "temporal_patch".
    """
    T, h, w = media.grid_thw
    patches = media.patches if permutation is None else shuffled_patches(media, permutation, unit)
    blocks = patches.view(T, h // 2, w // 2, 2, 2, 3, 2, PATCH, PATCH)  # t hb wb hm wm c tp py px
    frames = blocks.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(2 * T, h * PATCH, w * PATCH, 3)
    return frames[:1] if media.kind == "image" else frames


def media_part(media: Media, permutation: tuple[int, ...] | None = None, unit: str = "frame") -> dict[str, Any]:
    """Return the content part of a chat message: an image as PNG, or a video as a list of frames, each a PNG.

    vLLM names such a list ``video/jpeg`` whatever the frames' format: each is opened with Pillow, so PNG passes and
    nothing is lost (``VideoMediaIO.load_base64`` in vllm/multimodal/media/video.py).
    """
    pictures = [_png(frame) for frame in media_frames(media, permutation, unit)]
    if media.kind == "image":
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pictures[0]}"}}
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(pictures)}"}}


def media_fields(media: Media | None) -> dict[str, Any]:
    """Return the request fields by which vLLM leaves the frames unchanged and gives them the trainer's positions.

    It then neither resamples nor resizes, and spaces a video's positions in time as
    :func:`videor1.model.positions.prompt_positions` does: its seconds per temporal patch are 2 / fps.
    """
    if media is None:
        return {}
    fields: dict[str, Any] = {"mm_processor_kwargs": {"do_resize": False}}
    if media.kind == "video":
        fields["mm_processor_kwargs"]["do_sample_frames"] = False
        seconds = _sixteen_bit_seconds(media.second_per_grid, media.grid_thw[0])
        fields["media_io_kwargs"] = {"video": {"num_frames": -1, "fps": 2 / seconds}}
    return fields


def _sixteen_bit_seconds(seconds: float, T: int) -> float:
    """Return a bfloat16 number close to ``seconds`` that puts the T temporal patches at the same integer positions.

    vLLM rounds the seconds per temporal patch to the model's dtype: 7/12 s becomes 0.582 s, and patch 6 is then at
    position 6 instead of 7. Where none of the three closest numbers keeps all positions (only beyond T = 8 or 4 s), the
    closest one is returned, and positions are off by about 1.
    """

    def times(x: Tensor) -> list[int]:
        return (torch.arange(T) * (_TOKENS_PER_SECOND * x.float())).long().tolist()

    closest = torch.tensor(seconds, dtype=torch.bfloat16)
    candidates = [closest, *(torch.nextafter(closest, torch.tensor(side).bfloat16()) for side in (torch.inf, 0.0))]
    exact = times(torch.tensor(seconds))
    return float(next((x for x in candidates if times(x) == exact), closest))


def _png(frame: Tensor) -> str:
    """Return a uint8 frame [height, width, 3] as a PNG file in base64."""
    file = io.BytesIO()
    Image.fromarray(frame.numpy()).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")
