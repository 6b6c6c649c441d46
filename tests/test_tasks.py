"""The pages of docs/tasks/: each shows the rows of its file, and its command trains on them for two steps."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import media
import numpy as np
import pages
import pytest
import torch
from judging import answer_of, asked, judge_server, tagged
from PIL import Image
from runs import metrics, run_lines, same_weights, train_flags, weights

from videor1.config import TrainConfig
from videor1.config.cli import parse
from videor1.data import load_samples
from videor1.demo.assets import Assets
from videor1.rewards import malformed_reason, score
from videor1.rewards.slow import SlowRewards
from videor1.training.tgrpo import Trainer
from videor1.types import Completion, ProblemType, Sample

FOLDER = pages.ROOT / "docs" / "tasks"
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.stem != "index")
SECONDS = 24  # of the clips that are made: the pages' rows name no later time
every_task = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def rows_of(page: Path) -> Path:
    return FOLDER / "data" / f"{page.stem}.json"


def command(page: Path) -> list[str]:
    """The options of the page's one command."""
    (words,) = pages.shell_commands(page.read_text(encoding="utf-8"))
    assert words[:3] == ["python", "-m", "videor1.train"]
    return words[3:]


def named_files(entry: dict[str, Any]) -> Iterator[str]:
    """Every file that a row names."""
    for item in entry.get("media") or [entry]:
        yield from [item["path"]] if "path" in item else item.get("frames", [])


def has_a_clip(entry: dict[str, Any]) -> bool:
    """Whether a row holds frames that can be shuffled."""
    return any(item.get("kind") == "video" or "frames" in item for item in entry.get("media", [])) or (
        entry.get("data_type") == "video"
    )


def copy_with_media(page: Path, folder: Path) -> Path:
    """A copy of a page's rows, beside a made clip or picture for every path in it."""
    copied = Path(shutil.copy(rows_of(page), folder))
    for number, name in enumerate(sorted({n for entry in json.loads(copied.read_text()) for n in named_files(entry)})):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".mp4":
            media.write_video(path, media.numbered_frames(2 * SECONDS), rate=2)
        else:
            Image.fromarray(np.full((48, 64, 3), 20 * number, np.uint8)).save(path)
    return copied


def configure(page: Path, assets: Assets, folder: Path, **options: Any) -> TrainConfig:
    """The page's command on the tiny model, in tiny sizes; ``reward.functions`` lets all of it be trained."""
    tiny = train_flags(assets, folder / "run", dataset_name=copy_with_media(page, folder), max_steps=2, **options)
    tiny += ["--per_device_train_batch_size=3", "--temporal.skip_shuffled=false"]
    return parse(TrainConfig, command(page) + tiny, prog="train", description="")


@contextlib.contextmanager
def judge_of(page: Path) -> Iterator[dict[str, Any]]:
    """Options by which a page's judge is a server of this test: 1 for the solution's text, else 0."""
    if "reward.judge.url" not in page.read_text(encoding="utf-8"):
        yield {}
        return
    with judge_server(lambda body: float(f"Reference answer:\n{answer_of(body)}\n\n" in asked(body))) as server:
        yield {"reward__judge__url": server.url, "reward__judge__retries": 0}


def accuracy(sample: Sample, config: TrainConfig, folder: Path) -> float:
    """What a completion that is the sample's solution earns, from the judge where it is asked."""
    with SlowRewards(config.reward, folder / "judge_cache") as slow:
        if slow.judges(sample):
            scores = slow.group(sample)
            assert scores
            asked = scores.start(Completion(torch.arange(4), torch.zeros(4), True, sample.solution), ordered=True)
            assert asked
            return asked.result()
    return score([sample.solution], [sample], config.reward)[0][0]


@every_task
def test_a_page_shows_the_rows_of_its_file(page: Path) -> None:
    text, file = page.read_text(encoding="utf-8"), rows_of(page)
    assert pages.blocks(text, "json") == [file.read_text(encoding="utf-8")]
    assert len(json.loads(file.read_text())) == 3
    words = command(page)
    assert words[words.index("--dataset_name") + 1] == file.name
    assert "](../rewards.md)" in text


def test_every_page_and_every_type_is_found() -> None:
    assert {file.stem for file in (FOLDER / "data").iterdir()} == {page.stem for page in PAGES}
    index = (FOLDER / "index.md").read_text(encoding="utf-8")
    assert {f"{page.stem}.md" for page in PAGES} <= set(pages.links(index))
    listed = re.findall(r"tasks/([\w-]+)\.md$", (pages.ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(["index", *(page.stem for page in PAGES)])
    types = {entry["problem_type"] for page in PAGES for entry in json.loads(rows_of(page).read_text())}
    assert types == set(get_args(ProblemType))
    assert set(get_args(ProblemType)) <= set(pages.spans(index))


@every_task
def test_a_page_trains_for_two_steps(page: Path, assets: Assets, tmp_path: Path) -> None:
    with judge_of(page) as judge:
        end = tagged(Trainer(configure(page, assets, tmp_path, **judge))).train()
    folder = tmp_path / "run"
    steps = [row for row in metrics(folder) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert not (folder / "skipped.jsonl").exists() or not run_lines(folder, "skipped.jsonl")
    assert not [name for row in steps for name, value in row.items() if name.startswith("data/skipped") and value]
    assert not any(row.get("rewards/failed") for row in steps)
    lines = run_lines(folder, "rollouts.jsonl")
    assert sorted(line["problem_id"] for line in lines) == ["0", "0", "1", "1", "2", "2"]
    clips = {str(i) for i, entry in enumerate(json.loads(rows_of(page).read_text())) if has_a_clip(entry)}
    assert {line["problem_id"] for line in lines if line["permutation"]} == clips
    assert not same_weights(weights(end), weights(assets.model))


@every_task
def test_a_page_s_solutions_earn_everything(page: Path, assets: Assets, tmp_path: Path) -> None:
    with judge_of(page) as judge:
        config = configure(page, assets, tmp_path, reward__functions="", **judge)
        data = load_samples(config.dataset_name or "", reward=config.reward)
        assert data.errors == []
        for sample in data.samples:
            assert malformed_reason(sample.solution, sample.solution, sample.problem_type) == ""
            assert accuracy(sample, config, tmp_path) == 1, sample.problem
