"""Records that flow through the trainer, one way: Sample -> Clip -> Media -> Prompt -> Group.

Letters: F frames, T temporal patches (2 frames each), h x w the patch grid (14 pixels a patch),
P prompt tokens, C completion tokens. Stages import these records, not each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from videor1_kernels.frames_to_patches import YuvFrames

DataType = Literal["video", "image", "text"]
ProblemType = Literal["multiple choice", "numerical", "OCR", "free-form", "regression"]


class SampleError(Exception):
    """A sample that cannot be used: counted, logged with its path, skipped; never replaced by another's media.

    ``kind`` is a short stable name that the metrics count by (``missing_file``, ``decode``, ``timeout``, ...).
    """

    def __init__(self, kind: str, message: str, path: str | Path | None = None) -> None:
        super().__init__(kind, message, None if path is None else str(path))  # picklable: it crosses processes
        self.kind = kind
        self.message = message
        self.path = None if path is None else str(path)

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{where}{self.message} [{self.kind}]"


@dataclass(frozen=True)
class Sample:
    """One line of a data file in the Video-R1 JSON format, checked."""

    index: int  # position in the data file
    problem_id: str
    problem: str
    data_type: DataType
    problem_type: ProblemType
    solution: str  # "<answer>...</answer>"
    path: Path | None = None  # absolute, under data.root; None for text
    options: tuple[str, ...] = ()  # multiple choice: "A. red", ...
    data_source: str = ""
    process: str = ""  # SFT data: "<think>...</think>"
    start: float | None = None  # seconds from the video's beginning: only frames from here on are seen ...
    end: float | None = None  # ... and up to here; None: no bound
    frames_per_second: float | None = None  # the path is a folder of images, taken at this rate; None: a file


@dataclass(frozen=True)
class Clip:
    """Decoded frames of one video (or one image), at the source's resolution."""

    frames: Tensor | YuvFrames  # uint8 RGB [F, height, width, 3], upright; or planes as the decoder left them
    size: tuple[int, int]  # target (height, width) in pixels, multiples of 28, that the vision tower will see
    fps: float  # sampled frames per second, F / duration; 0 for an image
    timestamps: tuple[float, ...]  # seconds, presentation time of each frame
    total_frames: int  # frames in the file
    source_fps: float
    path: str
    backend: str  # the decoder that ran
    rotation: int = 0  # degrees anticlockwise that bring the frames upright (``size`` is upright): 0, 90, 180 or 270


@dataclass(frozen=True)
class Media:
    """What a decode worker hands over and a cache keeps: 8-bit patches, ordered."""

    kind: Literal["video", "image"]
    patches: Tensor  # uint8 [T * h * w, 1176], Qwen2.5-VL's patch order, before normalisation
    grid_thw: tuple[int, int, int]  # (T, h, w) in patches of 14 pixels
    second_per_grid: float  # seconds a temporal patch spans: 2 / sampled fps; 0 for an image
    seconds: float  # time the decode and resize took
    backend: str = ""  # the decoder that ran; "" from a cache on disk


@dataclass(frozen=True)
class Prompt:
    """One question, tokenised, with its media. The media tokens are already expanded in input_ids."""

    sample: Sample
    input_ids: Tensor  # int64 [P]
    media: Media | None
    draw: int  # position in the (endless) stream of samples: seeds the permutation and the sampling


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    token_ids: Tensor  # int64 [C], EOS included if it was reached
    logp: Tensor  # fp32 [C], nats: log-prob of each sampled token under the untruncated distribution at rollout
    finished: bool  # ended with EOS (False: cut at max_completion_length)
    text: str  # decoded without special tokens


@dataclass(frozen=True)
class Group:
    """A prompt with its answers: from frames in order, and from shuffled frames where the prompt is a video."""

    prompt: Prompt
    ordered: tuple[Completion, ...]
    shuffled: tuple[Completion, ...] = ()  # those that were run to their end
    permutation: tuple[int, ...] | None = None  # over frames or temporal patches, as temporal.shuffle_unit says
    shuffled_asked: int = 0  # more than there are: the rest was skipped, since it could not change the advantages
    accuracies: Mapping[str, float] = field(default_factory=dict)  # by an answer's text: those that a judge worked out
