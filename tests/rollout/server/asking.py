"""What the tests of the server engine ask, and with which engine."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fake_server import SPECIAL, TOKENIZER, Body, FakeServer, received_media
from patience import PATIENCE
from tiny import make_media, make_prompt

from videor1.rollout import SamplingOptions
from videor1.rollout.protocol import Branch, Request
from videor1.rollout.server.engine import ServerEngine
from videor1.rollout.server.media import media_frames
from videor1.types import Clip, Completion, Prompt
from videor1.video.patches import media_from_clip

VIDEO = make_prompt(make_media("video", (3, 4, 6), seconds=1.5, seed=1), draw=1)
PIXELS = torch.randint(0, 256, (1, 56, 84, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
PICTURE = media_from_clip(Clip(PIXELS, (56, 84), 0.0, (0.0,), 1, 0.0, "image.png", "test"), "image")
IMAGE = make_prompt(PICTURE, "What is this?", draw=2)
TEXT = make_prompt(None, "Two and two?", draw=3)
ORDER = (5, 0, 3, 1, 4, 2)


def make_engine(server: FakeServer, tmp_path: Path | None = None, **changes: Any) -> ServerEngine:
    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")

    settings: dict[str, Any] = {
        "url": server.url,
        "tokenizer": TOKENIZER,
        "special": SPECIAL,
        "options": SamplingOptions(64),
        "timeout": PATIENCE,
        "retries": 2,
        "save_weights": save,
        "sync_dir": tmp_path or Path("unused"),
        "sync": "vllm" if tmp_path else "none",
    }
    return ServerEngine(**settings | changes)


def request(prompt: Prompt, ordered: int = 3, shuffled: int = 0, judge: Any = None, seed: int = 7) -> Request:
    branch = Branch(shuffled, ("shuffled", prompt.draw), permutation=ORDER) if shuffled else None
    return Request(prompt, seed, Branch(ordered, ("ordered", prompt.draw)), branch, judge)


def ask_once(server: FakeServer, prompt: Prompt = TEXT, **changes: Any) -> Completion:
    """The one answer of a new engine to a prompt."""
    (answer,) = make_engine(server, **changes).generate([request(prompt, 1)]).groups[0].ordered
    return answer


def is_shuffled(body: Body) -> bool:
    """Whether the frames of VIDEO came in another order."""
    media = received_media(body)
    return media is not None and not torch.equal(media[1], media_frames(VIDEO.media))


def has_media(body: Body) -> bool:
    return received_media(body) is not None


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()
