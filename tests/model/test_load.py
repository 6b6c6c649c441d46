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

MAPPED = {"AutoTokenizer": ["code.Config", None], "AutoConfig": "code.Config", "AutoProcessor": "code.Config"}
FILES = {"tokenizer": "tokenizer_config.json", "config": "config.json", "processor": "preprocessor_config.json"}


@pytest.mark.parametrize("place", ["custom_generate", *FILES, "unknown type", "unknown type, planned"])
def test_code_in_a_model_folder_never_runs(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Without a word of ours transformers would ask on a terminal, and run it on a yes: a yes is on stdin.

    The model is one that transformers knows, of which the folder offers code for a part; or one that it does not.
    """
    folder, ran = Path(shutil.copytree(assets.model, tmp_path / "model")), tmp_path / "ran"
    (folder / "custom_generate").mkdir()
    where = folder / "custom_generate" / "generate.py" if place == "custom_generate" else folder / "code.py"
    where.write_text(f"open({str(ran)!r}, 'w')\ndef generate(*_, **__): pass\nclass Config: pass\n")
    unknown = {"model_type": "unheard_of"} if place not in ("custom_generate", *FILES) else {}
    if place != "custom_generate":
        file = folder / FILES.get(place, "config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": MAPPED} | unknown))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    # For a model that is known, a refusal is as good as a load without the code.
    refusal = pytest.raises(ConfigError, match="model_name_or_path") if unknown else contextlib.suppress(ConfigError)
    with refusal:
        if place == "unknown type, planned":
            shape_of(str(folder))
        else:
            load_model(TrainConfig(model_name_or_path=str(folder), device="cpu"))
    assert not ran.exists()
