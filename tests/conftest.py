"""What all tests share: one thread, and the demo's files in a tiny size."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads this when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from videor1.demo.assets import Assets, Sizes, make_assets

torch.set_num_threads(1)  # two threads on a busy machine of two cores wait for each other

SIZES = Sizes(4, 2, train_videos=3, train_images=1, dev_videos=2, dev_images=1, test_videos=1, test_images=0)


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """Clips, data files and the tiny model; read only."""
    return make_assets(tmp_path_factory.mktemp("demo") / "assets", sizes=SIZES, progress=False)
