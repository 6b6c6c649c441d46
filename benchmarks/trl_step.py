"""A GRPO step of TRL's GRPOTrainer on the same model, images and sizes. It takes no videos."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessorMixin

from benchmarks.phases import Phases
from benchmarks.whole_inputs import WholeInputs
from videor1.demo.model import PROCESSOR_FILES
from videor1.model.prompts import question_text
from videor1.rewards import score
from videor1.training.optim import guarded_step, make_optimizer


def missing(device: torch.device) -> str | None:
    return None if importlib.util.find_spec("trl") else "trl is not installed"


class _ImageProcessor(Qwen2_5_VLProcessor):
    """Without the part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=tokenizer.chat_template)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class TRLStep:
    """Call it for an optimizer step: TRL's own batches, generation, scoring and ``training_step``, with the completions
    of one prompt in a micro-batch; then the update that the other ways make. Its phase ``reference`` also holds its
    image processing, its phase ``rollout`` the prefill."""

    def __init__(self, inputs: WholeInputs, phases: Phases) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        self.inputs, self.phases, config, setting = inputs, phases, inputs.config, inputs.setting
        self.model = inputs.make_model()
        self.model.hf.model.language_model.set_attn_implementation("sdpa")
        tokenizer = self.model.tokenizer
        folder = inputs.folder / "trl-model"
        if self.model.peft is None:  # TRL loads the reference model from the folder that the model names
            self.model.hf.save_pretrained(folder)
            self.model.hf.config._name_or_path = str(folder)
        folder.mkdir(exist_ok=True)
        processor = PROCESSOR_FILES["preprocessor_config.json"] | {
            "min_pixels": config.video.image_min_pixels,
            "max_pixels": config.video.image_max_pixels,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        banned = {*self.model.special.vision, tokenizer.eos_token_id, tokenizer.pad_token_id}
        arguments = GRPOConfig(
            output_dir=str(inputs.folder / "trl"),
            report_to=[],
            use_cpu=inputs.device.type == "cpu",
            bf16=setting.bf16,
            per_device_train_batch_size=setting.generations,
            gradient_accumulation_steps=setting.prompts,
            num_generations=setting.generations,
            max_completion_length=setting.completion,
            beta=config.beta,
            loss_type="grpo",
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            gradient_checkpointing=setting.checkpointing,
            generation_kwargs={"min_new_tokens": setting.completion, "suppress_tokens": sorted(banned - {None})},
        )
        rows = [
            {"prompt": [{"role": "user", "content": question_text(sample)}], "image": str(sample.path), "number": i}
            for i, sample in enumerate(inputs.samples)
        ]
        dataset = Dataset.from_list(rows).with_transform(_opened)
        self._lengths: list[int] = []
        self.trainer: Any = GRPOTrainer(
            model=self.model.peft or self.model.hf,
            reward_funcs=self._reward,
            args=arguments,
            train_dataset=dataset,
            processing_class=_ImageProcessor(
                AutoImageProcessor.from_pretrained(folder, trust_remote_code=False), tokenizer
            ),
        )
        self.trainer.current_gradient_accumulation_steps = setting.prompts
        self.optimizer = make_optimizer(self.model.trainable(), config)
        self.frozen = None if self.trainer.ref_model is None else _Named(self.trainer.ref_model)
        self._batches = self._endless()
        phases.watch(self.trainer, "_generate_and_score_completions", "reference")
        phases.watch(self.trainer, "_generate", "rollout")
        phases.watch(self.trainer, "_calculate_rewards", "rewards")
        phases.watch(self.trainer, "training_step", "policy")

    def __call__(self) -> None:
        self._lengths.clear()
        for _ in range(self.inputs.setting.prompts):
            with self.phases("decode"):
                batch = next(self._batches)
            self.trainer.training_step(self.trainer.model, batch, None)
        with self.phases("optimizer"):
            guarded_step(
                self.optimizer,
                self.model.trainable(),
                self.inputs.config.learning_rate,
                self.inputs.config.max_grad_norm,
            )

    def lengths(self) -> list[int]:
        """Tokens of every completion of the last step."""
        return list(self._lengths)

    def close(self) -> None:
        """Nothing is open."""

    def _endless(self) -> Any:
        while True:
            yield from self.trainer.get_train_dataloader()

    def _reward(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], number: Sequence[int], **_: Any
    ) -> list[float]:
        self._lengths += [len(ids) for ids in completion_ids]
        texts = [completion[0]["content"] for completion in completions]
        accuracy, form = score(texts, [self.inputs.samples[i] for i in number], self.inputs.config.reward)
        return [a + b for a, b in zip(accuracy, form, strict=True)]


class _Named:
    """A reference model under the name that the other ways give it."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf


def _opened(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    if "image" in rows:
        rows["image"] = [Image.open(path).convert("RGB") for path in rows["image"]]
    return rows
