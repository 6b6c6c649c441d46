"""Named random generators. Every use of randomness has its own, so that none changes the numbers of another."""

from __future__ import annotations

import hashlib
import operator

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a seed in [0, 2**63) for the purpose that ``names`` identify: ``derive_seed(42, "permutation", draw)``.

    The result is the first 63 bits of the SHA-256 of ``seed`` and the names, each written as its type, its length in
    bytes and its decimal digits or UTF-8 text. It is therefore the same in every process and release (Python's
    ``hash`` is not), and ``("a", "b")``, ``("ab",)``, ``("1",)`` and ``(1,)`` give different seeds.
    """
    digest = hashlib.sha256()
    for name in (seed, *names):
        kind, text = ("s", name) if isinstance(name, str) else ("i", str(operator.index(name)))
        data = text.encode()
        digest.update(f"{kind}{len(data)}:".encode() + data)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a new ``torch.Generator`` on ``device``, seeded with :func:`derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *names))
