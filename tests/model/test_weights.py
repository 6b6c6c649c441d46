"""Model folders that hold something else than whole safetensors weights are refused, with what to do."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from videor1.config import TrainConfig
from videor1.config.cli import run_main
from videor1.demo.assets import Assets
from videor1.errors import ConfigError
from videor1.model import load_model
from videor1.model.weights import MERGE, nonfinite, weight_files
from videor1.train import main


@pytest.fixture
def folder(assets: Assets, tmp_path: Path) -> Path:
    return Path(shutil.copytree(assets.model, tmp_path / "model"))


def load(folder: Path) -> Any:
    return load_model(TrainConfig(model_name_or_path=str(folder), device="cpu"))


def edit(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change(folder: Path, edit_tensors: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit_tensors(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path, **names: Any) -> dict[str, Any]:
    """Split the weights in two files with an index, in which some files may have another name."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"one.safetensors": list(tensors)[::2], "two.safetensors": list(tensors)[1::2]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: names.get(f[:3], f) for f, keys in parts.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "awq": {"quant_method": "awq", "bits": 4},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "fp8": {"quant_method": "fp8"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
    "unheard of": {"bits": 2},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_folder_is_refused(kind: str, folder: Path) -> None:
    edit(folder, quantization_config=QUANTISED[kind])
    with pytest.raises(ConfigError, match=r"is quantised \(quantization_config.*name the original model"):
        load(folder)


def test_a_part_that_is_quantised_is_refused(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, text_config=text | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    with pytest.raises(ConfigError, match=r"is quantised \(text_config.quantization_config.*awq"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
def test_tensors_of_a_quantised_kind_are_refused(dtype: torch.dtype, folder: Path) -> None:
    def quantise(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("q_proj.weight"))
        tensors[name] = tensors[name].to(dtype)

    change(folder, quantise)
    with pytest.raises(ConfigError, match="is quantised or damaged: 1 of its tensors"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_read(dtype: torch.dtype, folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    assert next(load(folder).hf.parameters()).dtype == torch.float32


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[next(name for name in tensors if name.endswith("q_proj.weight"))]


def reshape(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name][:-1].contiguous()


def poison(value: float) -> Callable[[dict[str, Tensor]], None]:
    def put(tensors: dict[str, Tensor]) -> None:
        tensors[next(name for name in tensors if name.endswith("norm.weight"))].view(-1)[-1] = value

    return put


@pytest.mark.parametrize(
    ("edit_tensors", "message"),
    [
        (drop, "missing keys in its weights"),
        (lambda tensors: tensors.update({"more": torch.zeros(2)}), "unexpected keys in its weights"),
        (reshape, "cannot load|mismatched keys"),
        (poison(float("nan")), "NaN or Inf in its weights.*norm.weight"),
        (poison(float("inf")), "NaN or Inf in its weights.*norm.weight"),
        (poison(float("-inf")), "NaN or Inf in its weights.*norm.weight"),
        (lambda tensors: tensors.clear(), "its files hold 0"),
    ],
)
def test_weights_that_are_not_the_models(
    edit_tensors: Callable[[dict[str, Tensor]], object], message: str, folder: Path
) -> None:
    change(folder, edit_tensors)
    with pytest.raises(ConfigError, match=message):
        load(folder)


@pytest.mark.parametrize("length", [0, 7, 1000, -1])
def test_a_cut_file_is_named(length: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, length % file.stat().st_size)
    with pytest.raises(ConfigError, match=r"model\.safetensors: not a whole safetensors file"):
        load(folder)


def test_shards_by_plain_names_are_read(folder: Path) -> None:
    expected = load(folder).hf.state_dict()
    shard(folder)
    assert all(torch.equal(value, expected[name]) for name, value in load(folder).hf.state_dict().items())


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "../two.safetensors", "/two.safetensors", "sub/two.safetensors", "two.pt", "", "..", None, 3],
)
def test_an_index_that_names_other_files_is_refused(name: Any, folder: Path) -> None:
    shard(folder, two=name)
    with pytest.raises(ConfigError, match=r"expected the plain name of a \.safetensors file"):
        load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{", "[" * 100_000])
def test_an_index_that_is_none(text: str, folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match="not an index of safetensors files"):
        load(folder)


def test_a_shard_that_is_not_there(folder: Path) -> None:
    shard(folder)
    (folder / "two.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"two.safetensors: not a whole safetensors file"):
        load(folder)


class Pickled:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_never_read(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Pickled(tmp_path / "ran")}, folder / name)
    with pytest.raises(ConfigError, match=f"neither model.safetensors nor .*{name} is not read, since"):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../other.safetensors", "adapter_model.bin", "other.safetensors"]
)
def test_a_config_that_names_its_weights_is_refused(name: str, folder: Path) -> None:
    edit(folder, transformers_weights=name)
    with pytest.raises(ConfigError, match=r"transformers_weights|expected model\.safetensors"):
        load(folder)


def tie(folder: Path, head: Callable[[Tensor], Tensor]) -> None:
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True

    def store(tensors: dict[str, Tensor]) -> None:
        embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        tensors["lm_head.weight"] = head(tensors[embedding].clone())

    change(folder, store)


def test_a_head_of_its_own_under_a_tied_config_says_what_to_write(folder: Path) -> None:
    tie(folder, lambda embedding: embedding + 1e-3)
    with pytest.raises(ConfigError, match=r'write "tie_word_embeddings": false in config.json'):
        load(folder)
    text = json.loads((folder / "config.json").read_text())["text_config"] | {"tie_word_embeddings": False}
    edit(folder, tie_word_embeddings=False, text_config=text)
    model = load(folder)
    assert model.hf.lm_head.weight is not model.hf.get_input_embeddings().weight
    assert (model.hf.lm_head.weight - model.hf.get_input_embeddings().weight).abs().max() > 5e-4


def test_a_stored_head_that_equals_the_embedding_is_tied(folder: Path) -> None:
    tie(folder, lambda embedding: embedding)
    model = load(folder)
    assert model.hf.lm_head.weight is model.hf.get_input_embeddings().weight


@pytest.mark.parametrize("row", [0, -1])
def test_a_head_that_differs_in_one_number(row: int, folder: Path) -> None:
    def head(embedding: Tensor) -> Tensor:
        embedding[row, row] += 1
        return embedding

    tie(folder, head)
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        load(folder)


def adapter_folder(assets: Assets, path: Path, base: str) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(assets.model, trust_remote_code=False)
    options = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(hf, options).save_pretrained(str(path))
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    return path


def test_an_adapter_says_how_it_is_merged(assets: Assets, tmp_path: Path, capsys) -> None:
    folder = adapter_folder(assets, tmp_path / "adapter", str(assets.model))
    with pytest.raises(ConfigError, match=r"holds a LoRA adapter .* merge it into its base model first") as raised:
        load(folder)
    command = shlex.split(str(raised.value).splitlines()[1])
    assert command[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    merged, base = load(tmp_path / "MERGED").hf.state_dict(), load(assets.model).hf.state_dict()
    moved = {name for name in base if not torch.equal(merged[name], base[name])}
    assert moved == {name for name in base if re.search(r"q_proj\.weight", name) and "visual" not in name}
    options = ["--model_name_or_path", str(folder), "--dataset_name", str(assets.train)]
    assert run_main(main, [*options, "--output_dir", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()
    assert "merge it" in capsys.readouterr().err


def test_an_adapter_beside_a_models_weights_is_not_taken_silently(assets: Assets, folder: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(assets, tmp_path / "adapter", str(assets.model))
    for file in adapter.iterdir():
        shutil.copy(file, folder)
    with pytest.raises(ConfigError, match="holds a LoRA adapter"):
        load(folder)


@pytest.mark.parametrize("base", ["'); import os; os.mkdir('x')  #", "$(x)", "a\nb", "", 3])
def test_a_base_that_is_no_name_is_not_put_into_the_command(base: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(ConfigError) as raised:
        load(tmp_path)
    assert MERGE.format(base="BASE_MODEL", adapter=tmp_path) in str(raised.value)


def test_nan_is_found_wherever_it_is() -> None:
    tensors = {"clean": torch.ones(5), "none": torch.zeros(0), "whole": torch.ones(3, dtype=torch.int64)}
    tensors |= {f"{at}": torch.ones(1000) for at in (0, 500, 999)}
    for at in (0, 500, 999):
        tensors[f"{at}"][at] = float("nan")
    tensors["half"] = torch.tensor([1, float("-inf")], dtype=torch.bfloat16)
    assert nonfinite(tensors) == ["0", "500", "999", "half"]


CONFIGS: dict[str, Any] = {
    "text_config.hidden_size": [8192, "x", -4, None],
    "text_config.intermediate_size": [10**9],
    "text_config.vocab_size": [10**9],
    "text_config.num_attention_heads": [0],
    "text_config.num_key_value_heads": [1],
    "text_config.num_hidden_layers": [0, 3, 10**6],
    "text_config.rope_parameters": [{"rope_type": "none such"}],
    "vision_config.depth": [10**5],
    "text_config": [None, 3, []],
    "vision_config": [{}, None],
    "dtype": ["float99"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CONFIGS.items() for value in values])
def test_a_config_of_another_model_takes_no_memory(
    name: str, value: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, _, key = name.rpartition(".")
    config = json.loads((folder / "config.json").read_text())
    (config[section] if section else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="model_name_or_path: "):
        load(folder)


class Hub:
    """Files that a hub has, in place of transformers' cached_file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []

    def __call__(self, source: str, name: str, **_: Any) -> str | None:
        assert source == "owner/name"
        self.asked.append(name)
        return str(self.folder / name) if (self.folder / name).exists() else None


def test_the_files_of_a_hub_id_are_checked_alike(
    assets: Assets, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.cached_file", Hub(folder))
    assert weight_files("owner/name") == [folder / "model.safetensors"]
    shard(folder)
    assert weight_files("owner/name") == [folder / "one.safetensors", folder / "two.safetensors"]
    (folder / "two.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no two\.safetensors"):
        weight_files("owner/name")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    with pytest.raises(ConfigError, match=r"expected the plain name of a \.safetensors file"):
        weight_files("owner/name")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="has neither"):
        weight_files("owner/name")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a LoRA adapter"):
        weight_files("owner/name")
