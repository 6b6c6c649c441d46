"""What a T-GRPO step must cost at least on a device, phase by phase: floating-point operations at the rate of a large
matrix product, and bytes at the rate of a large copy, both measured in the same run; whichever takes longer."""

from __future__ import annotations

from benchmarks import step_flops
from benchmarks.measure import Ceilings
from benchmarks.rollout_inputs import weight_bytes
from benchmarks.whole_inputs import Setting
from videor1.model import VideoLM
from videor1.types import Prompt

Grid = tuple[int, int, int]


def floor_seconds(model: VideoLM, prompt: Prompt, setting: Setting, ceilings: Ceilings) -> dict[str, float]:
    """Seconds by phase, for prompts of one length, each computed once. Decoding and rewards have no floor.

    prefill: the tower and the prompt, in both orders. rollout: one pass over every further token; on a GPU each step
    reads the weights and the KV cache at least once. policy: forward and backward over the packed group, no layer
    recomputed; with adapters the frozen weights get no gradient. reference: the forward pass. optimizer: AdamW reads
    weight, gradient and two moments and writes three of them.
    """
    config, on_card = model.hf.config, model.device.type == "cuda"
    P, C, n = len(prompt.input_ids), setting.completion, setting.prompts
    G, every = setting.generations, setting.generations + setting.shuffled
    orders = 2 if setting.shuffled else 1
    grids: list[Grid] = [prompt.media.grid_thw] if prompt.media else []

    def compute(flops: float) -> float:
        return n * flops / (ceilings.gemm_tflops * 1e12)

    def memory(read: float) -> float:
        return read / (ceilings.copy_gbps * 1e9)

    def flops(tokens: int, pairs: int, head: int, media: list[Grid]) -> step_flops.Flops:
        return step_flops.forward(config, tokens=tokens, pairs=pairs, head_positions=head, grids=media)

    prefill = flops(orders * P, orders * step_flops.causal_pairs(P), orders, orders * grids).total
    seen = (C - 1) * P + step_flops.causal_pairs(C - 1)  # (query, key) pairs of a completion behind its first token
    decode = flops(every * (C - 1), every * seen, every * (C - 1), []).total
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * model.compute_dtype.itemsize
    cached = n * token * (orders * P * (C - 1) + every * step_flops.causal_pairs(C - 1))  # a prompt's once a step
    trained = not setting.lora
    group = flops(P + G * C, step_flops.shared_pairs(P, [C] * G), G * C, grids if trained else [])
    policy = group.training(checkpointing=False) if trained else 2 * (group.linear + group.head) + 3 * group.attention
    parameters = sum(p.numel() * p.element_size() for p in model.trainable().values())
    return {
        "prefill": compute(prefill),
        "rollout": max(compute(decode), memory((C - 1) * weight_bytes(model) + cached) if on_card else 0.0),
        "policy": compute(policy),
        "reference": compute(group.total),
        "optimizer": memory(7 * parameters),
    }
