"""The charts of the report: the series of metrics.jsonl in each, with their labels there and in curves.png."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """A chart of the report."""

    id: str
    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]  # (name of the series, its label) of each line
    note: str = ""
    gap: bool = False  # whether to shade between the first two lines
    share: bool = False  # whether the values are between 0 and 1
    log: bool = False  # whether the value axis is logarithmic
    smooth: bool = True  # whether to draw a moving average


CHARTS = (
    Chart(
        "held-out",
        "Held-out accuracy",
        "accuracy",
        (("eval/ordered", "frames in order"), ("eval/shuffled", "frames shuffled"), ("eval/image", "still images")),
        "On questions that are not trained on. The shaded gap is what the order of the frames is worth.",
        gap=True,
        share=True,
    ),
    Chart(
        "accuracy",
        "Accuracy while training: p and p~",
        "accuracy",
        (("temporal/p", "p, frames in order"), ("temporal/p_shuffled", "p~, frames shuffled")),
        "Of video questions. p~ only of prompts whose shuffled completions were all run.",
        gap=True,
        share=True,
    ),
    Chart(
        "reward",
        "Reward",
        "reward",
        (("reward", "total"), ("rewards/accuracy/mean", "accuracy"), ("rewards/format/mean", "format")),
    ),
    Chart(
        "bonus",
        "Temporal bonus",
        "",
        (("temporal/rewarded", "share of prompts that get it"), ("temporal/bonus", "mean bonus")),
        "Of the prompts whose bonus is known.",
    ),
    Chart("kl", "KL to the reference policy", "nats a token", (("kl", "KL"),)),
    Chart("entropy", "Entropy", "nats a token", (("entropy", "entropy"),)),
    Chart(
        "length",
        "Completion length",
        "tokens",
        (("completions/mean_length", "mean"), ("completions/max_length", "longest")),
    ),
    Chart(
        "clipped",
        "Completions cut at the limit",
        "share",
        (("completions/clipped_ratio", "cut at max_completion_length"),),
        share=True,
    ),
    Chart(
        "skipped",
        "Shuffled completions not run to their end",
        "share",
        (("share/skipped", "skipped: never started"), ("share/stopped", "stopped: begun and left")),
        "They could no longer change the advantages.",
        share=True,
    ),
    Chart(
        "variance",
        "Prompts whose completions all earn alike",
        "share",
        (("frac_reward_zero_std", "no variance"),),
        "They teach nothing.",
        share=True,
    ),
    Chart(
        "mismatch",
        "Distance of the trained policy from the sampled one",
        "a token",
        (("sampling/kl_k3", "KL (k3), nats"), ("sampling/chi2", "chi-square")),
        "By the log-probs of the sampled tokens, before the step's update.",
        log=True,
    ),
    Chart(
        "ess",
        "Importance weights of the sampled tokens",
        "share",
        (
            ("sampling/ess", "effective sample size"),
            ("sampling/truncated", "weights truncated"),
            ("sampling/masked", "tokens masked"),
        ),
        share=True,
    ),
    Chart("loss", "Loss", "loss", (("loss", "loss"),)),
    Chart("grad", "Gradient norm", "norm, before clipping", (("grad_norm", "gradient norm"),), log=True),
    Chart("rate", "Learning rate", "learning rate", (("learning_rate", "learning rate"),), smooth=False),
    Chart("speed", "Speed", "tokens a second", (("time/tokens_per_second", "tokens a second"),)),
)

LABELS = {name: label for chart in CHARTS for name, label in chart.lines}
# Labels of the phases of a step whose names are not clear by themselves.
PHASE_LABELS = {"data": "waiting for data", "reward": "rewards", "reference": "reference policy"}
