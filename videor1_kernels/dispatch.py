"""Which implementation runs. ``auto`` may choose; an explicit backend is that one or an error, never another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from videor1_kernels.checks import check_choice

BACKENDS = ("auto", "reference", "triton", "native")


@dataclass(frozen=True)
class Implementation:
    """One backend of one operation."""

    backend: str
    call: Callable[..., Any]
    unavailable: Callable[[torch.device], str | None]  # why it cannot run on this device; None: it can


_registry: dict[str, list[Implementation]] = {}
_last: dict[str, str] = {}


def register(
    op: str,
    backend: str,
    call: Callable[..., Any],
    *,
    unavailable: Callable[[torch.device], str | None] = lambda device: None,
) -> None:
    """Add an implementation of ``op``. ``auto`` takes the first registered that can run: register the fastest first."""
    check_choice("register", "backend", backend, BACKENDS[1:])
    implementations = _registry.setdefault(op, [])
    if any(known.backend == backend for known in implementations):
        raise ValueError(f"register: {op} has a {backend!r} backend already")
    implementations.append(Implementation(backend, call, unavailable))


def resolve(op: str, backend: str, device: torch.device | str) -> Callable[..., Any]:
    """The implementation of ``op`` that ``backend`` names on ``device``; remembered for :func:`last_backend`.

    Raises ValueError, saying what can run and why the rest cannot, for an unknown or unavailable backend.
    """
    chosen = _choose(op, backend, torch.device(device))
    _last[op] = chosen.backend
    return chosen.call


def chosen_backend(op: str, device: torch.device | str = "cpu", backend: str = "auto") -> str:
    """The name of the backend that a call of ``op`` on ``device`` takes."""
    return _choose(op, backend, torch.device(device)).backend


def last_backend(op: str) -> str | None:
    """The name of the backend that the last call of ``op`` in this process took; None before the first."""
    _implementations(op)
    return _last.get(op)


def backends(op: str, device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every backend of ``op`` in this version: name -> None if it can run on ``device``, else the reason it cannot."""
    return {known.backend: known.unavailable(torch.device(device)) for known in _implementations(op)}


def _implementations(op: str) -> list[Implementation]:
    if op not in _registry:
        raise ValueError(f"expected the name of an operation ({', '.join(sorted(_registry))}), got {op!r}")
    return _registry[op]


def _choose(op: str, backend: str, device: torch.device) -> Implementation:
    known = _implementations(op)
    check_choice(op, "backend", backend, BACKENDS)
    for implementation in known:
        if backend in ("auto", implementation.backend) and implementation.unavailable(device) is None:
            return implementation
    reasons = {entry.backend: entry.unavailable(device) for entry in known}
    usable = ", ".join(repr(name) for name, reason in reasons.items() if reason is None) or "none"
    why = reasons.get(backend) or f"this version of videor1_kernels has no {backend} implementation of it"
    raise ValueError(f"{op}: backend {backend!r} cannot run on {device}: {why}; usable here: 'auto', {usable}")
