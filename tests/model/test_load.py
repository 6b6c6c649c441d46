"""What a model folder may do: be read, and nothing else."""

from __future__ import annotations

import builtins
import contextlib
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


@pytest.mark.parametrize("place", ["custom_generate", "tokenizer", "config", "processor"])
def test_code_beside_a_known_model_never_runs(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The model is one that transformers knows, and the folder offers code for a part of it: a yes is on stdin."""
    folder = Path(shutil.copytree(assets.model, tmp_path / "model"))
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\ndef generate(*_, **__): pass\nclass Config: pass\n"
    (folder / "custom_generate").mkdir()
    where = folder / "custom_generate" / "generate.py" if place == "custom_generate" else folder / "code.py"
    where.write_text(code)
    mapped = {"AutoTokenizer": ["code.Config", None], "AutoConfig": "code.Config", "AutoProcessor": "code.Config"}
    files = {"tokenizer": "tokenizer_config.json", "config": "config.json", "processor": "preprocessor_config.json"}
    if place in files:
        file = folder / files[place]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": mapped}))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    with contextlib.suppress(ConfigError):  # A refusal is as good as a load without the code.
        load_model(TrainConfig(model_name_or_path=str(folder), device="cpu"))
    assert not ran.exists()
