"""What a model folder may do: be read, and nothing else."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest

from videor1.config import TrainConfig
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.model import load_model
from videor1.plan.setup import shape_of


@pytest.mark.parametrize("reader", ["load", "plan"])
def test_code_in_a_model_folder_never_runs(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """Without a word of ours transformers would ask on a terminal, and run it on a yes."""
    folder = Path(shutil.copytree(assets.model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\n")
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    reading = {
        "load": lambda: load_model(TrainConfig(model_name_or_path=str(folder), device="cpu")),
        "plan": lambda: shape_of(str(folder)),
    }
    with pytest.raises(ConfigError, match="model_name_or_path"):
        reading[reader]()
    assert not ran.exists()
