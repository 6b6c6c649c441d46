"""The sizes that are measured, and random inputs of those sizes. N tokens, H hidden, V vocabulary, S completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TEMPERATURE = 1.0
LOGIT_STD = 4.0  # entropy of about 4 nats at V = 152064: peaked, as a trained model's distributions are
GENERATION_CHUNK = 1024


@dataclass(frozen=True)
class Size:
    """One call of an operation that starts at, or just behind, the linear head."""

    head: str
    tokens: int  # N: completions of equal length end to end, so that padded implementations have nothing to pad
    hidden: int  # H
    vocab: int  # V
    completion: int  # tokens of one completion
    dtype: torch.dtype

    @property
    def completions(self) -> int:
        return self.tokens // self.completion

    def described(self) -> dict[str, Any]:
        """As the table and the JSON file name it."""
        letters = {"N": self.tokens, "H": self.hidden, "V": self.vocab, "completion": self.completion}
        return {"head": self.head, **letters, "dtype": str(self.dtype).removeprefix("torch.")}


def qwen_7b(tokens: int) -> Size:
    """The head of Qwen2.5-VL-7B."""
    return Size("7B", tokens, 3584, 152064, 512, torch.bfloat16)


def qwen_3b(tokens: int) -> Size:
    """The head of Qwen2.5-VL-3B."""
    return Size("3B", tokens, 2048, 151936, 512, torch.bfloat16)


def small(tokens: int = 512) -> Size:
    """For a CPU: milliseconds a call."""
    return Size("small", tokens, 256, 8192, 64, torch.float32)


def tokens(count: int) -> Size:
    """For the loss alone: log-probabilities from a head of two entries serve as well as any."""
    return Size("none", count, 1, 2, 512, torch.float32)


def cpu_bar(dtype: torch.dtype) -> Size:
    """Where a CPU must be as fast as plain torch, in a tenth of its memory: seconds a call."""
    return Size("cpu bar", 4096, 1024, 32768, 512, dtype)


@dataclass(frozen=True)
class HeadInputs:
    """Inputs of the operations on hidden states. ``hidden`` and ``weight`` require gradients."""

    size: Size
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N], drawn from the model's own distribution
    advantages: Tensor  # [S]
    cu_seqlens: Tensor  # [S+1]
    old_logp: Tensor  # [N]
    ref_logp: Tensor | None  # [N]; None: beta is 0
    beta: float

    @property
    def rows(self) -> tuple[int, int]:
        """The shape [S, L] of the tokens as rows of completions."""
        return self.size.completions, self.size.completion


@dataclass(frozen=True)
class LogitInputs:
    """Inputs of the operations on logits."""

    head: HeadInputs
    logits: Tensor  # [N, V], requires a gradient


def head_inputs(size: Size, device: torch.device, *, beta: float = 0.04, zero_completions: int = 0) -> HeadInputs:
    """Random inputs. The first ``zero_completions`` of the shuffled completions have an advantage of exactly 0.

    The log-ratios to the old policy stay away from the clip bounds 0.8 and 1.2: an implementation whose log-probs carry
    bf16 rounding then clips the same tokens, and its gradients can be compared.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    hidden = normal(size.tokens, size.hidden).to(size.dtype)
    weight = normal(size.vocab, size.hidden).mul_(LOGIT_STD / size.hidden**0.5).to(size.dtype)
    labels = torch.empty(size.tokens, dtype=torch.int64, device=device)
    logp = torch.empty(size.tokens, device=device)
    for rows in torch.arange(size.tokens, device=device).split(GENERATION_CHUNK):
        scores = (hidden[rows] @ weight.T).float().log_softmax(-1)
        waits = torch.empty_like(scores).exponential_(generator=generator)  # exponential race: argmax p / wait
        labels[rows] = (scores - waits.log_()).argmax(-1)
        logp[rows] = scores.gather(1, labels[rows, None])[:, 0]
    uniform = torch.rand(size.tokens, generator=generator, device=device)
    ratio = torch.where(uniform < 0.05, 0.4 * (uniform * 20).round().mul(2).sub(1), (uniform - 0.525) * 0.3)
    advantages = normal(size.completions)
    advantages[torch.randperm(size.completions, generator=generator, device=device)[:zero_completions]] = 0.0
    return HeadInputs(
        size,
        hidden.requires_grad_(),
        weight.requires_grad_(),
        labels,
        advantages,
        torch.arange(size.completions + 1, device=device, dtype=torch.int32) * size.completion,
        logp - ratio,
        logp + 0.2 * normal(size.tokens) if beta > 0 else None,
        beta,
    )


def logit_inputs(size: Size, device: torch.device) -> LogitInputs:
    head = head_inputs(size, device)
    with torch.no_grad():
        logits = head.hidden @ head.weight.T
    return LogitInputs(head, logits.requires_grad_())
