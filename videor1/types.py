"""Records that are passed through the trainer in one direction: Sample -> Clip -> Media -> Prompt -> Group.

Dimension letters: F frames, T temporal patches (2 frames each), h x w the grid of patches (of 14 or 16 pixels),
P prompt tokens, C completion tokens. The stages of the trainer import these records, not each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from videor1_kernels.frames_to_patches import YuvFrames

DataType = Literal["video", "image", "text"]
ProblemType = Literal[
    "multiple choice",
    "numerical",
    "OCR",
    "free-form",
    "regression",
    "temporal grounding",
    "spatial grounding",
    "spatial-temporal grounding",
    "tracking",
    "boolean",
    "math",
    "open-ended",
]


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
class MediaItem:
    """A video or an image of a sample, as the data name it."""

    kind: Literal["video", "image"]
    path: Path | None = None  # absolute path of the file, or of a folder of images; None where frames are listed
    root: Path | None = field(default=None, repr=False)  # as Sample.root
    frames: tuple[Path, ...] = ()  # absolute paths of images that are a video's frames, in their order
    # Seconds of each image, listed or of a folder (by the numbers in their names), from the video's beginning.
    timestamps: tuple[float, ...] = ()
    frames_per_second: float | None = None  # constant rate of such images, in place of timestamps
    start: float | None = None  # seconds from the video's beginning: earlier frames are not used; None: no bound
    end: float | None = None  # seconds from the video's beginning: later frames are not used; None: no bound
    fps: float | None = None  # frames per second to sample; None: as the run samples
    max_frames: int | None = None  # most frames to sample; None: as the run has it
    max_pixels: int | None = None  # most pixels of a frame or of the image; None: as the run has it

    @property
    def named(self) -> Path | None:
        """The path that errors name: of the file or folder, or of the first listed frame."""
        return self.path if self.path is not None or not self.frames else self.frames[0]


@dataclass(frozen=True)
class Message:
    """A turn of the conversation that a prompt consists of."""

    role: Literal["user", "assistant"]
    content: str  # may hold the placeholders <video> and <image>


@dataclass(frozen=True)
class OfflineAnswer:
    """An answer that the data bring for a slot of the group: a stronger model's, or a person's."""

    text: str  # the whole answer, tags included
    source: str = ""  # who wrote it


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
    # The fields from here on are not in the repr, for the same reason as root.
    # Where the data list media: all of them, in the order of their placeholders. ``data_type`` is then video if one of
    # them is, and ``path`` is the first one's. Empty: the medium of ``data_type`` and ``path``, if any.
    media: tuple[MediaItem, ...] = field(default=(), repr=False)
    messages: tuple[Message, ...] = field(default=(), repr=False)  # the conversation, in place of problem alone
    system: str | None = field(default=None, repr=False)  # system prompt; None: the run's, or the chat template's own
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)  # beside the run's
    completions: tuple[OfflineAnswer, ...] = field(default=(), repr=False)
    # Whether the question ends with options and the instruction to think and answer in tags. False: a conversation that
    # SFT learns as it stands; it ends with the assistant, and its problem_type means nothing.
    instructed: bool = field(default=True, repr=False)

    @property
    def items(self) -> tuple[MediaItem, ...]:
        """The media of the sample, in order, whichever way the data name them."""
        if self.media or self.data_type == "text":
            return self.media
        where = {"path": self.path, "root": self.root, "start": self.start, "end": self.end}
        return (MediaItem(self.data_type, **where, frames_per_second=self.frames_per_second),)  # type: ignore[arg-type]


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
    # Time of each frame in seconds where the data give it; none: its number divided by ``source_fps``.
    given_times: tuple[float, ...] = ()
    decoded_bytes: int = 0  # memory that decoding was estimated to take, see video/limits.py


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
    decoded_bytes: int = 0  # memory that decoding was estimated to take; 0 where it is not known


# The media of a prompt: none, one, or several in the order in which they stand in it.
PromptMedia = Media | tuple[Media, ...] | None
Order = tuple[int, ...]  # a permutation of a clip's frames or of its temporal patches
# The shuffled orders of a prompt's media: of its one clip; of several media one each, None for an image.
Orders = Order | tuple[Order | None, ...]


def listed(media: PromptMedia) -> tuple[Media, ...]:
    """Return the media of a prompt as a tuple, however many there are."""
    if media is None:
        return ()
    return media if isinstance(media, tuple) else (media,)


@dataclass(frozen=True)
class Prompt:
    """One tokenised question with its media. The media tokens are already expanded in ``input_ids``."""

    sample: Sample
    input_ids: Tensor  # int64 [P]
    media: PromptMedia
    draw: int  # position in the endless stream of samples, from which permutation and sampling are seeded
    offline: tuple[Completion, ...] = ()  # answers that the data bring, which take slots of the group
    offline_left_out: int = 0  # answers of the data for which there is no slot, or that are too long

    @property
    def all_media(self) -> tuple[Media, ...]:
        """Its media in order, however many there are."""
        return listed(self.media)

    def orders(self, given: Orders | None) -> tuple[Order | None, ...]:
        """Return the order of each of its media; None: as it is."""
        if given is None:
            return (None,) * len(self.all_media)
        return given if isinstance(self.media, tuple) else (given,)  # type: ignore[return-value]


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt, sampled or from the data."""

    token_ids: Tensor  # int64 [C], EOS included if it was reached
    # fp32 [C], nats: log-prob of each sampled token under the untruncated distribution at rollout; NaN: not known
    logp: Tensor
    finished: bool  # whether it ended with EOS; False: it was cut at max_completion_length
    text: str  # the tokens decoded without special tokens
    source: str | None = None  # None: the policy sampled it; else who wrote it, as the data say ("" if they do not)


@dataclass(frozen=True)
class Group:
    """A prompt with its completions from frames in order and, where it is a video, from shuffled frames."""

    prompt: Prompt
    ordered: tuple[Completion, ...]  # the sampled ones, then those of the data
    shuffled: tuple[Completion, ...] = ()  # only those that were sampled to their end
    permutation: Orders | None = None  # of frames or of temporal patches, as temporal.shuffle_unit says
    # Number of shuffled completions requested. Where it exceeds len(shuffled), the rest was skipped because it could
    # not change the advantages.
    shuffled_asked: int = 0
    # The accuracies that the rollout's judge worked out, by the completion's text: it is not scored again.
    accuracies: Mapping[str, float] = field(default_factory=dict)
    # What async reward functions gave, by the function's name: one number for each ordered completion.
    rewards: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
