"""AdamW, learning-rate schedules, and optimizer steps that skip non-finite gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from videor1.config import CommonConfig


def make_optimizer(parameters: dict[str, nn.Parameter], config: CommonConfig) -> torch.optim.AdamW:
    """Return an AdamW optimizer with weight decay on matrices only, as usual (biases and norms have none).

    On a GPU it is fused: torch's default there would take temporaries of the size of all parameters.
    """
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (config.adam_beta1, config.adam_beta2)
    fused = all(parameter.is_cuda for parameter in parameters.values()) or None
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=betas, fused=fused)


def learning_rate(step: int, total_steps: int, config: CommonConfig) -> float:
    """Return the learning rate of step ``step``, counted from 0.

    It warms up linearly, then stays constant or decays to 0 at the end, linearly or along a cosine.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    span = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[
        config.lr_scheduler_type
    ]
    return config.learning_rate * factor


def guarded_step(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], rate: float, max_grad_norm: float
) -> tuple[float, bool]:
    """Clip the gradients and step the optimizer, unless a gradient is not finite; then free the gradients.

    A parameter without a gradient is stepped with a gradient of 0. Otherwise groups that are left out of the rows
    because their gradient is 0 would change AdamW's step.

    Returns:
        (gradient norm before clipping, whether it was finite). If it was not, no weight has changed.
    """
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
    finite = bool(torch.isfinite(norm))
    if finite:
        nn.utils.clip_grads_with_norm_(parameters.values(), max_grad_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm), finite


def state_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named ``<parameter>/<field>``, for safetensors."""
    tensors = {}
    for name, parameter in parameters.items():
        for field, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{field}"] = value.detach().clone() if value.ndim == 0 else value.detach()
    return tensors


def load_state_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Load what :func:`state_tensors` returned. A parameter without entries has not been stepped yet.

    Raises:
        ValueError: an entry is of a parameter that is not trained.
    """
    unknown = {key.rpartition("/")[0] for key in tensors} - set(parameters)
    if unknown:
        raise ValueError(f"optimizer state of parameters that are not trained here: {sorted(unknown)[:5]}")
    fused = bool(optimizer.param_groups[0]["fused"])
    for name, parameter in parameters.items():
        fields = {key.rpartition("/")[2]: t for key, t in tensors.items() if key.rpartition("/")[0] == name}
        if fields:
            # AdamW keeps its step counter on the CPU, unless it is fused.
            optimizer.state[parameter] = {
                field: t.clone() if t.ndim == 0 and not fused else t.to(parameter.device, copy=True)
                for field, t in fields.items()
            }
