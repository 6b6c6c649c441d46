"""Media as a server with OpenAI's API takes them: 8-bit patches converted back to frames and sent without loss.

A server that follows the fields of :func:`media_fields` computes exactly the patches that the trainer trains on.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Any

from PIL import Image
from torch import Tensor

from videor1.model.families import QWEN2_5_VL, Family
from videor1.remote.client import RequestFailed
from videor1.types import Media, PromptMedia, listed
from videor1.video.shuffle import shuffled_patches


def media_frames(media: Media, permutation: tuple[int, ...] | None = None, unit: str = "frame") -> Tensor:
    """Return the frames from which ``media.patches`` were cut: uint8 RGB [2T, height, width, 3]; of an image [1, ...].

    Args:
        permutation: applied first, to the frames or temporal patches; None: in order.
        unit: what ``permutation`` is of, "frame" or "temporal_patch".
    """
    T, h, w = media.grid_thw
    side = math.isqrt(media.patches.shape[1] // 6)  # of a patch of two frames in three colors
    patches = media.patches if permutation is None else shuffled_patches(media, permutation, unit)
    blocks = patches.view(T, h // 2, w // 2, 2, 2, 3, 2, side, side)  # t hb wb hm wm c tp py px
    frames = blocks.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(2 * T, h * side, w * side, 3)
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


def media_fields(media: PromptMedia, family: Family = QWEN2_5_VL) -> dict[str, Any]:
    """Return the request fields by which vLLM leaves the frames unchanged and puts them at the trainer's times.

    It then neither resamples nor resizes. What says the times of a video, its family knows.

    Raises:
        RequestFailed: the videos of a prompt are at different times: vLLM takes one set of fields for all of a request.
    """
    if media is None:
        return {}
    fields: dict[str, Any] = {"mm_processor_kwargs": {"do_resize": False}}
    videos = [one for one in listed(media) if one.kind == "video"]
    if videos:
        assert family.server_video is not None, family.name
        told, *others = map(family.server_video, videos)
        if any(other != told for other in others):
            raise RequestFailed(
                f"the {len(videos)} videos of this prompt have frames at different times, and a server is told the "
                "times of one video, for all videos of a request: rollout.engine local takes such prompts"
            )
        fields["mm_processor_kwargs"]["do_sample_frames"] = False
        fields["media_io_kwargs"] = {"video": {"num_frames": -1, **told}}
    return fields


def _png(frame: Tensor) -> str:
    """Return a uint8 frame [height, width, 3] as a PNG file in base64."""
    file = io.BytesIO()
    Image.fromarray(frame.numpy()).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")
