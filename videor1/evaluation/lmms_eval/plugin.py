"""The entry point in the group ``lmms_eval.models``; it imports little, since lmms-eval loads it at every start."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def manifest() -> Any:
    """Return the manifest of the model ``videor1``."""
    return import_module("lmms_eval.models.registry_v2").ModelManifest(
        model_id="videor1", chat_class_path="videor1.evaluation.lmms_eval.model.VideoR1"
    )
