"""Loading the model that the options name, and preparing it for training."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from videor1.config import CommonConfig, ModelConfig
from videor1.errors import ConfigError, install
from videor1.model.chat import Chat
from videor1.model.cpu_layers import use_cpu_layers
from videor1.model.cpu_linear import use_onednn
from videor1.model.families import Family, family_of
from videor1.model.liger import use_liger
from videor1.model.lm import VideoLM, set_checkpointing
from videor1.model.manifest import DamagedError
from videor1.model.positions import POSITIONS_KEY, trained_rule
from videor1.model.save import processor_files
from videor1.model.template import check_template
from videor1.model.weights import (
    check_config,
    check_folder,
    check_sizes,
    check_stored,
    nonfinite,
    stored_tensors,
    weight_files,
)
from videor1_kernels import chosen_backend
from videor1_kernels.integrations.transformers import LINEAR_KERNELS


def load_model(config: CommonConfig) -> VideoLM:
    """Load the model that the options name, with its dtype, device, frozen parts, adapters and gradient checkpointing.

    Raises:
        ConfigError: an option is wrong, or the model cannot be loaded.
    """
    source = config.model_name_or_path
    if not source:
        raise ConfigError("model_name_or_path: expected a model's folder or hub id, got nothing")
    if not Path(source).is_dir() and (source.count("/") != 1 or source[0] in "./~"):
        raise ConfigError(f"model_name_or_path: there is no folder {source!r}, and a hub id is of the form owner/name")
    device = pick_device(config.device)
    if device.type == "cuda" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        # Steps of very different sizes follow each other: memory in fixed pieces would break into ones that fit none.
        # torch reads this at the first allocation.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    bf16 = device.type == "cuda" if config.bf16 is None else config.bf16
    transformers_logging.disable_progress_bar()  # The run shows a progress bar of its own.
    # Trained weights are kept in fp32, and bf16 runs compute under autocast. fp32 is not needed for weights that are
    # frozen below adapters, nor with ZeRO, which keeps fp32 copies itself.
    zero = config.distributed.engine == "deepspeed"
    hf, tokenizer = _from_pretrained(source, torch.bfloat16 if bf16 and (config.lora.rank or zero) else torch.float32)
    _use_libraries(hf, config.model, device)
    rule = config.model.positions or trained_rule(source, getattr(hf.config, POSITIONS_KEY, None)) or "paper"
    chat = Chat(config.system, config.chat_template_kwargs)
    bf16 = bf16 and not zero
    model = VideoLM(hf, tokenizer, device=device, bf16=bf16, source=source, position_rule=rule, chat=chat)
    check_linear_attention(model)
    model.flash = config.model.attention == "flash_attention_2"
    make_trainable(model, config)
    use_onednn(model.hf)
    use_cpu_layers(model.hf, model.family)
    if not model.trainable():
        raise ConfigError("no parameter is left to train")
    return model


def check_linear_attention(model: VideoLM) -> None:
    """Check that there are kernels for a model's linear attention on its device.

    Raises:
        ConfigError: flash-linear-attention is not installed, and the model is on a GPU in bf16.
    """
    for op in LINEAR_KERNELS if model.linear_layers else ():
        try:
            chosen_backend(op, model.device, "auto", model.compute_dtype)
        except ValueError as error:
            raise ConfigError(
                f"model_name_or_path: {model.source} has {model.linear_layers} layers of linear attention: {error}"
            ) from error


def make_trainable(model: VideoLM, config: CommonConfig) -> None:
    """Freeze the vision tower, add adapters and switch gradient checkpointing on, as the options ask."""
    if config.freeze_vision:
        model.visual.requires_grad_(False)
    if config.lora.rank:
        model.add_lora(config.lora, config.seed)
    if config.gradient_checkpointing:
        set_checkpointing(model.hf, True, config.checkpoint_layers)
    model.hf.train()


def _use_libraries(hf: Any, options: ModelConfig, device: torch.device) -> None:
    """Use flash-attn in the vision tower, and Liger's kernels, if the options ask for them.

    Raises:
        ConfigError: the run is on a CPU, or a library is not installed.
    """
    liger = options.liger
    if liger is None:
        liger = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    if device.type == "cpu" and (liger or options.attention != "sdpa"):
        raise ConfigError("model.liger, model.attention flash_attention_2: they run on a GPU, and this run is on a CPU")
    if options.attention == "flash_attention_2":
        try:
            hf.model.visual.set_attn_implementation("flash_attention_2")
        except (ImportError, ValueError) as error:
            raise ConfigError(f"model.attention: {error}; {install('flash-attn')}") from error
    if liger:
        use_liger(hf)


def pick_device(name: str) -> torch.device:
    """Return the device that the option names; ``auto`` is a GPU if there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # Not one of the types that are allowed below.
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise ConfigError(f"device: {name!r} asked for; number of GPUs that torch {torch.__version__} sees: {seen}")
    return device


def read_config(source: str) -> Any:
    """Read a model's config.

    Raises:
        ConfigError: it is damaged, or of a model type that is no family's, transformers' or not.
    """
    try:
        model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
        if isinstance(model_type, str):
            family_of(model_type, source)
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ConfigError:
        raise
    except Exception as error:  # A damaged config raises whatever its class meets first.
        raise ConfigError(f"model_name_or_path: cannot load {source!r}: {error}") from error


def _from_pretrained(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    check_folder(source)
    config = read_config(source)
    family = family_of(config.model_type, source)
    check_config(source, config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model_name_or_path: cannot load the tokenizer of {source!r}: {error}") from error
    check_template(tokenizer, source, family)
    check_processor(source, family)
    return load_weights(source, config, dtype), tokenizer


def check_processor(source: str, family: Family) -> None:
    """Check that a model's processor files, which its checkpoints get copies of, cut patches as its family does.

    Raises:
        ConfigError: they are damaged, or another family's.
    """
    frames = family.frames
    expected = {"patch_size": frames.patch_size, "image_mean": list(frames.mean), "image_std": list(frames.std)}
    for file, text in processor_files(source).items():
        try:
            given: Any = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"model_name_or_path: {file} of {source} is no JSON: {error}") from error
        whole = given if isinstance(given, dict) else {}
        # There may be parts in it, one for images and one for videos.
        for part in (whole, *(part for part in whole.values() if isinstance(part, dict))):
            for name, value in expected.items():
                if part.get(name, value) != value:
                    raise ConfigError(
                        f"model_name_or_path: {file} of {source} says {name} {part[name]}, expected {value}: it is "
                        f"another family's, the model is a {family.name}"
                    )


def load_weights(source: str, config: Any, dtype: torch.dtype) -> Any:
    """Load a model's weights, all of which must be there, of the model's shapes and finite.

    Args:
        source: a folder or hub id.
        config: its config, as ``AutoConfig`` reads it.
        dtype: the dtype to load the weights in.

    Raises:
        ConfigError: the files are damaged, of another kind than safetensors, or do not hold what the config says.
    """
    try:
        stored = stored_tensors(weight_files(source))
    except DamagedError as error:
        raise ConfigError(f"model_name_or_path: cannot load {error}") from error
    check_stored(source, config, stored)
    check_sizes(source, config, stored)
    try:
        hf, report = (
            family_of(config.model_type, source)
            .transformers_class()
            .from_pretrained(
                source,
                dtype=dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:  # Damaged files raise any of these.
        raise ConfigError(f"model_name_or_path: cannot load {source!r}: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            names = sorted(map(str, report[problem]))
            kind = problem.replace("_", " ")
            raise ConfigError(f"{source}: {kind} in its weights: {names[:5]} ({len(names)} in all)")
    if bad := nonfinite(dict(hf.named_parameters())):
        raise ConfigError(
            f"{source}: NaN or Inf in its weights: {bad[:5]} ({len(bad)} in all); take another checkpoint"
        )
    return hf
