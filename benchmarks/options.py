"""The options of a measurement, told once: ``pytest benchmarks`` and the command lines take the same ones."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS


def default_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def whole_number(text: str) -> int:
    """An argument of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def switch(text: str) -> bool | None:
    """On, off, or None: as the shape has it."""
    found = {"on": True, "off": False, "shape": None}
    if text not in found:
        raise argparse.ArgumentTypeError(f"expected {', '.join(found)}, got {text!r}")
    return found[text]


# What is measured. A part takes those that are arguments of its modules' ``cases``, which also hold the defaults.
SIZES: dict[str, dict[str, Any]] = {
    "shape": {
        "nargs": "+",
        "help": "models, with random weights: tiny, 3b, 7b, and of training cpu, toy (default: 7b on a card, and of "
        "rollouts and training 3b too; else tiny, and of training cpu)",
    },
    "prompts": {"nargs": "+", "type": whole_number, "help": "of an optimizer step or a rollout (growth: one number)"},
    "generations": {
        "type": whole_number,
        "help": "completions from ordered frames; half as many from shuffled ones (default: 8)",
    },
    "completion": {
        "type": whole_number,
        "help": "tokens of each completion (default: 768 for steps and training, 256 for rollouts and growth; for tiny "
        "64, and 128 for 8 prompts)",
    },
    "frames": {"type": whole_number, "help": "of a video (default: 16)"},
    "media": {"choices": ("video", "image"), "help": "of whole steps; image: plain GRPO, beside TRL too"},
    "lora": {"type": int, "help": "rank of the adapters of whole steps; 0: all is trained (default: 64 for 7b)"},
    "steps": {"type": whole_number, "help": "whole steps that are timed together (default: 1)"},
    "checkpointing": {
        "type": switch,
        "metavar": "{on,off,shape}",
        "help": "gradient checkpointing of steps and training; shape: on for 3b and 7b (default)",
    },
    "prompt": {"type": int, "help": "tokens of a prompt of training, 200 of them text (default: 1224; card: 2248 too)"},
    "axis": {"nargs": "+", "help": "what grows: frames, completion, generations, prompts (default: each)"},
    "most": {"type": whole_number, "help": "leave out what has grown further"},
}


def add_options(add: Callable[..., Any]) -> None:
    """Give all options to ``add``: a parser's ``add_argument``, or ``addoption`` of pytest."""
    add("--device", type=torch.device, default=default_device(), help="cuda where there is one")
    add(
        "--threads",
        type=whole_number,
        help="of torch, on a CPU (default: 1 for whole steps and growth, which are then not slowed by what else the "
        "machine does; all for the rest)",
    )
    add("--rounds", type=whole_number, help="times that each is measured in turns (default: by its length)")
    add("--only", default="", metavar="REGEX", help="what to measure, by 'case: implementation'")
    add("--seconds", type=float, default=math.inf, help="leave out others' rest after this long")
    tests = ["passed", "failed", "not run"]
    add("--tests", default="not run", choices=tests, help="how the kernels' tests ended on this machine")
    where = "write a JSON file per part (default folder: benchmarks/results)"
    add("--record", nargs="?", type=Path, const=RESULTS, metavar="FOLDER", help=where)
    for name, settings in SIZES.items():
        add(f"--{name}", **settings)


def given_sizes(options: argparse.Namespace) -> dict[str, Any]:
    """Those of SIZES that were given."""
    return {name: value for name in SIZES if (value := getattr(options, name)) is not None}


def check_choice(option: str, value: str, known: Any, part: str) -> None:
    """ValueError where a part does not know a value of an option."""
    if value not in known:
        raise ValueError(f"{option}: {part} takes {', '.join(known)}, got {value}")
