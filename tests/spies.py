"""Functions that a test looks into, or puts something around."""

from collections.abc import Callable
from typing import Any

import pytest


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """From now on a call of the function is ``around(function, *arguments, **keywords)``."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments, **keywords: around(original, *arguments, **keywords))


def spy(patch: pytest.MonkeyPatch, owner: Any, name: str, note: Callable[..., Any]) -> list[Any]:
    """``note(result, *arguments, **keywords)`` of every call of the function from now on."""
    noted: list[Any] = []

    def around(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        result = original(*arguments, **keywords)
        noted.append(note(result, *arguments, **keywords))
        return result

    wrap(patch, owner, name, around)
    return noted
