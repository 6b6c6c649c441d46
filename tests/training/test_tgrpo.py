"""What a T-GRPO batch does: branches, frozen parts, engines, and gradients that do not depend on the backend."""

import dataclasses
import itertools
import math
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fake_server
import pytest
import torch
from batches import groups_of, opened
from patience import PATIENCE
from runs import Lab, assert_moved_alike, last_metrics, metrics, run_lines, same_weights, trainer, weights
from spies import spy, wrap
from tiny import LOG_PROB_TERMS, log_prob_rounding, make_model, make_tokenizer
from torch import Tensor

import videor1.training.tgrpo
from videor1 import side_by_side
from videor1.demo.assets import Assets
from videor1.errors import TrainingStopped
from videor1.model import VideoLM, features
from videor1.rewards.advantages import score_groups
from videor1.rollout import Request, Rollout, RolloutError
from videor1.rollout.local import decode, engine
from videor1.training import rows
from videor1.training.rows import training_rows
from videor1.training.tgrpo import KERNELS, Trainer
from videor1.types import Completion, Group, Prompt
from videor1_kernels import last_backend
from videor1_kernels.testing import rounding


def test_frozen_vision_stays_and_its_features_are_used_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = spy(monkeypatch, VideoLM, "vision_features", lambda _, model, media, *rest: len(media))
    options: dict[str, Any] = {"max_steps": 2, "data__shuffle": False, "num_iterations": 1}
    final = lab.make("frozen", freeze_vision=True, beta=0, **options).train()
    # Each of the two steps on a video encodes the ordered and the shuffled frames once, for the rollout.
    assert encoded == [1, 1] * 2
    before, after = weights(lab.assets.model), weights(final)
    encoded.clear()
    lab.make("frozen, KL", freeze_vision=True, beta=0.1, **options).train()
    lab.make("adapters", lora__rank=2, beta=0.1, **options).train()
    assert encoded == [1, 1] * 4  # the reference policy takes them too
    vision = {name for name in before if name.startswith("visual.")}
    assert vision
    assert all(torch.equal(before[name], after[name]) for name in vision)
    assert not all(torch.equal(before[name], after[name]) for name in before.keys() - vision)

    encoded.clear()
    final = lab.make("trained", beta=0, **options).train()
    assert encoded == [1, 1, 1] * 2  # once more with gradients
    assert not all(torch.equal(before[name], weights(final)[name]) for name in vision)


@pytest.mark.parametrize("unit", ["frame", "temporal_patch"])
def test_identity_permutation_makes_both_branches_equal(unit: str, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same random numbers, shuffled answers are the ordered ones, token by token and log-prob by log-prob."""

    def identity(draw: Any, prompt: Prompt, unit: str, seed: int) -> tuple[int, ...] | None:
        real = draw(prompt, unit, seed)
        return None if real is None else tuple(sorted(real))

    def alike(branch: Any, count: int, names: Any, *rest: Any) -> Any:
        return branch(count, ("both", names[1]), *rest)

    options = {"num_generations": 3, "temporal__num_generations": 3, "temporal__skip_shuffled": False}
    run = lab.make(temporal__shuffle_unit=unit, max_completion_length=12, **options)
    with opened(run, 4) as prompts:
        real = groups_of(run, prompts)
    tgrpo = videor1.training.tgrpo
    wrap(monkeypatch, tgrpo, "Branch", alike)
    different = groups_of(run, prompts)
    wrap(monkeypatch, tgrpo, "draw_permutation", identity)
    groups = groups_of(run, prompts)
    videos = [g for g in groups if g.permutation is not None]
    assert len(videos) == 3
    for group in videos:
        for ordered, shuffled in zip(group.ordered, group.shuffled, strict=True):
            assert torch.equal(ordered.token_ids, shuffled.token_ids)
            torch.testing.assert_close(ordered.logp, shuffled.logp, rtol=0, atol=log_prob_rounding(ordered.logp))
    # And only then: a real permutation, or other random numbers, give others.
    assert any(answers(g.ordered) != answers(g.shuffled) for g in different if g.permutation)
    assert any(answers(g.ordered) != answers(g.shuffled) for g in real if g.permutation)
    (image,) = [g for g in groups if g.permutation is None]
    assert image.shuffled == ()


def answers(completions: Any) -> list[list[int]]:
    return [c.token_ids.tolist() for c in completions]


def test_shuffled_answers_get_no_loss_and_images_no_shuffled_answers(lab: Lab) -> None:
    run = lab.make(num_generations=3, temporal__num_generations=2, temporal__skip_shuffled=False)
    with opened(run, 4) as prompts:
        groups = groups_of(run, prompts)
        assert sorted(len(g.shuffled) for g in groups) == [0, 2, 2, 2]
        rows, left_out = training_rows(run.model, groups, score_groups(groups, run.config), run.config)
    assert left_out == 0
    labels = [token for row in rows for token in row.packed.labels.tolist()]
    assert labels == [token for g in groups for ids in answers(g.ordered) for token in ids]


@pytest.mark.parametrize("enabled", [True, False])
def test_plain_grpo_draws_no_shuffled_answers(enabled: bool, lab: Lab) -> None:
    options = {"temporal__enabled": enabled, "temporal__skip_shuffled": False, "data__shuffle": False}
    lab.make(max_steps=4, **options).train()
    lines = run_lines(lab.folder, "rollouts.jsonl")
    assert [bool(line["shuffled_completions"]) for line in lines] == [enabled] * 3 + [False]
    assert [line["permutation"] is not None for line in lines] == [enabled] * 3 + [False]
    assert (lab.rows()[0]["temporal/p_shuffled"] is not None) == enabled


@pytest.mark.parametrize(
    ("options", "copies"),
    [({"beta": 0}, 0), ({"beta": 0.1}, 1), ({"beta": 0.1, "lora__rank": 2}, 0), ({"beta": 0, "lora__rank": 2}, 0)],
)
def test_reference_model_is_copied_only_where_needed(
    options: dict[str, Any], copies: int, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spy(monkeypatch, VideoLM, "frozen_copy", lambda _, model: model)
    lab.make(max_steps=2, **options).train()
    assert len(made) == copies
    kl = [row["kl"] for row in lab.rows()]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert (kl[-1] > 1e-6) == (options["beta"] > 0)


def test_second_update_of_a_rollout_uses_its_own_log_probs(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first update has no old log-probs; the second's are those of the first, which were the rollout's."""
    note = lambda result, *_, old_logp, **__: (old_logp, result.logp)  # noqa: E731
    seen = spy(monkeypatch, videor1.training.tgrpo, "tgrpo_loss", note)
    lab.make(num_iterations=3, max_steps=3, clip_low=0.2, clip_high=0.2).train()
    assert [old is None for old, _ in seen] == [True, False, False]
    first = seen[0][1]
    assert torch.equal(seen[1][0], first)
    assert torch.equal(seen[2][0], first)
    assert not torch.equal(seen[1][1], first)
    assert lab.rows()[0]["clip_ratio/region_mean"] == 0


def test_a_skipped_first_update_does_not_disturb_the_second(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = itertools.chain([1.0, math.nan], itertools.repeat(1.0))  # the second micro-batch of the first update

    def nan_once(original: Any, model: Any, packed: Any, advantages: Tensor, *rest: Any, **given: Any) -> Any:
        return original(model, packed, advantages * next(factors), *rest, **given)

    wrap(monkeypatch, videor1.training.tgrpo, "tgrpo_loss", nan_once)
    lab.make(num_iterations=2, gradient_accumulation_steps=3, max_steps=2).train()
    assert [row["nonfinite_steps"] for row in lab.rows()] == [1, 1]
    assert lab.rows()[1]["grad_norm"] > 0


def test_learning_raises_the_reward(lab: Lab) -> None:
    """The whole loop points uphill: answers become shorter where that is what pays."""
    options: dict[str, Any] = {"max_steps": 25, "learning_rate": 2e-3, "lr_scheduler_type": "constant", "beta": 0}
    options |= {"num_generations": 8, "max_completion_length": 12, "temporal__enabled": False}
    lab.make(reward__functions="toy_rewards:brief", **options).train()
    rewards = [row["reward"] for row in lab.rows()]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


@pytest.mark.parametrize(
    ("reward", "bonus", "told"), [("nothing", False, 1), ("uneven", False, 0), ("nothing", True, 0)]
)
def test_steps_that_teach_nothing_are_told_of_once(
    reward: str, bonus: bool, told: int, lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bonus alone teaches: all answers right, and all favoured by temporal.apply advantage."""

    def favoured(original: Any, *arguments: Any, **named: Any) -> Any:
        scored = original(*arguments, **named)
        advantages = torch.full_like(scored.result.advantages, 0.3)
        return dataclasses.replace(scored, result=dataclasses.replace(scored.result, advantages=advantages))

    if bonus:
        wrap(monkeypatch, videor1.training.tgrpo, "score_groups", favoured)
    lab.make(max_steps=6, reward__functions=f"toy_rewards:{reward}").train()
    said = capsys.readouterr().err
    assert said.count("step 5: in the last 5 steps all completions of a question earned the same reward") == told
    assert said.count("the same reward") == told
    assert last_metrics(lab.folder)["frac_reward_zero_std"] == (reward == "nothing")


def test_the_same_seed_gives_the_same_run_and_another_does_not(lab: Lab) -> None:
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        torch.manual_seed(len(name))  # the global generator has no say
        lab.make(name, seed=seed, max_steps=2).train()
    assert lab.rows("one") == lab.rows("same")
    assert lab.rows("one") != lab.rows("other")


def test_decode_workers_and_batch_rows_do_not_change_the_run(lab: Lab) -> None:
    options: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 2}
    lab.make("here", **options).train()
    lab.make("ahead", data__workers=1, data__prefetch=3, data__cache_mb=0, **options).train()
    assert lab.rows("here") == lab.rows("ahead")
    lines = [(lab.folder / name / "rollouts.jsonl").read_bytes() for name in ("here", "ahead")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_number_of_threads_changes_no_bit(dropout: float, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs whose passes are divided: the tower's, the prompts', the decode steps' and the training rows'."""
    monkeypatch.setattr(features, "LEAST_PATCHES", 16)
    monkeypatch.setattr(engine, "LEAST_TOKENS", 32)
    monkeypatch.setattr(decode, "LEAST_ROWS", 1)
    monkeypatch.setattr(rows, "LEAST_TRAINED_TOKENS", 32)
    divided: list[int] = []
    wrap(monkeypatch, side_by_side, "_threads", lambda original, count: divided.append(count) or original(count))
    lora = {"beta": 0.1, "lora__rank": 4, "lora__dropout": dropout} if dropout else {}
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(side_by_side, "_count", threads)
        run = lab.make(str(threads), max_steps=3, per_device_train_batch_size=4, **lora)
        run.train()
        assert (threads > 1) == bool(divided)
        found.append((run.model.trainable(), (run.run_dir / "rollouts.jsonl").read_bytes()))
    for trained, lines in found[1:]:
        assert same_weights(trained, found[0][0])
        assert lines == found[0][1]


def test_every_logged_line_has_the_names_that_trackers_know(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the numbers that follow from rollouts.jsonl; and the sampler's cache and the packed row, two programs for one
    log-prob, agree."""
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 3, "temporal__num_generations": 2}
    options |= {"max_completion_length": 16, "temporal__skip_shuffled": False}
    by_lot = lambda text, *_, **__: float(zlib.crc32(text.encode()) % 2)  # noqa: E731
    monkeypatch.setattr("videor1.rewards.scoring.accuracy_reward", by_lot)
    lab.make(**options).train()
    for row in lab.rows():
        lines = [line for line in run_lines(lab.folder, "rollouts.jsonl") if line["step"] == row["step"]]
        videos = [line for line in lines if line["permutation"] is not None]
        assert len(lines) == 4 > len(videos) > 0

        def column(name: str, chosen: list[dict[str, Any]] = lines) -> Tensor:
            return torch.tensor([line[name] for line in chosen], dtype=torch.float64)

        rewards, accuracy, form, lengths = map(column, ("rewards", "accuracy", "format", "lengths"))
        expected = {
            "reward": rewards.mean(),
            "reward_std": rewards.std(1).mean(),
            "frac_reward_zero_std": (rewards.std(1) < 1e-6).double().mean(),
            "rewards/accuracy/mean": accuracy.mean(),
            "rewards/accuracy/std": accuracy.std(),
            "rewards/format/mean": form.mean(),
            "rewards/format/std": form.std(),
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": 1 - column("finished").mean(),
            "temporal/p": column("p", videos).mean(),
            "temporal/p_shuffled": column("p_shuffled", videos).mean(),
            "temporal/bonus": column("temporal", videos).mean(),
            "temporal/rewarded": (column("temporal", videos) > 0).double().mean(),
            "rollout/shuffled_asked": 2 * len(videos),
            "data/draws": 4 * row["step"],
        }
        wanted = pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5, abs=1e-6)
        assert {name: row[name] for name in expected} == wanted
        others = {"loss", "grad_norm", "learning_rate", "kl", "entropy", "clip_ratio/region_mean", "data/skipped"}
        assert others | {"nonfinite_steps", "sampling/sampling_logp_difference/mean"} <= row.keys()
        assert row["sampling/sampling_logp_difference/max"] < 2e-5
        assert 0 <= row["sampling/kl_k3"] < 1e-9
        assert abs(row["sampling/chi2"]) < 4e-5
        assert 1 - 1e-8 < row["sampling/ess"] <= 1 + 1e-12


TODAYS = {"loss_type": "cispo", "importance_correction": "token", "correction_max": 1.0, "entropy_coef": 0.01}
TODAYS |= {"max_steps": 2, "max_completion_length": 3, "per_device_train_batch_size": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "importance_level", "options"),
    [
        ("tiny", "token", {"max_steps": 2, "max_completion_length": 3, "per_device_train_batch_size": 1}),
        ("tiny", "token", TODAYS),
        pytest.param("demo", "token", {"max_steps": 3, "gradient_accumulation_steps": 2}, marks=pytest.mark.full),
        pytest.param("demo", "sequence", {"max_steps": 3}, marks=pytest.mark.full),
    ],
)
def test_same_trajectory_on_the_kernels_as_on_the_references(
    model: str, importance_level: str, options: dict[str, Any], lab: Lab
) -> None:
    """Updates of which those after a rollout's first have ratios off 1, on either backend of every operation."""
    options = {"num_iterations": 3, "per_device_train_batch_size": 2, "clip_low": 0.2, "clip_high": 0.2} | options
    folder = lab.assets.model
    if model == "tiny":
        folder = lab.folder / "model"
        make_model(num_hidden_layers=1).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    options |= {"model_name_or_path": folder, "importance_level": importance_level}
    ends = {}
    for kernels in ("reference", "triton"):
        final = lab.make(kernels, kernels=kernels, **options).train()
        assert [last_backend(op) for op in KERNELS] == [kernels] * len(KERNELS)
        ends[kernels] = weights(final)
    assert_moved_alike(ends["reference"], ends["triton"], weights(folder), steps=options["max_steps"])
    rows = [metrics(lab.folder / kernels) for kernels in ("reference", "triton")]
    bound = rounding(LOG_PROB_TERMS, 10.0)  # of log-probs; what it does to the weights of three steps is as small
    assert len(rows[0]) == options["max_steps"]
    for a, b in zip(*rows, strict=True):
        for key in ("loss", "grad_norm", "kl", "entropy", "reward", "temporal/p", "clip_ratio/region_mean"):
            assert a[key] == pytest.approx(b[key], rel=bound, abs=bound), key


def test_the_kernels_are_named(lab: Lab) -> None:
    run = lab.make()
    run.model.device = torch.device("cuda", 0)
    run.model.compute_dtype = torch.bfloat16
    assert run._kernels() == "kernels: " + ", ".join(f"{op} triton" for op in KERNELS)
    run.model.compute_dtype = torch.float32
    slow = "kernels: prefix_attention reference, prefix_decode_attention reference, add_rms_norm triton"
    assert run._kernels().startswith(slow)


def test_a_source_is_made_and_nothing_else(lab: Lab) -> None:
    run = lab.make()
    assert run.rollouts is None
    with opened(run, 4) as prompts:
        file = run.rollouts
        other = run.make_source(2)
        assert run.rollouts is file
        assert [p.draw for p in prompts][2:] == [p.draw for p in other.take(2)] == [2, 3]
        other.close()


class Answering:
    """An engine that gives canned answers, and fails where told."""

    needs_features = False

    def __init__(self, run: Trainer, fails: set[int], dead: bool = False) -> None:
        self.run, self.fails, self.dead, self.calls = run, fails, dead, []
        self.say = lambda solution: [solution, "<answer>no</answer>"]

    def generate(self, requests: Sequence[Request]) -> Rollout:
        self.calls.append("generate")
        if self.dead:
            raise RolloutError("http://nowhere: refused")
        groups: list[Group | None] = []
        for i, request in enumerate(requests):
            assert request.ordered.features is None
            ids = torch.tensor([5, 6, 7 + len(self.calls), self.run.model.special.eos])
            texts = self.say(request.prompt.sample.solution)
            answers = [Completion(ids, torch.zeros(4), True, text) for text in texts]
            groups.append(None if i in self.fails else Group(request.prompt, tuple(answers)))
        return Rollout(groups, failed=dict.fromkeys(self.fails, "too slow"))

    def weights_changed(self) -> None:
        self.calls.append("weights")

    def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_another_engine_and_requests_that_fail(freeze_vision: bool, lab: Lab) -> None:
    options = {"num_generations": 2, "per_device_train_batch_size": 3, "max_steps": 2, "num_iterations": 1}
    run = lab.make(freeze_vision=freeze_vision, **options)
    run.engine = engine = Answering(run, {1})
    final = run.train()
    # New weights are handed over before they are asked for, and not after the last step.
    assert engine.calls == ["weights", "generate", "weights", "generate", "close"]
    assert [len(run_lines(lab.folder, name)) for name in ("rollouts.jsonl", "skipped.jsonl")] == [4, 2]
    assert {(line["kind"], line["split"]) for line in run_lines(lab.folder, "skipped.jsonl")} == {("rollout", "train")}
    assert last_metrics(lab.folder)["data/skipped/rollout"] == 2
    assert last_metrics(lab.folder)["rollout/failed"] == 1
    assert not same_weights(weights(lab.assets.model), weights(final))


def test_a_template_that_opens_the_reasoning(thinking_assets: Assets, tmp_path: Path) -> None:
    """What closes it earns the format reward, what opens it again does not; only what was written is counted."""
    options = {"video__max_pixels": 4096, "video__min_pixels": 4096, "video__image_max_pixels": 4096}
    options |= {"num_generations": 3, "max_steps": 1, "reward__functions": "toy_rewards:nothing"}
    run = trainer(thinking_assets, tmp_path, **options)
    run.engine = engine = Answering(run, set())
    engine.say = lambda solution: [f"so</think>\n{solution}", f"<think>so</think>{solution}", "so</think><answer>"]
    run.train()
    (row,) = run_lines(tmp_path, "rollouts.jsonl")
    assert row["prompt"].endswith("<|im_start|>assistant\n<think>\n")
    assert (row["opened"], row["completions"]) == ("<think>\n", engine.say(row["solution"]))
    assert (row["accuracy"], row["format"], row["lengths"]) == ([1, 1, 0], [1, 0, 0], [4, 4, 4])
    # The judge that may stop shuffled answers reads whole answers as well.
    prompt = run.make_source(0).take(1)[0]
    run.model.opened_text = "<think></think><answer>"
    judge = run._judge(prompt)
    judge.ordered_done(
        Completion(torch.arange(2), torch.zeros(2), True, prompt.sample.solution.removeprefix("<answer>"))
    )
    assert judge.ordered == [1.0]


def test_an_engine_that_cannot_go_on_stops_the_run(lab: Lab) -> None:
    run = lab.make(num_generations=2)
    run.engine = engine = Answering(run, set(), dead=True)
    with pytest.raises(TrainingStopped, match="nowhere: refused; there is no checkpoint yet"):
        run.train()
    assert engine.calls == ["weights", "generate", "close"]


def test_a_run_on_a_server(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"num_generations": 2, "max_steps": 2, "num_iterations": 1, "data__shuffle": False, "top_k": 0}
    options["max_completion_length"] = 16  # the reply has 12 tokens
    with fake_server.FakeServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options |= {"rollout__engine": "server", "rollout__url": server.url, "rollout__timeout": PATIENCE}
        with pytest.warns(UserWarning, match=r"top_p 0\.95: a server returns log-probs") as warned:
            run = lab.make(**options)
        assert sum("log-probs" in str(warning.message) for warning in warned) == 1
        monkeypatch.setattr(fake_server, "TOKENIZER", run.model.tokenizer)
        monkeypatch.setattr(fake_server, "SPECIAL", run.model.special)
        final = run.train()
        assert len(run_lines(lab.folder, "rollouts.jsonl")) == 2
        loaded = [body for path, body in server.controlled if path.endswith("collective_rpc")]
        server.shutdown()
    assert len(loaded) == 2  # before each rollout
    last = last_metrics(lab.folder)
    assert last["rollout/failed"] == 0
    assert last["sampling/kl_k3"] > 0  # the reply's log-probs are made up
    assert 0 < last["sampling/ess"] < 1
    assert not same_weights(weights(lab.assets.model), weights(final))
