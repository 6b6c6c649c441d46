"""What all tests share: one thread, the demo's files in a tiny size, and what the tests of several files start from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads this when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from coded_videos import MADE
from evaluations import Oracle, install_oracle, write_benchmarks
from patience import THREADS

import videor1.data
import videor1.data.shards
import videor1.data.stream
from videor1.demo.assets import Assets, Sizes, make_assets

torch.set_num_threads(THREADS)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every fuzz test for minutes, not for seconds")


@pytest.fixture(scope="session")
def fuzz_seconds(request: pytest.FixtureRequest) -> float:
    """How long a fuzz test looks for an input that breaks what it tests."""
    return 600.0 if request.config.getoption("--full", default=False) else 12.0


SIZES = Sizes(4, 2, train_videos=3, train_images=1, dev_videos=2, dev_images=1, test_videos=1, test_images=0)


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """Clips, data files and the tiny model; read only."""
    return make_assets(tmp_path_factory.mktemp("demo") / "assets", sizes=SIZES, progress=False)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Videos by their name in ``coded_videos.MADE``, each made once; read only."""
    files: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in files:
            files[name] = MADE[name].write(tmp_path_factory.mktemp("made"))
        return files[name]

    return make


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All six benchmarks, made small; read only."""
    return write_benchmarks(tmp_path_factory)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> type[Oracle]:
    """Answers in place of an evaluation's sampler."""
    return install_oracle(monkeypatch)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams in blocks of about five rows, and in windows of four blocks."""
    monkeypatch.setattr(videor1.data.shards, "BLOCK_BYTES", 640)
    monkeypatch.setattr(videor1.data.stream, "MAX_WINDOW_BLOCKS", 4)
