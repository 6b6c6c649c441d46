"""TRL's ``GRPOTrainer`` on the kernels of videor1_kernels: one line more.

    pip install -e . "trl>=1.16,<1.17" && python examples/trl_grpo.py

``use()`` puts ``linear_logprob`` under the head that TRL takes log-probabilities and entropies from; nothing else of
the training script changes. The model is tiny and random and the data are made here, so it needs no download: the
reward is the share of "yes" among the words of an answer, and it rises. 15 seconds on a CPU; on a GPU the same script
takes the Triton kernels.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from videor1_kernels import last_backend
from videor1_kernels.integrations.trl import use

WORDS = ["<pad>", "<end>", "yes", "no", "maybe", "is", "it", "red", "blue", "first", "last", "?"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def make_model() -> Qwen2ForCausalLM:
    """A decoder of 0.1 M random parameters."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return Qwen2ForCausalLM(config)


def share_of_yes(completions: list[str], **_: object) -> list[float]:
    """The reward: 1 where every word is "yes"."""
    return [text.split().count("yes") / max(1, len(text.split())) for text in completions]


def main(steps: int = 16) -> tuple[list[float], str | None]:
    """Train, print, and return the mean reward of each step and the backend that took the log-probabilities."""
    prompts = [f"is it {word} {when} ?" for word in ("red", "blue") for when in ("first", "last")]
    with tempfile.TemporaryDirectory() as folder, use():  # the one line: inside the block TRL runs on our kernels
        trainer = GRPOTrainer(
            model=make_model(),
            processing_class=make_tokenizer(),
            reward_funcs=share_of_yes,
            train_dataset=Dataset.from_dict({"prompt": prompts * 8}),
            args=GRPOConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=32,
                num_generations=8,
                max_completion_length=8,
                learning_rate=5e-3,
                lr_scheduler_type="constant",
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                bf16=torch.cuda.is_available(),
                seed=0,
            ),
        )
        trainer.remove_callback(PrinterCallback)  # this script prints a summary of its own
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    backend = last_backend("linear_logprob")
    print(f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f} in {len(rewards)} steps of trl.GRPOTrainer")
    print(f"log-probabilities by videor1_kernels.linear_logprob, backend {backend}")
    return rewards, backend


if __name__ == "__main__":
    main()
