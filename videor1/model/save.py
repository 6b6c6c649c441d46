"""Saving a model as a Hugging Face folder, and a digest that identifies a model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videor1.model.lm import VideoLM
from videor1.model.positions import POSITIONS_KEY

_THREADS = 8  # that hash a model

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def processor_files(source: str) -> dict[str, str]:
    """Return the contents of the processor's JSON files of a model, by name; every checkpoint gets a copy of them."""
    from transformers.utils import cached_file

    files = {}
    for name in PROCESSOR_FILES:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            files[name] = Path(path).read_text(encoding="utf-8")
    return files


def save_model(model: VideoLM, folder: Path) -> None:
    """Write the model (adapters merged), its tokenizer and processor files to a folder for ``from_pretrained``."""
    dtype = model.compute_dtype
    tensors = {name: tensor.to(dtype) for name, tensor in _merged_state(model)}
    if model.hf.lm_head.weight is model.hf.get_input_embeddings().weight:
        del tensors["lm_head.weight"]
    config_dtype = model.hf.config.dtype
    try:
        model.hf.save_pretrained(folder, state_dict=tensors)
    finally:
        model.hf.config.dtype = config_dtype
    _complete_config(folder / "config.json", str(dtype).removeprefix("torch."), model.position_rule)
    model.tokenizer.save_pretrained(folder)
    for name, text in processor_files(model.source).items():
        (folder / name).write_text(text, encoding="utf-8")


def _complete_config(path: Path, dtype: str, position_rule: str) -> None:
    """Write the tensors' dtype and the position rule to config.json.

    transformers writes the dtype of the model in memory instead of that of the saved tensors, and no position rule.
    """
    config = json.loads(path.read_text(encoding="utf-8")) | {POSITIONS_KEY: position_rule}
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part is config or "dtype" in part:
            part["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _merged_state(model: VideoLM) -> Iterator[tuple[str, Tensor]]:
    """Yield the state dict of the model with its adapters merged; the model's own weights are not changed."""
    if model.peft is None:
        yield from model.hf.state_dict().items()
        return
    adapted = {name: m for name, m in model.hf.named_modules() if hasattr(m, "base_layer")}
    for name, tensor in model.hf.state_dict().items():
        if ".lora_" in name:
            continue
        module, base, field = name.partition(".base_layer.")
        if base and field == "weight":
            layer: Any = adapted[module]
            for adapter in layer.active_adapters:
                tensor = tensor + layer.get_delta_weight(adapter)
        yield f"{module}.{field}" if base else name, tensor


def base_digest(model: VideoLM) -> str:
    """Return a digest that identifies a model by its parameters' names, shapes and all of their values.

    It does not depend on the model's folder, nor on the device. Adapters are left out: they belong to the run, not to
    its base model.
    """
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:  # hashlib releases the interpreter's lock
        parts = list(pool.map(_parameter_digest, _base_parameters(model)))
    return f"all-{hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()}"


def _parameter_digest(named: tuple[str, Tensor]) -> tuple[str, tuple[int, ...], str]:
    name, parameter = named
    values = parameter.detach().cpu().contiguous()
    data = values.reshape(-1).view(torch.uint8).numpy()
    return name, tuple(values.shape), hashlib.blake2b(data.data, digest_size=16).hexdigest()


def sampled_digest(model: VideoLM) -> str:
    """Return the digest by which early versions identified a model: it depends on a few values of each parameter.

    Their checkpoints and evaluations hold it.
    """
    digest = hashlib.sha256()
    for name, parameter in _base_parameters(model):
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // 8)][:8].float().tolist()
        digest.update(repr((name, tuple(parameter.shape), values)).encode())
    return digest.hexdigest()[:16]


def _base_parameters(model: VideoLM) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.hf.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter
