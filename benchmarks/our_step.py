"""A T-GRPO step of the trainer as it is, watched phase by phase."""

from __future__ import annotations

import contextlib
from unittest import mock

from benchmarks.phases import Phases
from benchmarks.whole_inputs import WholeInputs
from videor1.model import VideoLM
from videor1.model.cpu_layers import use_cpu_layers
from videor1.model.cpu_linear import use_onednn
from videor1.rollout import Rollout
from videor1.rollout.local.engine import Run
from videor1.training import tgrpo
from videor1.training.tgrpo import Trainer
from videor1.types import Prompt


class OurStep(Trainer):
    """Call it for an optimizer step. Frames are decoded ahead by worker processes, as in every run: ``decode`` is the
    time waited for them, and what they take of the processor slows the other phases."""

    def __init__(self, inputs: WholeInputs, phases: Phases) -> None:
        self.inputs, self.phases = inputs, phases
        super().__init__(inputs.config)
        self.last: Rollout | None = None
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self._open())
        watch = phases.watch
        watch(self.source, "take", "decode")
        watch(self, "rollout", "rollout")
        watch(self.model, "vision_features", "prefill", inside="rollout")
        watch(self, "_reference_logps", "reference")
        watch(self, "optimizer_step", "policy")
        watch(self.optimizer, "step", "optimizer")
        for owner, name, phase in ((Run, "_prefill", "prefill"), (tgrpo, "score_groups", "rewards")):
            self._stack.enter_context(mock.patch.object(owner, name, getattr(owner, name)))  # put back at the end
            watch(owner, name, phase)

    def make_model(self) -> VideoLM:
        model = self.inputs.make_model()
        use_onednn(model.hf)  # as load_model does
        use_cpu_layers(model.hf, model.family)
        return model

    def rollout(self, prompts):
        self.last, features = super().rollout(prompts)
        return self.last, features

    def __call__(self) -> None:
        self.train_batch()

    def lengths(self) -> list[int]:
        """Tokens of every completion of the last step."""
        assert self.last is not None
        return [len(a.token_ids) for group in self.last.groups if group for a in (*group.ordered, *group.shuffled)]

    def first_prompt(self) -> Prompt:
        """The first prompt of the last step."""
        assert self.last is not None
        return next(group.prompt for group in self.last.groups if group)

    def close(self) -> None:
        self._stack.close()
