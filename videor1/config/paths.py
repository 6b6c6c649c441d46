"""Paths in a run's config.yaml: written so that a resume from another folder finds them, also after a move.

They are absolute, and ``output_dir`` says where the run's folder was when they were written. A config.yaml that is read
from another folder was moved or copied with it: what was inside the folder is then looked for in the new one, and what
is gone from its old place is looked for where it would be had it been moved along.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from videor1.config.ranges import is_text

# Options that hold the path of a file or folder. The first two may be something else: a hub id, a URL, several paths.
PATHS = (
    *("model_name_or_path", "dataset_name", "data.root", "data.eval_path", "data.cache_dir"),
    *("reward.judge.prompt_file", "reward.judge.cache_dir"),
)


def absolute(name: str, value: Any) -> Any:
    """Return the value of an option with its paths made absolute; anything but a path is left as it is."""
    if not isinstance(value, str) or name not in (*PATHS, "output_dir"):
        return value
    if name == "model_name_or_path" and not os.path.isdir(value):
        return value  # a hub id
    made = _each_path(name, value, lambda path: str(Path(path).absolute()))
    # In a current folder whose name is not UTF-8 a path stays relative, since no run's folder may have such a name.
    return value if name == "output_dir" and not is_text(made) else made


def relocated(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the options of a run's config.yaml with paths as they are from where the file now lies.

    Args:
        values: options by dotted name.
        folder: the folder that holds the config.yaml.
    """
    written, now = values.get("output_dir"), os.path.abspath(folder)
    if not isinstance(written, str) or os.path.abspath(written) == now:
        return values
    old = os.path.normpath(written)

    def moved(path: str) -> str:
        inside = os.path.relpath(path, old) if os.path.isabs(path) == os.path.isabs(old) else None
        if inside is None:
            return path
        candidate = os.path.normpath(os.path.join(now, inside))
        leads_out = inside.split(os.sep)[0] == os.pardir
        return candidate if _exists(candidate) and not (leads_out and _exists(path)) else path

    return values | {n: _each_path(n, values[n], moved) for n in PATHS if isinstance(values.get(n), str)}


def _each_path(name: str, value: str, change: Callable[[str], str]) -> str:
    """Apply ``change`` to each local path in the value of an option."""
    if name != "dataset_name":
        return value if value.startswith("~") or not value else change(value)
    parts = [value] if os.path.exists(value) else value.split(",")
    stripped = [part.strip() for part in parts]
    return ",".join(part if "://" in part or not part else change(part) for part in stripped)


def _exists(path: str) -> bool:
    return os.path.exists(path) or (glob.has_magic(path) and bool(glob.glob(path, recursive=True)))
