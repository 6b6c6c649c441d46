"""What the tests of training share: tiny runs in a test's own folder."""

from pathlib import Path

import pytest
from runs import Lab

from videor1.demo.assets import Assets


@pytest.fixture
def lab(assets: Assets, tmp_path: Path) -> Lab:
    return Lab(assets, tmp_path)
