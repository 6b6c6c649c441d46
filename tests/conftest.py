"""``pytest`` runs all but what is marked ``full``, with every two values of two options; ``pytest --full`` runs it all.

    pytest -m "not slow"      without what takes more than ten seconds
    pytest --full             every combination of options, long runs, and fuzz tests for minutes
    pytest -m gpu             what needs a GPU (skipped where there is none)
    pytest -m "not browser"   without a browser

What all tests share lies here: one thread, the demo's files in a tiny size, and what the tests of several files start
from.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grids
import pytest
import torch

if "HOME" not in os.environ:  # as in a job of a scheduler: then the libraries of csrc/ are kept for this run alone
    os.environ["HOME"] = tempfile.mkdtemp(prefix="videor1-home-")
    atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
if not torch.cuda.is_available():  # Triton reads this when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from patience import THREADS

if TYPE_CHECKING:
    from evaluations import Oracle

    from videor1.demo.assets import Assets

torch.set_num_threads(THREADS)

# Fixtures import what they need: the tests of a kernel neither read videos nor load a model.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run everything: see the first lines of tests/conftest.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    grids.parametrize(metafunc, full=metafunc.config.getoption("--full"))


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # of xdist, which would run files of many tests first
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``full``, unless it is named, and what does not fit; slow files go first, for a short
    end."""
    items[:] = [item for item in items if all(mark.args[0](**_chosen(item)) for mark in item.iter_markers("fits"))]
    if not config.getoption("--full") and not any("::" in argument for argument in config.args):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What collection has made stays to the end: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


def _chosen(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def fuzz_times(request: pytest.FixtureRequest) -> int:
    """How many times as many examples as by default a fuzz test tries."""
    return 200 if request.config.getoption("--full") else 1


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """Clips, data files and the tiny model; read only."""
    from videor1.demo.assets import Sizes, make_assets

    sizes = Sizes(4, 2, train_videos=3, train_images=1, dev_videos=2, dev_images=1, test_videos=1, test_images=0)
    return make_assets(tmp_path_factory.mktemp("demo") / "assets", sizes=sizes, progress=False)


@pytest.fixture(scope="session")
def family_assets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Assets]:
    """The same with a tiny model of a family; read only."""
    from videor1.demo.assets import Sizes, make_assets

    sizes = Sizes(4, 2, train_videos=3, train_images=1, dev_videos=2, dev_images=1, test_videos=1, test_images=0)

    @functools.cache
    def make(family: str) -> Assets:
        folder = tmp_path_factory.mktemp(family) / "assets"
        return make_assets(folder, sizes=sizes, progress=False, family=family)

    return make


@pytest.fixture(scope="session")
def qwen3_assets(family_assets: Callable[[str], Assets]) -> Assets:
    """The same with a tiny Qwen3-VL; read only."""
    return family_assets("qwen3_vl")


@pytest.fixture(scope="session")
def thinking_assets(qwen3_assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """The same with the template of Thinking models, which ends a prompt with <think>; read only."""
    folder = Path(shutil.copytree(qwen3_assets.model, tmp_path_factory.mktemp("thinking") / "model"))
    template = folder / "chat_template.jinja"
    head, found, end = template.read_text("utf-8").rpartition("assistant\\n")
    assert found
    template.write_text(f"{head}{found}<think>\\n{end}", "utf-8")
    return dataclasses.replace(qwen3_assets, model=folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Videos by their name in ``coded_videos.MADE``, each made once; read only."""
    from coded_videos import MADE

    files: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in files:
            files[name] = MADE[name].write(tmp_path_factory.mktemp("made"))
        return files[name]

    return make


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All six benchmarks, made small; read only."""
    from evaluations import write_benchmarks

    return write_benchmarks(tmp_path_factory)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> type[Oracle]:
    """Answers in place of an evaluation's sampler."""
    from evaluations import install_oracle

    return install_oracle(monkeypatch)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams in blocks of about five rows, and in windows of four blocks."""
    from videor1.data import shards, stream

    monkeypatch.setattr(shards, "BLOCK_BYTES", 640)
    monkeypatch.setattr(stream, "MAX_WINDOW_BLOCKS", 4)
