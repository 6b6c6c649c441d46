"""Supervised fine-tuning (SFT): cross-entropy on the assistant's tokens only, with samples packed into rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from videor1.config import SFTConfig
from videor1.data import Dataset
from videor1.data.source import Source
from videor1.data.stream import RowStream, open_dataset
from videor1.errors import ConfigError
from videor1.model.packing import LEAST_TRAINED_TOKENS, even_batches
from videor1.model.prompts import build_sft_ids
from videor1.training.loop import Loop
from videor1.training.passes import pack, sft_loss
from videor1.types import Prompt, PromptMedia, Sample


@dataclass(frozen=True)
class Example:
    """A prompt and the target text to learn."""

    prompt: Prompt
    answer: Tensor  # int64 [C], EOS included
    earlier: Tensor  # int64: positions in the prompt of what the assistant wrote before, which is learned too

    @property
    def targets(self) -> int:
        """The number of tokens to learn."""
        return len(self.answer) + len(self.earlier)

    def __len__(self) -> int:
        return len(self.prompt.input_ids) + len(self.answer)


class SFTTrainer(Loop[SFTConfig]):
    """The SFT trainer; ``SFTTrainer(config).train()`` runs it.

    The loss is the cross-entropy on the assistant's tokens, those of all its turns. Several samples are packed into one
    row, in which none attends to another.
    """

    name = "sft"

    def __init__(self, config: SFTConfig) -> None:
        if config.stop_at_accuracy is not None and not (config.data.eval_path and config.eval_steps):
            raise ConfigError("stop_at_accuracy: needs data.eval_path and eval_steps above 0")
        super().__init__(config)

    def _load_dataset(self, path: str | None) -> Dataset | RowStream:
        if not path:
            raise ConfigError("dataset_name: expected a data file in the Video-R1-CoT JSON format, got nothing")
        # A solution is a text to learn here: whether a completion could earn a reward for it does not matter.
        return open_dataset(path, self.config.data, require_process=True, reward=None)

    def samples_per_step(self) -> float:
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps

    def make_source(self, start: int) -> Source[Example]:
        def build(sample: Sample, media: PromptMedia, draw: int) -> Example:
            ids, mask = build_sft_ids(
                self.model.tokenizer,
                sample,
                media,
                self.config.max_length,
                max_prompt_length=self.config.max_prompt_length,
                family=self.model.family,
                opened=self.model.opened_text,
            )
            length = int((~mask).nonzero()[-1]) + 1  # The answer is what follows the last token that is not learned.
            return Example(Prompt(sample, ids[:length], media, draw), ids[length:], mask[:length].nonzero()[:, 0])

        return self.source_of(build, start)

    def train_batch(self) -> None:
        config = self.config
        started = time.perf_counter()
        micro = [
            self.source.take(config.per_device_train_batch_size) for _ in range(config.gradient_accumulation_steps)
        ]
        device = self.model.device
        rows = [
            row
            for examples in micro
            for row in even_batches(examples, len, config.max_length, device, least=LEAST_TRAINED_TOKENS)
        ]
        waited = time.perf_counter() - started
        own_target_tokens = sum(example.targets for row in rows for example in row)
        own_tokens = sum(len(example) for row in rows for example in row)
        gathered = self.ranks.gather((own_target_tokens, own_tokens))
        target_tokens, num_tokens = map(sum, zip(*gathered, strict=True))

        def loss_of(row: Sequence[Example]) -> Tensor:
            packed = pack(self.model, [e.prompt for e in row], [[e.answer] for e in row], [e.earlier for e in row])
            loss = sft_loss(self.model, packed, target_tokens, self.config.kernels)
            return loss if any(e.prompt.media for e in row) else loss + self.dummy_tower_loss()

        def metrics() -> dict[str, Any]:
            return {
                "num_tokens": num_tokens,
                "time/data": waited,
                "time/tokens_per_second": num_tokens / (time.perf_counter() - started),
            }

        self.optimizer_step([partial(loss_of, row) for row in rows], metrics, dummy_loss=self.dummy_loss)

    def title(self) -> str:
        goal = self.config.stop_at_accuracy
        return self.name if goal is None else f"{self.name} until accuracy {goal:g}"

    def finished(self) -> bool:
        """Return whether the held-out accuracy has reached ``stop_at_accuracy``."""
        return self.config.stop_at_accuracy is not None and self.accuracy >= self.config.stop_at_accuracy

    def progress_values(self, row: dict[str, Any]) -> dict[str, float | None]:
        labels = {"loss": row["loss"], "tokens/s": row.get("time/tokens_per_second")}
        return labels if self.eval_set is None else labels | {"accuracy": self.accuracy}
