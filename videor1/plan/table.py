"""Format a memory plan as text, with the options that would lower its peak."""

from __future__ import annotations

from videor1.config import TrainConfig
from videor1.plan.layers import LayerPlans
from videor1.plan.plan import CARDS, GIB, USABLE, Plan, plan
from videor1.rollout.local.kv_cache import MIB


def advice(config: TrainConfig, made: Plan) -> list[str]:
    """Return options that would lower the peak of the binding phase, the most effective first, with what they free."""
    parts, found = made.binding.parts, []

    def gib(*names: str) -> int:
        return sum(parts.get(name, 0) for name in names)

    if not config.lora.rank:
        size = gib("weights") // 2 + gib("gradients", "optimizer states", "reference model", "weights cast", "update")
        found.append((size, "--lora.rank 64 (adapters: the weights stay in bf16 and are their own reference model)"))
    if not config.gradient_checkpointing:
        found.append((gib("language model", "vision tower"), "--gradient_checkpointing"))
    if not config.freeze_vision and not config.lora.rank:
        states = (12 if "gradients" in parts else 8) * made.parameters["vision tower"]
        found.append((gib("vision tower") + states, "--freeze_vision"))
    if config.beta and not config.lora.rank:
        found.append((gib("reference model"), "--beta 0 (no reference model)"))
    if made.binding.name == "policy" and made.row_tokens > made.prompt_tokens + made.answer_tokens:
        size = gib("language model", "backward pass") // 2
        found.append((size, f"--max_tokens_per_row {made.row_tokens // 2} (more passes, the same loss)"))
    if made.binding.name == "rollout":
        found.append((gib("KV cache") // 2, f"--rollout.kv_mib {max(1, made.kv // 2 // MIB)}"))
    return [f"{text}: by {size / GIB:.1f} GiB at most" for size, text in sorted(found, reverse=True) if size > GIB / 4]


def table(made: Plan) -> str:
    """Return the plan as text."""
    names = list(dict.fromkeys(name for phase in made.phases for name in phase.parts))
    names.sort(key=lambda name: -max(phase.parts.get(name, 0) for phase in made.phases))
    width = max(map(len, [*names, "the phase's most"])) + 2
    counts = ", ".join(f"{part} {count:,}" for part, count in made.parameters.items() if count)
    ordered, shuffled = made.answers
    lines = [
        f"Memory plan of {made.model}: {made.settings}",
        f"parameters: {sum(made.parameters.values()):,} ({counts}); trained: {made.trainable:,}",
        f"a step: {made.prompts} prompts of {made.prompt_tokens:,} tokens ({made.media_tokens:,} of video), "
        f"{ordered} + {shuffled} completions of {made.answer_tokens:,} tokens to each; "
        f"{made.rows} packed rows of up to {made.row_tokens:,} tokens",
        "",
        "GiB".ljust(width) + "".join(phase.name.rjust(11) for phase in made.phases),
    ]
    for name in names:
        lines.append(name.ljust(width) + "".join(_cell(phase.parts.get(name, 0)) for phase in made.phases))
    lines += [
        "the phase's most".ljust(width) + "".join(_cell(phase.bytes) for phase in made.phases),
        "",
        f"KV cache: {made.kv / GIB:.3g} GiB. Peak: {made.peak / GIB:.2f} GiB, in the phase {made.binding.name}.",
    ]
    if made.states:
        lines[-1] += (
            f"\nOf the cache, states of linear attention: {made.states / GIB:.3g} GiB, the same for longer completions."
        )
    if made.context and made.kept:
        cards = ", ".join(f"{card} GB {'yes' if made.keeps(card) else 'no'}" for card in CARDS)
        lines.append(f"Kept between rollouts: {made.kept / GIB:.3g} GiB, on cards of: {cards}.")
    if made.context:
        fits = ", ".join(f"{card} GB {'yes' if made.fits(card) else 'no'}" for card in CARDS)
        lines += [
            f"With {made.slack:.0%} for the allocator and {made.context / GIB:.1f} GiB for the CUDA context: "
            f"{made.total / GIB:.1f} GiB.",
            f"Fits on one card of: {fits}.",
        ]
    return "\n".join(lines)


def layers_line(plans: LayerPlans) -> str:
    """Say how many layers would recompute on each card, with all of its usable memory free."""
    chosen = ", ".join(f"{card} GB {plans.choose(int(card * GIB * USABLE))}" for card in CARDS)
    return (
        f"Layers that recompute, of {plans.layers} (checkpoint_layers; above: all), chosen by free memory: {chosen}; "
        f"with none {plans.total(0) / GIB:.1f} GiB."
    )


def print_plan(config: TrainConfig) -> int:
    """Print the plan of a run for ``--plan`` and return the exit code."""
    made = plan(config)
    print(table(made))
    if made.context and config.gradient_checkpointing and config.checkpoint_layers is None:
        print(layers_line(LayerPlans.of(config, made)))
    missing = [card for card in CARDS if not made.fits(card)]
    suggestions = advice(config, made) if made.context and missing else []
    if suggestions:
        print(f"\nTo lower the peak, of the phase {made.binding.name} (another may then have the most):")
        print("\n".join(f"  {line}" for line in suggestions))
    return 0


def _cell(size: int) -> str:
    return (f"{size / GIB:.2f}" if size >= GIB / 200 else f"{size / MIB:.1f} M" if size else "-").rjust(11)
