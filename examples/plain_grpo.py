"""GRPO in one plain loop: a transformers model, torch, and three calls of videor1_kernels. No trainer.

    pip install -e . && python examples/plain_grpo.py

A tiny language model with random weights is shown a word and learns to repeat it until it ends its answer. A step
samples G answers to each prompt, scores them, turns the scores into advantages within each group, and takes the loss
from hidden states: the logits of the answers are never whole in memory. 10 seconds on a CPU; on a GPU the same code
takes the Triton kernels.
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from videor1_kernels import last_backend, linear_grpo_loss, tgrpo_advantages

VOCABULARY, END, PROMPTS, GROUP, LENGTH = 16, 0, 16, 8, 6


def main(steps: int = 60, device: str = "cuda" if torch.cuda.is_available() else "cpu") -> list[float]:
    """Train, print, and return the mean reward of each step."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, eos_token_id=END, pad_token_id=END)  # fmt: skip
    model = Qwen2ForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rewards = []
    for step in range(steps):
        prompts = torch.randint(1, VOCABULARY, (PROMPTS, 1), device=device).repeat_interleave(GROUP, 0)  # [P * G, 1]
        rows = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=LENGTH)
        answers = rows[:, prompts.shape[1] :]
        ended = (answers == END).cumsum(1)
        mask = (ended == 0) | ((ended == 1) & (answers == END))  # up to the end token, that one included
        lengths = mask.sum(1)

        accuracy = (((answers == prompts) & mask).sum(1) / LENGTH).view(PROMPTS, GROUP)  # how often the word is there
        format = torch.zeros_like(accuracy)  # no other reward here
        advantages = tgrpo_advantages(accuracy, format, lengths.view_as(accuracy), length_bonus=0).advantages

        hidden = model.model(rows).last_hidden_state[:, prompts.shape[1] - 1 : -1]  # position t predicts token t + 1
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        result = linear_grpo_loss(hidden[mask], model.lm_head.weight, answers[mask],
                                  advantages.flatten(), cu_seqlens, beta=0.0)  # fmt: skip
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        rewards.append(float(accuracy.mean()))
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3}  reward {rewards[-1]:.3f}  entropy {float(result.entropy.mean()):.2f} nats")
    print(f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f}; loss on the backend {last_backend('linear_grpo_loss')}")
    return rewards


if __name__ == "__main__":
    main()
