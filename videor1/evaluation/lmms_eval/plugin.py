"""What lmms-eval loads at every start, through the entry point group ``lmms_eval.models``: kept light."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def manifest() -> Any:
    """The manifest of the model ``videor1``."""
    return import_module("lmms_eval.models.registry_v2").ModelManifest(
        model_id="videor1", chat_class_path="videor1.evaluation.lmms_eval.model.VideoR1"
    )
