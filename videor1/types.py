"""Records that are passed through the trainer in one direction: Sample -> Clip -> Media -> Prompt -> Group.

Dimension letters: F frames, T temporal patches (2 frames each), h x w the grid of patches (of 14 or 16 pixels),
P prompt tokens, C completion tokens. The stages of the trainer import these records, not each other.
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
    """Raised for a sample that cannot be used.

    Such a sample is counted, logged with its path and skipped; it is never replaced by another sample's media.
    ``kind`` is a short stable name that the metrics count by (``missing_file``, ``decode``, ``timeout``, ...).
    """

    def __init__(self, kind: str, message: str, path: str | Path | None = None) -> None:
        # All arguments are plain strings, so that the error can be pickled and sent between processes.
        super().__init__(kind, message, None if path is None else str(path))
        self.kind = kind
        self.message = message
        self.path = None if path is None else str(path)

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{where}{self.message} [{self.kind}]"


@dataclass(frozen=True)
class Sample:
    """One checked entry of a data file in the Video-R1 JSON format."""

    index: int  # position in the data file
    problem_id: str
    problem: str
    data_type: DataType
    problem_type: ProblemType
    solution: str  # "<answer>...</answer>"
    path: Path | None = None  # absolute path of the media file, under data.root; None for text
    # Folder that the media file must lie in when it is opened; None: anywhere. It is not in the repr, by which early
    # versions identified the questions of an evaluation.
    root: Path | None = field(default=None, repr=False)
    options: tuple[str, ...] = ()  # multiple choice: "A. red", ...
    data_source: str = ""
    process: str = ""  # SFT data: "<think>...</think>"
    start: float | None = None  # seconds from the video's beginning: earlier frames are not used; None: no bound
    end: float | None = None  # seconds from the video's beginning: later frames are not used; None: no bound
    frames_per_second: float | None = None  # rate of the images where path is a folder of them; None: path is a file


@dataclass(frozen=True)
class Clip:
    """Decoded frames of one video (or one image), at the source's resolution."""

    frames: Tensor | YuvFrames  # uint8 RGB [F, height, width, 3], upright; or YUV planes as the decoder gave them
    size: tuple[int, int]  # target (height, width) in pixels, multiples of two patches, that the vision tower sees
    fps: float  # sampled frames per second, F / duration; 0 for an image
    timestamps: tuple[float, ...]  # presentation time of each frame in seconds
    total_frames: int  # frames in the file
    source_fps: float  # frames per second of the file; 0 for an image
    path: str
    backend: str  # name of the decoder that was used
    # What brings the frames upright (``size`` is upright): they are mirrored left to right, then turned anticlockwise.
    rotation: int = 0  # degrees: 0, 90, 180 or 270
    mirrored: bool = False
    numbers: tuple[int, ...] = ()  # of the frames in the file, from 0; (0,) or none for an image


@dataclass(frozen=True)
class Media:
    """8-bit patches of a sample's frames in their true order, as decode workers return and caches store them."""

    kind: Literal["video", "image"]
    patches: Tensor  # uint8 [T * h * w, 6 * patch_size^2], in the order of frames_to_patches, before normalisation
    grid_thw: tuple[int, int, int]  # (T, h, w) in patches
    second_per_grid: float  # seconds that a temporal patch spans: 2 / sampled fps; 0 for an image
    seconds: float  # time in seconds that decoding and resizing took
    backend: str = ""  # name of the decoder that was used; "" for media from a cache on disk
    # Seconds from the file's beginning of each temporal patch, T of them: the mean of its two frames' numbers / fps.
    times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """One tokenised question with its media. The media tokens are already expanded in ``input_ids``."""

    sample: Sample
    input_ids: Tensor  # int64 [P]
    media: Media | None
    draw: int  # position in the endless stream of samples, from which permutation and sampling are seeded


@dataclass(frozen=True)
class Completion:
    """One sampled completion of a prompt."""

    token_ids: Tensor  # int64 [C], EOS included if it was reached
    logp: Tensor  # fp32 [C], nats: log-prob of each sampled token under the untruncated distribution at rollout
    finished: bool  # whether it ended with EOS; False: it was cut at max_completion_length
    text: str  # the tokens decoded without special tokens


@dataclass(frozen=True)
class Group:
    """A prompt with its completions from frames in order and, where it is a video, from shuffled frames."""

    prompt: Prompt
    ordered: tuple[Completion, ...]
    shuffled: tuple[Completion, ...] = ()  # only those that were sampled to their end
    permutation: tuple[int, ...] | None = None  # of frames or of temporal patches, as temporal.shuffle_unit says
    # Number of shuffled completions requested. Where it exceeds len(shuffled), the rest was skipped because it could
    # not change the advantages.
    shuffled_asked: int = 0
    # The accuracies that the rollout's judge worked out, by the completion's text: it is not scored again.
    accuracies: Mapping[str, float] = field(default_factory=dict)
    # What async reward functions gave, by the function's name: one number for each ordered completion.
    rewards: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
