"""Create the demo's files on disk: media, data files in the Video-R1 JSON format, and the folder of the tiny model.

They are created once for each seed, sizes and version of this package, either completely or not at all, and are then
used again.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from videor1.demo.clips import PALETTES, write_image, write_video
from videor1.demo.model import save_model
from videor1.demo.questions import draw_questions, entry, guessing_reward
from videor1.demo.tokenizer import make_tokenizer
from videor1.errors import ConfigError
from videor1.seeding import derive_seed

RECORD = "demo.json"
SPLITS = ("sft", "train", "dev", "test")


@dataclass(frozen=True)
class Sizes:
    """Numbers of samples to create. Each sample has a clip or an image of its own."""

    sft_videos: int = 500
    sft_images: int = 50
    train_videos: int = 1200
    train_images: int = 120
    dev_videos: int = 96
    dev_images: int = 0
    test_videos: int = 128
    test_images: int = 16


@dataclass(frozen=True)
class Assets:
    """The paths of the demo's files, and the accuracy of guessing."""

    folder: Path
    model: Path  # the model's folder in the format of Hugging Face
    sft: Path  # this and the next three are data files, whose media paths are relative to their folder
    train: Path
    dev: Path
    test: Path
    chance: float  # expected accuracy reward of guessing on the video questions of ``test``


def make_assets(
    folder: Path, *, seed: int = 0, sizes: Sizes = Sizes(), progress: bool = True, family: str = "qwen2_5_vl"
) -> Assets:
    """Create the demo's files in ``folder``, or use the files there if an equal call created them.

    Everything is written into a temporary folder beside ``folder``, which takes its place when it is complete.

    Args:
        folder: the folder to create. It is replaced if it holds the files of another demo.
        seed: determines the orders, questions and pixels of each split, and the model's weights.
        sizes: numbers of samples, with at least one video in each split.
        progress: whether to show a progress bar if the work takes longer than two seconds.
        family: the model's, a key of :data:`videor1.demo.model.DEMO_MODELS`.

    Raises:
        ConfigError: ``folder`` holds files that no demo has created.
        ValueError: a number in ``sizes`` is too small.
    """
    folder = Path(folder)
    _check_sizes(sizes)
    recipe = {"seed": seed, "sizes": asdict(sizes), "family": family, "made_by": _source_digest()}
    record = _read_record(folder)
    if record is None or not _is_complete(folder, record, recipe):
        record = _make(folder, recipe, seed, sizes, progress, family)
    files = {split: folder / f"{split}.json" for split in SPLITS}
    return Assets(folder=folder, model=folder / "model", **files, chance=record["chance"])


def _make(folder: Path, recipe: dict[str, Any], seed: int, sizes: Sizes, progress: bool, family: str) -> dict[str, Any]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary, "new")
        (new / "clips").mkdir(parents=True)
        with tqdm(total=sum(asdict(sizes).values()), desc="making clips", delay=2, disable=not progress) as bar:
            entries = {split: _make_split(new, split, seed, sizes, bar) for split in SPLITS}
        save_model(new / "model", make_tokenizer(family), derive_seed(seed, "demo", "model"), family)
        files = {str(path.relative_to(new)): path.stat().st_size for path in sorted(new.rglob("*")) if path.is_file()}
        videos = [e for e in entries["test"] if e["data_type"] == "video"]
        record = recipe | {"chance": guessing_reward(videos), "files": files}
        _write_json(new / RECORD, record)
        if folder.exists():
            folder.rename(Path(temporary, "old"))
        new.rename(folder)
    return record


def _make_split(folder: Path, split: str, seed: int, sizes: Sizes, bar: tqdm) -> list[dict[str, Any]]:
    rng = Random(derive_seed(seed, "demo", split))
    count, stills = getattr(sizes, f"{split}_videos"), getattr(sizes, f"{split}_images")
    questions = draw_questions(count, rng) + draw_questions(stills, rng, still=True)
    entries = []
    for number, question in enumerate(questions):
        palette = PALETTES[question.topic]
        if question.kind == "still":
            order: tuple[str, ...] = (rng.choice(palette),)
            name = f"{split}-{number:04d}.png"
            write_image(folder / "clips" / name, question.topic, order[0], rng)
        else:
            order = tuple(rng.sample(palette, len(palette)))
            name = f"{split}-{number:04d}.mp4"
            write_video(folder / "clips" / name, question.topic, order, rng)
        entries.append(entry(question, order, f"./clips/{name}", number))
        bar.update()
    _write_json(folder / f"{split}.json", entries)
    return entries


def _check_sizes(sizes: Sizes) -> None:
    for name, value in asdict(sizes).items():
        least = 1 if name.endswith("videos") else 0
        if value < least:
            raise ValueError(f"sizes.{name}: expected at least {least}, got {value}")


def _read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record that an earlier call wrote into the folder; None if the folder is missing or empty.

    Raises:
        ConfigError: the folder is not empty and holds no usable record.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if not isinstance(record["files"], dict):
            raise TypeError("its list of files is no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder}: expected a folder that the demo has made, or none; it has no usable {RECORD} ({error!r}). "
            "Name another folder, or delete it"
        ) from error
    return record


def _is_complete(folder: Path, record: dict[str, Any], recipe: dict[str, Any]) -> bool:
    """Return whether the folder was created by the same recipe and all of its files are there in their full size."""
    if any(record.get(name) != value for name, value in recipe.items()):
        return False
    return all(_size(folder / name) == size for name, size in record["files"].items())


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _source_digest() -> str:
    """Return a hash of the code that creates the files, so that files of other code are created again."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources() -> Iterator[Path]:
    here = Path(__file__).parent
    yield from (here / f"{name}.py" for name in ("assets", "clips", "model", "questions", "tokenizer"))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
