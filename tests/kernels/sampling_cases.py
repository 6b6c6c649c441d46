"""What sample_tokens is tested with: a backend, its fp64 oracle, logits that are hard for it, and the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton_cases import CUDA, DEVICE

from videor1_kernels import last_backend, sample_tokens
from videor1_kernels.sampling import triton
from videor1_kernels.testing import poisoned_memory

MARGIN = 1e-6  # of cumulative probability: how far rounding may move an end
NEAR = 3e-7  # of top_p: where rounding may decide whether a sum has reached it
ALMOST_ONE = 1 - 2.0**-24  # the largest fp32 number below 1
SETTINGS = [
    {},
    {"temperature": 0.4},
    {"temperature": 2.5},
    {"temperature": 0.0},
    {"top_p": 0.6},
    {"top_p": 0.95, "temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 40, "temperature": 0.5},
    {"top_k": 5, "top_p": 0.7},
    {"top_k": 33, "top_p": 0.99, "temperature": 3.0},
    {"top_k": 10_000, "top_p": 0.5},
    {"top_p": 1e-9},
    {"top_p": 1e-30, "top_k": 7},
]
KINDS = [{"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 45, "top_p": 0.97}]
EDGES = (0.0, 1e-12, 0.5, ALMOST_ONE)  # uniform numbers of interest


class Sampler:
    """One backend of sample_tokens, in memory that held NaN; takes and returns CPU tensors."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.interpreted = backend == "triton" and not CUDA  # as slow as a row of it is

    def __call__(
        self, logits: Tensor, uniform: Tensor, banned: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        device = DEVICE if self.backend == "triton" else "cpu"
        banned = None if banned is None else banned.to(device)
        with poisoned_memory():
            tokens, logp = sample_tokens(
                logits.to(device), uniform.to(device), banned=banned, backend=self.backend, **options
            )
        assert last_backend("sample_tokens") == self.backend
        assert logp.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
        return tokens.cpu(), logp.cpu()


def set_tile(monkeypatch: Any, segments: int = 4, columns: int = 8) -> None:
    """By default a tile of 32 tokens; so many candidates are listed, and if there are more, bounds are bisected."""
    if not CUDA:  # small ones are no layout for 16 warps
        monkeypatch.setattr(triton, "SEGMENTS", segments)
        monkeypatch.setattr(triton, "COLUMNS", columns)


@dataclass(frozen=True)
class Oracle:
    """The distribution that a row is drawn from."""

    probabilities: Tensor  # fp64 [V]; 0: never drawn
    logp: Tensor  # fp64 [V]: of the whole distribution
    doubtful: Tensor  # fp64 [V]: of the tokens at which the sum is within rounding of top_p: kept or not

    @property
    def ends(self) -> Tensor:
        return self.probabilities.cumsum(0)

    @property
    def clear(self) -> bool:
        """Whether it matters little which of them are kept."""
        return self.doubtful.sum().item() < MARGIN

    def accepts(self, token: int, uniform: float) -> bool:
        """Whether ``token`` may be drawn, and holds ``uniform`` up to rounding."""
        end = self.ends[token].item()
        share = self.probabilities[token].item()
        margin = MARGIN + self.doubtful.sum().item()
        possible = share > 0 or self.doubtful[token].item() > 0
        return possible and end - share - margin <= uniform < end + margin

    def token(self, uniform: float) -> int | None:
        """The token that ``uniform`` draws; None where it is too near to an end to tell."""
        if ((self.ends - uniform).abs() < MARGIN).any():
            return None
        return int((self.ends > uniform).nonzero()[0])


def without_distribution(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows [5, 50] with NaN, with +inf or with nothing finite, and ids that are banned."""
    bad = torch.randn(5, 50, generator=generator)
    bad[0] = torch.nan
    bad[1, 7] = torch.nan
    bad[2, 9] = torch.inf
    bad[3] = -torch.inf
    bad[4, 0] = torch.nan  # banned
    return bad, torch.tensor([0, 1, 49])


def oracle(
    logits: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, banned: Tensor | None = None
) -> Oracle:
    """Of one row [V], step by step: sort, cut to k, cut to the sum, renormalise."""
    z = logits.detach().cpu().double()
    forbidden = set() if banned is None else set(banned.tolist())
    scaled = (z - z.max()) / (temperature or 1.0)
    logp = scaled.log_softmax(0)
    allowed = torch.tensor([token for token in range(len(z)) if token not in forbidden])
    order = allowed[z[allowed].sort(descending=True, stable=True).indices]
    if temperature == 0:
        order = order[:1]
    if top_k:
        order = order[:top_k]
    weights = ((z[order] - z[order[0]]) / (temperature or 1.0)).exp()
    ends = weights.cumsum(0) / weights.sum()
    doubtful = torch.zeros_like(z)
    if top_p < 1:
        distance = (ends - top_p).abs()
        near = (distance < NEAR) & (distance > 1e-12)  # nearer: the same up to fp64's rounding, thus reached
        near[1:] |= near[:-1].clone()
        near[0] = False  # always kept
        doubtful[order[near]] = weights[near] / weights.sum()
        count = 1 + int((ends[:-1] < top_p * (1 - 1e-12)).sum())
        order, weights = order[:count], weights[:count]
    probabilities = torch.zeros_like(z)
    probabilities[order] = weights / weights.sum()
    return Oracle(probabilities, logp, doubtful)


def hard_logits(vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows [V] in fp32 by name. V of 8 or more."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(vocabulary, generator=generator)
    some = torch.rand(vocabulary, generator=generator)
    first, last = torch.zeros(vocabulary), torch.zeros(vocabulary)
    first[0], last[-1] = 20.0, 20.0
    return {
        "normal": normal,
        "spread": 6 * normal,
        "ties": (2 * normal).round(),
        "two values": (normal > 0).float(),
        "signed zeros": torch.where(some < 0.5, -0.0, 0.0),
        "equal": torch.full((vocabulary,), -3.7),
        "some -inf": torch.where(some < 0.5, -torch.inf, normal),
        "one finite": torch.where(torch.arange(vocabulary) == vocabulary // 2, 1.0, -torch.inf),
        "huge": 1e30 * normal,
        "largest": torch.where(some < 0.3, 3.4e38, -3.4e38),
        "tiny": 1e-40 * normal,  # denormal
        "offset": normal + 1e4,
        "first": first,
        "last": last,
    }


def check(logits: Tensor, uniform: Tensor, tokens: Tensor, logp: Tensor, **options: Any) -> int:
    """Each row of [R, V] against its oracle; returns the rows left out, those that are not clear."""
    skipped = 0
    assert tokens.dtype == torch.int64
    assert tokens.shape == logp.shape == (len(logits),)
    before = None
    for row, u, token, value in zip(logits, uniform.tolist(), tokens.tolist(), logp.tolist(), strict=True):
        if before is None or not torch.equal(row, before):
            before, want = row, oracle(row, **options)
        if not want.clear:
            skipped += 1
            continue
        assert want.accepts(token, u), (token, u, want.token(u), want.probabilities[token], options)
        exact = want.logp[token].item()
        assert abs(value - exact) <= 5e-6 + 2e-6 * abs(exact) or value == exact, (token, value, exact, options)
    return skipped
