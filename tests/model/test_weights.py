"""Model folders that hold something else than whole safetensors weights are refused, with what to do."""

import contextlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from videor1.config import TrainConfig
from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.model import load_model
from videor1.model.weights import MERGE, nonfinite, weight_files
from videor1.plan.setup import shape_of
from videor1.train import main

Tensors = dict[str, Tensor]
Change = Callable[[Path], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(assets: Assets, tmp_path: Path) -> Path:
    return Path(shutil.copytree(assets.model, tmp_path / "model"))


def load(folder: Path | str) -> Any:
    return load_model(TrainConfig(model_name_or_path=str(folder), device="cpu"))


def config(**values: Any) -> Change:
    """Set parts of config.json; a double underscore leads into a section."""

    def change(folder: Path) -> None:
        tree = json.loads((folder / "config.json").read_text())
        for name, value in values.items():
            section, _, key = name.rpartition("__")
            (tree[section] if section else tree)[key] = value
        (folder / "config.json").write_text(json.dumps(tree))

    return change


def tensors(edit: Callable[[Tensors], object]) -> Change:
    def change(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        edit(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def one(ending: str, replace: Callable[[Tensor], Tensor | None]) -> Change:
    """Replace the first tensor of a name that ends so; None: leave it out."""

    def edit(held: Tensors) -> None:
        name = next(name for name in held if name.endswith(ending))
        new = replace(held.pop(name))
        held.update({} if new is None else {name: new})

    return tensors(edit)


def poisoned(value: float) -> Change:
    return one("norm.weight", lambda tensor: torch.cat([tensor[:-1], torch.tensor([value])]))


def sharded(second: Any = "two.safetensors", index: str | None = None) -> Change:
    """Split the weights in two files with an index, which may name the second otherwise or be another text."""

    def change(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        parts = {"one.safetensors": list(held)[::2], "two.safetensors": list(held)[1::2]}
        for file, keys in parts.items():
            save_file({key: held[key] for key in keys}, folder / file, metadata={"format": "pt"})
        files = {"one.safetensors": "one.safetensors", "two.safetensors": second}
        names = {key: files[file] for file, keys in parts.items() for key in keys}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}) if index is None else index)

    return change


def cut(name: str, length: int) -> Change:
    return lambda folder: os.truncate(folder / name, length % (folder / name).stat().st_size)


def tied(head: Callable[[Tensor], Tensor]) -> Change:
    """Store a head beside the embedding, which the config says is both."""

    def edit(held: Tensors) -> None:
        embedding = next(tensor for name, tensor in held.items() if name.endswith("embed_tokens.weight"))
        held["lm_head.weight"] = head(embedding.clone())

    return tensors(edit)


def one_more(row: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_put((torch.tensor(row), torch.tensor(row)), tensor[row, row] + 1)


QUANTISED = (
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    *({"quant_method": method, "bits": 4} for method in ("awq", "gptq")),
    {"quant_method": "fp8"},
    {"quant_method": "compressed-tensors", "config_groups": {}},
    {"bits": 2},
)
CONFIGS: dict[str, Any] = {
    "text_config__hidden_size": [8192, "x", -4, None],
    "text_config__intermediate_size": [10**9],
    "text_config__vocab_size": [10**9],
    "text_config__num_attention_heads": [0],
    "text_config__num_key_value_heads": [1],
    "text_config__num_hidden_layers": [0, 3, 10**6],
    "text_config__rope_parameters": [{"rope_type": "none such"}],
    "vision_config__depth": [10**5],
    "text_config": [None, 3, []],
    "vision_config": [{}, None],
    "dtype": ["float99"],
}
NAMES = ("pytorch_model.bin", "../two.safetensors", "/two.safetensors", "sub/two.safetensors", "two.pt", "", "..", None)
CASES: list[tuple[Change, str]] = [
    *((config(quantization_config=q), r"quantised \(quantization_config.*name the original model") for q in QUANTISED),
    (config(text_config__quantization_config=QUANTISED[1]), r"quantised \(text_config.quantization_config.*awq"),
    *(
        (one("q_proj.weight", lambda t, dtype=dtype: t.to(dtype)), "is quantised or damaged: 1 of its tensors")
        for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32)
    ),
    (one("q_proj.weight", lambda tensor: None), "missing keys in its weights"),
    (tensors(lambda held: held.update({"more": torch.zeros(2)})), "unexpected keys in its weights"),
    (one("q_proj.weight", lambda tensor: tensor[:-1].contiguous()), "cannot load|mismatched keys"),
    *((poisoned(float(value)), "NaN or Inf in its weights.*norm.weight") for value in ("nan", "inf", "-inf")),
    (tensors(lambda held: held.clear()), "its files hold 0"),
    *((cut(WEIGHTS, length), r"model\.safetensors: not a whole safetensors file") for length in (0, 7, 1000, -1)),
    *((sharded(second=name), r"expected the plain name of a \.safetensors file") for name in (*NAMES, 3)),
    *(
        (sharded(index=text), "not an index of safetensors files")
        for text in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{", "[" * 100_000)
    ),
    (lambda f: (sharded()(f), (f / "two.safetensors").unlink()), r"two.safetensors: not a whole safetensors file"),
    *(
        (config(transformers_weights=name), r"transformers_weights|expected model\.safetensors")
        for name in ("pytorch_model.bin", "../other.safetensors", "adapter_model.bin", "other.safetensors")
    ),
    *((tied(one_more(row)), "tie_word_embeddings") for row in (0, -1)),
    (tied(lambda embedding: embedding + 1e-3), r'write "tie_word_embeddings": false in config.json'),
    # A config of another model takes no memory.
    *((config(**{name: value}), "model_name_or_path: ") for name, values in CONFIGS.items() for value in values),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=range(len(CASES)))
def test_what_is_refused(change: Change, message: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_shards_heads_and_other_floats_are_read(folder: Path, tmp_path: Path) -> None:
    """Shards by plain names; a stored head that equals the embedding is tied, another is one of its own."""
    expected = load(folder).hf.state_dict()
    tied(lambda embedding: embedding)(folder)
    model = load(folder)
    assert model.hf.lm_head.weight is model.hf.get_input_embeddings().weight
    apart = Path(shutil.copytree(folder, tmp_path / "apart"))
    sharded()(folder)
    assert all(torch.equal(value, expected[name]) for name, value in load(folder).hf.state_dict().items())
    tied(lambda embedding: embedding + 1e-3)(apart)
    config(tie_word_embeddings=False, text_config__tie_word_embeddings=False)(apart)
    model = load(apart)
    assert model.hf.lm_head.weight is not model.hf.get_input_embeddings().weight
    assert (model.hf.lm_head.weight - model.hf.get_input_embeddings().weight).abs().max() > 5e-4
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        tensors(lambda held, to=dtype: held.update({name: tensor.to(to) for name, tensor in held.items()}))(apart)
        assert next(load(apart).hf.parameters()).dtype == torch.float32


class Pickled:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


def test_a_pickle_is_never_read(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        torch.save({"weight": Pickled(tmp_path / "ran")}, folder / name)
        with pytest.raises(ConfigError, match=f"neither model.safetensors nor .*{name} is not read, since"):
            load(folder)
        (folder / name).unlink()
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def adapter(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters of the demo's model; read only."""
    path = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(assets.model, trust_remote_code=False)
    options = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(hf, options).save_pretrained(str(path))
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(assets.model)}))
    return path


def test_an_adapter_says_how_it_is_merged(
    adapter: Path, folder: Path, assets: Assets, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"holds a LoRA adapter .* merge it into its base model first") as raised:
        load(adapter)
    python, flag, code = shlex.split(str(raised.value).splitlines()[1])
    assert (python, flag) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "the command", "exec"), {"__name__": "__main__"})
    merged, base = load(tmp_path / "MERGED").hf.state_dict(), load(assets.model).hf.state_dict()
    moved = {name for name in base if not torch.equal(merged[name], base[name])}
    assert moved == {name for name in base if re.search(r"q_proj\.weight", name) and "visual" not in name}
    options = ["--model_name_or_path", str(adapter), "--dataset_name", str(assets.train)]
    assert run_main(main, [*options, "--output_dir", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()
    assert "merge it" in capsys.readouterr().err
    # Beside a model's weights it is not taken silently; a base that is no name is not put into the command.
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="holds a LoRA adapter"):
        load(folder)
    for base in ("'); import os; os.mkdir('x')  #", "$(x)", "a\nb", "", 3):
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        with pytest.raises(ConfigError) as raised:
            load(folder)
        assert MERGE.format(base="BASE_MODEL", adapter=folder) in str(raised.value)


def test_the_files_of_a_hub_id_are_checked_alike(folder: Path) -> None:
    def hub(source: str, name: str, **_: Any) -> str | None:
        """In place of transformers' cached_file."""
        assert source == "owner/name"
        return str(folder / name) if (folder / name).exists() else None

    with patch("transformers.utils.cached_file", hub):
        assert weight_files("owner/name") == [folder / WEIGHTS]
        sharded()(folder)
        assert weight_files("owner/name") == [folder / "one.safetensors", folder / "two.safetensors"]
        for change, message in (
            (lambda: (folder / "two.safetensors").unlink(), r"has no two\.safetensors"),
            (
                lambda: (folder / INDEX).write_text('{"weight_map": {"a": "pytorch_model.bin"}}'),
                "expected the plain name",
            ),
            (lambda: (folder / INDEX).rename(folder / "pytorch_model.bin"), "has neither"),
            (lambda: (folder / "adapter_config.json").write_text("{}"), "holds a LoRA adapter"),
        ):
            change()
            with pytest.raises(ConfigError, match=message):
                weight_files("owner/name")


def test_nan_is_found_wherever_it_is() -> None:
    held = {"clean": torch.ones(5), "none": torch.zeros(0), "whole": torch.ones(3, dtype=torch.int64)}
    held |= {f"{at}": torch.ones(1000).index_fill(0, torch.tensor(at), float("nan")) for at in (0, 500, 999)}
    held["half"] = torch.tensor([1, float("-inf")], dtype=torch.bfloat16)
    assert nonfinite(held) == ["0", "500", "999", "half"]


MAPPED = {"AutoTokenizer": ["code.Config", None], "AutoConfig": "code.Config", "AutoProcessor": "code.Config"}
FILES = {"tokenizer": "tokenizer_config.json", "config": "config.json", "processor": "preprocessor_config.json"}


@pytest.mark.parametrize("place", ["custom_generate", *FILES, "unknown type", "unknown type, planned"])
def test_code_in_a_model_folder_never_runs(folder: Path, tmp_path: Path, place: str) -> None:
    """Without a word of ours transformers would ask on a terminal, and run it on a yes: a yes is on stdin.

    The model is one that transformers knows, of which the folder offers code for a part; or one that it does not.
    """
    ran = tmp_path / "ran"
    (folder / "custom_generate").mkdir()
    where = folder / "custom_generate" / "generate.py" if place == "custom_generate" else folder / "code.py"
    where.write_text(f"open({str(ran)!r}, 'w')\ndef generate(*_, **__): pass\nclass Config: pass\n")
    unknown = {"model_type": "unheard_of"} if place not in ("custom_generate", *FILES) else {}
    if place != "custom_generate":
        file = folder / FILES.get(place, "config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": MAPPED} | unknown))
    # For a model that is known, a refusal is as good as a load without the code.
    refusal = pytest.raises(ConfigError, match="model_name_or_path") if unknown else contextlib.suppress(ConfigError)
    with refusal, patch("builtins.input", return_value="y"):
        (shape_of if place == "unknown type, planned" else load)(str(folder))
    assert not ran.exists()
