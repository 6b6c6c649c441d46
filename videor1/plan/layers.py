"""Choose how many of the language model's layers recompute their activations: as few as the memory of a GPU allows.

Two plans tell it, of a run in which all layers recompute and of one in which none does. In between, the peak of a phase
is the largest of several sums, each of which grows evenly with every layer that keeps its activations. Such a maximum
lies nowhere above the straight line between its ends, and this line is what is planned with.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from videor1.config import TrainConfig
from videor1.config.options import DistributedConfig
from videor1.errors import ConfigError
from videor1.plan.plan import GIB, Plan, plan
from videor1.plan.setup import shape_of

MARGIN = 0.1  # part of the free memory that is left alone: for longer texts than planned, held-out evaluations, others


@dataclass(frozen=True)
class LayerPlans:
    """The plans between which the layers are chosen."""

    layers: int  # of the language model
    every: Plan  # all of them recompute
    none: Plan

    @staticmethod
    def of(config: TrainConfig, every: Plan | None = None) -> LayerPlans:
        """Those of a run; ``every``: the plan in which all layers recompute, if there is one already."""
        shape = shape_of(config.model_name_or_path, config.demo)
        layers = shape.text_config.num_hidden_layers
        none = plan(dataclasses.replace(config, checkpoint_layers=0), shape)
        return LayerPlans(layers, every or plan(dataclasses.replace(config, checkpoint_layers=layers), shape), none)

    def total(self, recomputing: int) -> int:
        """Bytes of a GPU's memory that the run takes at most, with so many layers that recompute."""
        share = recomputing / self.layers
        pairs = zip(self.none.phases, self.every.phases, strict=True)
        peak = max(none.bytes + share * (every.bytes - none.bytes) for none, every in pairs)
        return int(peak * (1 + self.every.slack)) + self.every.context

    def choose(self, free: int) -> int:
        """The least number of layers with which the run takes no more than ``free`` bytes less the margin, or all."""
        budget = free * (1 - MARGIN)
        return next((n for n in range(self.layers) if self.total(n) <= budget), self.layers)


def choose_layers(config: TrainConfig, free: int) -> tuple[int | None, str]:
    """Choose how many layers of a run recompute, the first ones, from the free bytes of its GPU.

    A plan is of one process. Of several, which ZeRO lets share gradients and optimizer states, each takes less.

    Returns:
        (the number, or None for all where no plan can be made; a sentence that says why).
    """
    try:
        plans = LayerPlans.of(dataclasses.replace(config, distributed=DistributedConfig()))
    except ConfigError as error:
        return None, f"checkpoint_layers: all layers recompute, since their memory cannot be planned: {error}"
    layers = plans.choose(free)
    why = (
        f"checkpoint_layers: {layers} of {plans.layers} layers recompute: planned are {plans.total(layers) / GIB:.1f} "
        f"GiB, of {free / GIB:.1f} that are free less {MARGIN:.0%}"
    )
    if layers:
        why += f"; one layer fewer would take {plans.total(layers - 1) / GIB:.1f}"
    return layers, why
