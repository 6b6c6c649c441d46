"""Shared prompts computed once, in a transformers model as it comes: ``attn_implementation="videor1_prefix"``.

    pip install -e . && python examples/transformers_prefix.py

Two prompts with several completions each lie in one packed row, [prompt | completion 1 | ... | completion G] twice,
where the usual way repeats the prompt in every row of a padded batch. Log-probabilities and gradients are the same to
rounding. No class is patched: the attention is registered with transformers, and the layout of the row reaches it as a
keyword argument of the forward pass. A few seconds on a CPU.

With Qwen2.5-VL it is the language model that gets this attention (``model.model.language_model``), and positions are
``PrefixLayout.text_positions``; ``videor1/model/lm.py`` does it.
"""

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from videor1_kernels import PrefixLayout, last_backend, linear_logprob
from videor1_kernels.integrations.transformers import PackedRow, register

VOCABULARY = 64
PROMPT_LENGTHS = [120, 90]
COMPLETION_LENGTHS = [[12, 30, 7, 21], [9, 25, 16]]


def make_model(attention: str) -> Qwen2ForCausalLM:
    """A tiny decoder, the same weights each time; yours: ``from_pretrained(..., attn_implementation=attention)``."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config)


def packed_logp(model: Qwen2ForCausalLM, prompts: list[Tensor], completions: list[list[Tensor]]) -> tuple[Tensor, int]:
    """Log-probabilities of all completion tokens, end to end, and the tokens that were computed."""
    lengths = [len(prompt) for prompt in prompts], [[len(c) for c in group] for group in completions]
    layout = PrefixLayout(*lengths)
    ids, positions = [], []
    for prompt, group in zip(prompts, completions, strict=True):
        ids += [prompt, *group]
        # Every completion counts on from the end of its own prompt.
        positions += [torch.arange(len(prompt)), *(len(prompt) + torch.arange(len(c)) for c in group)]
    hidden = model.model(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions)[None],
        use_cache=False,
        videor1_context=PackedRow(layout),
    ).last_hidden_state[0]
    labels = torch.cat(ids)[layout.completion_index]
    # A prompt's last hidden state predicts the first token of each of its completions: it is picked once for each.
    logp, _ = linear_logprob(hidden[layout.predict_index], model.lm_head.weight, labels)
    return logp, layout.total_tokens


def repeated_logp(
    model: Qwen2ForCausalLM, prompts: list[Tensor], completions: list[list[Tensor]]
) -> tuple[Tensor, int]:
    """The same from a padded batch with the prompt in every row."""
    pairs = [(prompt, c) for prompt, group in zip(prompts, completions, strict=True) for c in group]
    rows = [(len(prompt), torch.cat([prompt, completion])) for prompt, completion in pairs]
    batch = torch.nn.utils.rnn.pad_sequence([row for _, row in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for _, row in rows], batch_first=True)
    logp = model(batch, attention_mask=mask).logits.log_softmax(-1)
    picked = [
        logp[i, start - 1 : len(row) - 1].gather(1, row[start:, None])[:, 0] for i, (start, row) in enumerate(rows)
    ]
    return torch.cat(picked), batch.numel()


def main() -> tuple[float, float, float]:
    """Print and return: the largest difference of a log-probability, of a gradient, and the factor in tokens."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCABULARY, (n,), generator=generator) for n in PROMPT_LENGTHS]
    completions = [
        [torch.randint(VOCABULARY, (n,), generator=generator) for n in group] for group in COMPLETION_LENGTHS
    ]

    packed, plain = make_model(register()), make_model("sdpa")
    ours, tokens = packed_logp(packed, prompts, completions)
    theirs, repeated = repeated_logp(plain, prompts, completions)
    ours.mean().backward()
    theirs.mean().backward()

    logp = float((ours - theirs).detach().abs().max())
    pairs = zip(packed.parameters(), plain.parameters(), strict=True)
    gradient = max(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs if b.grad.norm() > 1e-6)
    print(f"attention {packed.config._attn_implementation} on the backend {last_backend('prefix_attention')}")
    print(
        f"tokens: {tokens} in one packed row, {repeated} in {sum(map(len, completions))} repeated rows "
        f"({repeated / tokens:.1f} times as many)"
    )
    print(f"{len(ours)} log-probabilities: largest difference {logp:.1e} nats; gradients: {gradient:.1e} relative")
    return logp, gradient, repeated / tokens


if __name__ == "__main__":
    main()
