"""verl: its ``linear_cross_entropy`` and its ``FusedLinearForPPO``.

    from videor1_kernels.integrations.verl import use

    use()           # takes effect where use_fused_kernels is set, with any of its backends (torch, triton, liger)

Written against verl 0.9.1 (``verl/utils/kernel/linear_cross_entropy.py`` and
``verl/utils/experimental/torch_functional.py``).
"""

from __future__ import annotations

import functools
from contextlib import ExitStack

import torch
from torch import Tensor

import videor1_kernels
from videor1_kernels.checks import check_choice
from videor1_kernels.integrations.host import Replacement, replace, with_backend

__all__ = ["FusedLinearForPPO", "linear_cross_entropy", "use"]

REDUCTIONS = ("none", "sum", "mean")


def use(*, backend: str = "auto") -> ExitStack:
    """Put this library's ``linear_cross_entropy`` and ``FusedLinearForPPO`` into verl, for the rest of the process or
    for a ``with`` block.

    Args:
        backend: the kernels' backend: ``auto``, ``triton``, ``reference``. verl's own choice of a backend has no effect
            on it.

    Returns:
        An ``ExitStack``. When it is closed or its ``with`` block ends, verl has its own back.

    Raises:
        ImportError: verl is not installed, or its version keeps the names elsewhere or with other parameters.

    Source:
        This library; the names and arguments replaced are verl's (https://github.com/volcengine/verl).
    """
    function = functools.partial(linear_cross_entropy, backend=backend)
    module = with_backend(FusedLinearForPPO, backend)
    replacements = [
        Replacement("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", function),
        Replacement("verl.utils.experimental.torch_functional", "FusedLinearForPPO", module),
    ]
    return replace("verl", ["verl"], replacements)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: torch.distributed.ProcessGroup | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label (despite the name: not its negative) and entropy, in nats.

    Args:
        hidden: [..., H].
        weight: [V, H], or this rank's slice of V / n rows.
        labels: int64 or int32 [...], N in all, in [0, V); -100: both results are 0.
        temperature: above 0; a number, or one per row as a tensor [...].
        reduction: of the log-probability over the N tokens: "none", "sum" or "mean".
        dist_process_group: None, or the tensor-parallel group of n processes whose slices are the vocabulary.

    Returns:
        (logp, entropy): [N] flat whatever the shape of ``labels``, as in verl, or a scalar ``logp`` where it is
        reduced; entropy is always [N]. fp32, differentiable into ``hidden`` and ``weight``.

    Raises:
        ValueError: what :func:`videor1_kernels.linear_logprob` refuses.
    """
    op = "linear_cross_entropy"
    check_choice(op, "reduction", reduction.lower(), REDUCTIONS)
    shard = None
    if dist_process_group is not None and torch.distributed.get_world_size(dist_process_group) > 1:
        # verl's slices are of one size, and its labels those of the whole vocabulary.
        shard = torch.distributed.get_rank(dist_process_group) * len(weight), dist_process_group
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.reshape(-1)
    logp, entropy = videor1_kernels.linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        _int64(labels).reshape(-1),
        temperature=temperature,
        vocab_shard=shard,
        backend=backend,
    )
    if reduction.lower() != "none":
        logp = logp.sum() if reduction.lower() == "sum" else logp.mean()
    return logp, entropy


class FusedLinearForPPO(torch.nn.Module):
    """verl's module; ``chunk_size`` and ``impl_backend`` choose among its own implementations and have no effect."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch", *, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(logp, entropy) of ``input_ids`` [...], in nats, shaped as they are; both fp32.

        verl's torch implementation returns the entropy in the dtype of ``hidden_states``.
        """
        return videor1_kernels.linear_logprob(
            hidden_states, vocab_weights, _int64(input_ids), temperature=temperature, backend=self.backend
        )


def _int64(labels: Tensor) -> Tensor:
    return labels.long() if labels.dtype == torch.int32 else labels
