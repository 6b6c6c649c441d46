"""The files that a model's weights are read from: safetensors only, by plain names, whole, and not quantised.

transformers itself would follow an index to files of other kinds and places, load adapters that lie beside the weights,
draw missing weights at random, and dequantise. So a folder is checked before it is loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from videor1.errors import ConfigError
from videor1.model.families import family_of
from videor1.model.manifest import DamagedError, check_manifest, is_plain

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

_LAYER, _BLOCK = re.compile(r"\blayers\.(\d+)\."), re.compile(r"\bblocks\.(\d+)\.")
_DTYPES = ("F32", "F16", "BF16", "F64")
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"

MERGE = (
    'python -c "from peft import PeftModel as P; from transformers import AutoTokenizer as T; '
    "from transformers import AutoModelForImageTextToText as M; b, k = '{base}', dict(trust_remote_code=False); "
    "P.from_pretrained(M.from_pretrained(b, dtype='auto', **k), '{adapter}')"
    ".merge_and_unload().save_pretrained('MERGED'); T.from_pretrained(b, **k).save_pretrained('MERGED')\""
)


class Stored(NamedTuple):
    """A tensor as the header of a safetensors file describes it."""

    dtype: str  # safetensors' name: F32, BF16, ...
    shape: tuple[int, ...]
    file: Path


def check_folder(source: str) -> None:
    """Check what can be checked of a local model folder before its config is read; nothing for a hub id.

    Raises:
        ConfigError: the folder is damaged, or holds adapters alone.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    if (folder / ADAPTER).exists():
        raise ConfigError(_adapter_message(folder))
    try:
        check_manifest(folder, trainer=False)
    except (DamagedError, OSError) as error:
        raise ConfigError(
            f"model_name_or_path: {folder} is damaged, or was changed after it was saved: {error}; take another "
            "checkpoint, or delete the manifest where the change is meant"
        ) from error


def _adapter_message(folder: Path) -> str:
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    command = MERGE.format(base=_quoted(base, "BASE_MODEL"), adapter=_quoted(str(folder), "ADAPTER_FOLDER"))
    return (
        f"model_name_or_path: {folder} holds a LoRA adapter ({ADAPTER}), expected a whole model; merge it into its "
        f"base model first:\n  {command}\nand then name MERGED"
    )


def _quoted(name: Any, otherwise: str) -> str:
    """Return a name as it can stand in a shell command in quotes, or ``otherwise`` if it cannot."""
    return name if isinstance(name, str) and name and not any(c in name for c in "'\"\\`$!\n\r") else otherwise


def check_config(source: str, config: Any) -> None:
    """Check the parts of a model's config.json that say how its weights are stored.

    Raises:
        ConfigError: the weights are quantised, or lie in a file that the config names and that is not a plain one.
    """
    for place, part in (("", config), *((f"{n}.", getattr(config, n, None)) for n in ("text_config", "vision_config"))):
        quantization = getattr(part, "quantization_config", None) or getattr(part, "compression_config", None)
        if quantization:
            given = quantization if isinstance(quantization, dict) else vars(quantization)
            method = given.get("quant_method", "of an unnamed kind")
            raise ConfigError(
                f"model_name_or_path: {source} is quantised ({place}quantization_config in its config.json: {method}), "
                "and quantised weights cannot be trained or sampled from here; name the original model in bf16 or fp32"
            )
    named = getattr(config, "transformers_weights", None)
    if named not in (None, WEIGHTS, INDEX):
        raise ConfigError(
            f"model_name_or_path: the config.json of {source} names its weights {named!r} (transformers_weights); "
            f"expected {WEIGHTS} or {INDEX}"
        )


def weight_files(source: str) -> list[Path]:
    """Return the safetensors files of a model; those of a hub id are downloaded.

    Raises:
        ConfigError: there are none, an index names a file of another kind or place, or the hub cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        if not (folder / INDEX).is_file():
            others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
            note = f"; {others[0]} is not read, since such a file can run code: convert it" if others else ""
            raise ConfigError(f"model_name_or_path: cannot load {source}: it has neither {WEIGHTS} nor {INDEX}{note}")
        return [folder / name for name in _index(folder / INDEX)]
    if _cached(source, ADAPTER) is not None:
        raise ConfigError(_adapter_message(folder))
    if (single := _cached(source, WEIGHTS)) is not None:
        return [single]
    if (index := _cached(source, INDEX)) is None:
        raise ConfigError(f"model_name_or_path: cannot load {source}: it has neither {WEIGHTS} nor {INDEX}")
    found = {name: _cached(source, name) for name in _index(index)}
    if lacking := [name for name, path in found.items() if path is None]:
        raise ConfigError(f"model_name_or_path: {source} has no {lacking[0]}, which its {INDEX} names")
    return [path for path in found.values() if path is not None]


def _cached(source: str, name: str) -> Path | None:
    """Return the path of a file of a hub id, which is downloaded if it is not there yet; None if there is no such file.

    Raises:
        ConfigError: the hub cannot be reached.
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ConfigError(f"model_name_or_path: cannot load {source!r}: {error}") from error
    return None if path is None else Path(path)


def _index(path: Path) -> list[str]:
    """Return the names of the files in an index. Raises ConfigError for one that is not a plain safetensors name."""
    try:
        names: Any = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(names, dict) or not names:
            raise ValueError("its weight_map is empty or no mapping")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"model_name_or_path: {path}: not an index of safetensors files ({error!r})") from error
    for tensor, name in names.items():
        if not is_plain(name) or not name.endswith(".safetensors"):
            raise ConfigError(
                f"model_name_or_path: {path} says that {tensor} is in {name!r}; expected the plain name of a "
                ".safetensors file of the same folder"
            )
    return sorted(set(names.values()))


def stored_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """Read the headers of safetensors files.

    Raises:
        DamagedError: a file is missing, cut or no safetensors file, or a tensor is in two of them.
    """
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    piece = opened.get_slice(name)
                    if name in found:
                        raise DamagedError(f"{file}: {name} is in {found[name].file.name} too")
                    found[name] = Stored(piece.get_dtype(), tuple(piece.get_shape()), file)
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{file}: not a whole safetensors file: {error}") from error
    return found


def check_stored(source: str, config: Any, stored: Mapping[str, Stored]) -> None:
    """Check a model's stored tensors against its config.json.

    A head that is stored though the config says that it is the embedding is accepted where it equals the embedding.
    Otherwise one of the two is wrong, and nothing tells which.

    Raises:
        ConfigError: tensors are of a dtype that only quantised models have, or the head contradicts the config.
    """
    others = [name for name, tensor in stored.items() if tensor.dtype not in _DTYPES]
    if others:
        dtypes = sorted({stored[name].dtype for name in others})
        raise ConfigError(
            f"model_name_or_path: {source} is quantised or damaged: {len(others)} of its tensors are {dtypes}, e.g. "
            f"{others[0]}; expected {', '.join(_DTYPES[:3])}; name the original model in bf16 or fp32"
        )
    embedding = next((name for name in stored if name.endswith(_EMBEDDING)), None)
    if not getattr(config, "tie_word_embeddings", False) or _HEAD not in stored or embedding is None:
        return
    if not torch.equal(_tensor(stored[_HEAD], _HEAD), _tensor(stored[embedding], embedding)):
        raise ConfigError(
            f"model_name_or_path: {source} stores a head of its own ({_HEAD} is not {embedding}), but its config.json "
            "says that both are one (tie_word_embeddings: true); if the head was trained, write "
            '"tie_word_embeddings": false in config.json, at the top and in text_config; if not, remove the tensor'
        )


def check_sizes(source: str, config: Any, stored: Mapping[str, Stored]) -> None:
    """Check that a config describes a model about as large as the stored one, before memory is taken for it.

    transformers makes the whole model before it compares shapes. What is left to it are small differences, which its
    report names one by one.

    Raises:
        ConfigError: the config describes another number of layers, a much larger model, or none that can be made.
    """
    try:
        layers = {_LAYER: config.text_config.num_hidden_layers, _BLOCK: config.vision_config.depth}
        for pattern, count in layers.items():
            held = len({match[1] for name in stored if (match := pattern.search(name))})
            if held and count > 2 * held:
                raise ValueError(f"{count:,} layers, its files hold {held}")
        with torch.device("meta"):
            model = family_of(config.model_type, source).transformers_class()(config)
            described = sum(p.numel() for p in model.parameters())
        held = sum(math.prod(tensor.shape) for tensor in stored.values())
        if described > 2 * held + 2**20:
            raise ValueError(f"a model of {described:,} parameters, its files hold {held:,}")
    except Exception as error:  # A damaged config raises whatever the model's classes meet first.
        raise ConfigError(
            f"model_name_or_path: {source}: its config.json does not fit its weights: {error}; take the model's own"
        ) from error


def _tensor(stored: Stored, name: str) -> Tensor:
    with safe_open(stored.file, "pt") as opened:
        return opened.get_tensor(name)


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or Inf. Each tensor is read once, without a copy."""
    return [name for name, tensor in tensors.items() if not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor.detach())  # Both are NaN where an element is.
    return math.isfinite(low) and math.isfinite(high)
