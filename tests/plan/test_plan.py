"""The memory plan: against what the same passes take on a CPU, against arithmetic, and its command."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tiny import make_lm
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

import videor1.rollout.local.engine
from videor1 import side_by_side
from videor1.config import TrainConfig
from videor1.config.cli import parse
from videor1.errors import ConfigError
from videor1.plan.__main__ import main
from videor1.plan.check import WITHIN, Compared, compare, measured
from videor1.plan.ledger import Ledger
from videor1.plan.plan import CARDS, GIB, USABLE, Phase, count_parameters, plan
from videor1.plan.setup import Target, build_policy, largest_grid, shape_of
from videor1.plan.table import table
from videor1.rollout import LocalEngine, SamplingOptions
from videor1.rollout.local.kv_cache import MIB
from videor1.train import _plan_room
from videor1.train import main as train
from videor1_kernels import PrefixLayout, linear_grpo_loss, prefix_attention
from videor1_kernels.frames_to_patches import normalize_patches, patch_columns
from videor1_kernels.linear_logprob import tiles
from videor1_kernels.linear_logprob.products import chunk_rows
from videor1_kernels.linear_logprob.waves import inner_parts
from videor1_kernels.testing import PeakMemory

CPU = torch.device("cpu")
TINY = ["--max_completion_length", "24", "--video.max_frames", "4", "--video.max_pixels", "12544"]
SMALL = ["--max_completion_length", "20", "--video.max_frames", "4", "--video.max_pixels", "25088"]
SHORT = ["--video.max_frames", "2", "--gradient_accumulation_steps", "1"]
CHECKPOINTED = "--gradient_checkpointing"


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """Each measurement collects garbage first: what is there already and stays need not be looked at each time."""
    gc.collect()
    gc.freeze()
    with patch.object(side_by_side, "_count", 2):  # a CPU has cores; a plan is of a card all the same
        yield
    gc.unfreeze()


def options(*flags: str) -> TrainConfig:
    return parse(TrainConfig, flags, prog="plan", description="")


def small_shape(**text: Any) -> Qwen2_5_VLConfig:
    """A head of its own."""
    sizes: dict[str, Any] = {"vocab_size": 6144, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    sizes |= {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}}
    sizes |= {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False, **text}
    vision = {"depth": 2, "hidden_size": 160, "num_heads": 4, "intermediate_size": 320, "fullatt_block_indexes": [1]}
    vision |= {"out_hidden_size": sizes["hidden_size"], "window_size": 112, "tokens_per_second": 2}
    return Qwen2_5_VLConfig(text_config=sizes, vision_config=vision, tie_word_embeddings=sizes["tie_word_embeddings"])


def small_qwen2() -> Qwen2VLConfig:
    text = small_shape().text_config.to_dict() | {"model_type": "qwen2_vl_text"}
    vision = {"depth": 2, "embed_dim": 160, "hidden_size": 256, "num_heads": 4, "mlp_ratio": 2}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def small_qwen3() -> Qwen3VLConfig:
    """A head of its own, two deepstack layers, heads wider than the model."""
    text: dict[str, Any] = {"vocab_size": 6144, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 8192}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5e6}}
    text |= {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    vision = {"depth": 3, "hidden_size": 160, "num_heads": 4, "intermediate_size": 320, "out_hidden_size": 256}
    vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 144}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


SHAPES = {"tiny": lambda: shape_of(None), "small": small_shape, "tiny Qwen3-VL": lambda: shape_of(None, "qwen3_vl")}
SHAPES |= {"tiny Qwen3.5": lambda: shape_of(None, "qwen3_5")}
SHAPES |= {"small Qwen3-VL": small_qwen3, "small Qwen2-VL": small_qwen2}


def assert_as_measured(config: TrainConfig, shape: Any) -> dict[str, Compared]:
    found, _ = measured(config, shape, CPU)
    made = plan(config, shape)
    assert (made.context, made.slack) == (0, 0)
    rows = {row.phase: row for row in compare(made, found)}
    assert list(rows) == ["rollout", *["reference"] * bool(config.beta), "policy", "optimizer"]
    for row in rows.values():
        assert row.ratio == pytest.approx(1, abs=WITHIN), row
    assert rows["policy"].ratio == pytest.approx(1, abs=0.03), rows["policy"]  # what most runs are bound by
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "flags"),
    [
        ("small", [*SMALL, CHECKPOINTED, "--freeze_vision", "--gradient_accumulation_steps", "2"]),
        ("small", [*SMALL, "--lora.rank", "8"]),
        ("small", [*SMALL, "--beta", "0", "--max_tokens_per_row", "360"]),
        ("small Qwen3-VL", [*SMALL, CHECKPOINTED]),
        ("tiny Qwen3.5", TINY),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("tiny", TINY),
                ("small", SMALL),
                ("small", [*SMALL, CHECKPOINTED]),
                ("small", [*SMALL, "--lora.rank", "8", CHECKPOINTED, "--freeze_vision"]),
                ("small Qwen2-VL", SMALL),
                ("tiny Qwen3-VL", TINY),
                ("tiny Qwen3-VL", [*TINY, "--bf16"]),
                ("small Qwen3-VL", SMALL),
                ("small Qwen3-VL", [*SMALL, "--lora.rank", "8", "--freeze_vision"]),
                ("small Qwen3-VL", [*SMALL, "--beta", "0", "--max_tokens_per_row", "400"]),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[6:]).replace("--", ""),
)
def test_every_phase_is_within_a_tenth_of_what_is_measured(shape: str, flags: list[str]) -> None:
    assert_as_measured(options("--device", "cpu", *flags), SHAPES[shape]())


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """What csrc/bf16_product.cpp computes, on any CPU; what numpy takes is not among torch's bytes, as its is not."""
    wide = [(x.view(torch.uint16).numpy().astype(np.uint32) << 16).view(np.float32) for x in (a, b)]
    return torch.from_numpy(wide[0] @ wide[1].T).clone()


@pytest.mark.parametrize("serves", [True, False], ids=["the CPU's own product", "converted operands"])
def test_bf16_is_planned_for_either_kind_of_cpu(serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AVX-512 BF16 a tile of the head and the hidden states are converted to fp32, which takes memory."""
    if serves != (tiles.bf16_product() is not None):  # the answer that this machine's CPU does not give
        monkeypatch.setattr(tiles, "bf16_product", lambda: exact_product if serves else None)
    flags = [*SMALL, "--num_generations", "16", "--bf16", CHECKPOINTED]
    rows = assert_as_measured(options("--device", "cpu", *flags), small_shape())
    # At the peak: the second tile's entries of the head, and the hidden states of all the row's completion tokens.
    entries, tokens = 6144 - 3276, 320
    without = rows["reference"].planned - 4 * 256 * (entries + tokens) * (not serves)
    assert without == pytest.approx(12_234_560, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_written_into_a_tensor_takes_no_memory(dtype: torch.dtype) -> None:
    """The patches of the demonstration's video become floats in a tensor that was there before, some rows at a time."""
    sizes = (2912, patch_columns(16))
    patches = torch.zeros(sizes, dtype=torch.uint8)
    with PeakMemory(CPU) as memory:
        normalize_patches(patches, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(sizes, dtype=torch.uint8)
    ledger = Ledger(cuda=False)
    ledger.hold("patches", [fake])
    with ledger:
        ledger.restart()
        normalize_patches(fake, dtype)
    assert ledger.peak["other"] == pytest.approx(memory.bytes, rel=1e-4)


def test_checkpointing_and_shorter_rows_lower_the_planned_peak() -> None:
    # Two passes: the gradients are there before the second.
    several = ["--device", "cpu", *SMALL, *SHORT[:2], "--gradient_accumulation_steps", "2"]
    gradients = 4 * sum(count_parameters(build_policy(small_shape(), options(), Target(False, False), CPU)).values())
    peaks = [
        next(p for p in plan(options(*several, *more), small_shape()).phases if p.name == "policy")
        for more in ([], ["--gradient_checkpointing"], ["--gradient_checkpointing", "--max_tokens_per_row", "300"])
    ]
    assert peaks[1].parts["gradients"] == gradients
    assert peaks[0].beyond > 1.3 * peaks[1].beyond
    assert peaks[1].beyond > 1.05 * peaks[2].beyond


@pytest.mark.parametrize(
    "flags", [[], ["--rollout_batch_size", "8"], ["--rollout.kv_mib", "2"], ["--per_device_train_batch_size", "3"]]
)
def test_the_kv_cache_is_exactly_as_large_as_planned(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(Exception): ...  # nothing of what a step does afterwards is the question

    class Recorded(videor1.rollout.local.engine.KVCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            raise Made(sum(pool.nbytes for pool in (*self.prefix_k, *self.prefix_v, *self.suffix_k, *self.suffix_v)))

    monkeypatch.setattr(videor1.rollout.local.engine, "KVCache", Recorded)
    config = options("--device", "cpu", *TINY, *SHORT, "--freeze_vision", "--beta", "0", *flags)
    with pytest.raises(Made) as size:
        measured(config, shape_of(None), CPU)
    made = plan(config, shape_of(None))
    assert size.value.args[0] == made.kv == made.phases[0].parts["KV cache"]


@pytest.mark.parametrize(
    ("name", "total", "embedding", "head"),
    [
        ("3b", 3_754_622_976, 151936 * 2048, 0),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656, 152064 * 3584, 152064 * 3584),
        ("Qwen/Qwen3-VL-2B-Instruct", 2_127_532_032, 151936 * 2048, 0),
        ("qwen3-vl-4b", 4_437_815_808, 151936 * 2560, 0),
        ("Qwen/Qwen3-VL-8B-Thinking", 8_767_123_696, 151936 * 4096, 151936 * 4096),
        ("qwen3-vl-32b", 33_357_390_064, 151936 * 5120, 151936 * 5120),
    ],
)
def test_parameters_of_the_published_models(name: str, total: int, embedding: int, head: int) -> None:
    config = options("--lora.rank", "0")
    counts = count_parameters(build_policy(shape_of(name), config, Target.of(config), "meta"))
    assert sum(counts.values()) == total
    assert (counts["embedding"], counts["head"], counts["adapters"]) == (embedding, head, 0)
    assert 400e6 < counts["vision tower"] < 680e6


def card_shape(layers: int) -> Qwen2_5_VLConfig:
    """The 3B, or with fewer layers, which are planned in less time."""
    shape = shape_of("3b")
    if layers < 36:
        text, vision = shape.text_config, shape.vision_config
        text.num_hidden_layers, text.layer_types = layers, text.layer_types[:layers]
        vision.depth, vision.fullatt_block_indexes = 2, [1]
    return shape


@pytest.mark.parametrize("layers", [4, pytest.param(36, marks=pytest.mark.full)])
def test_resident_bytes_of_a_run_on_a_card(layers: int) -> None:
    """With a short video: a long one takes as long to plan as it has windows."""
    shape, options_3b = card_shape(layers), ["--config", "qwen2_5_vl_3b", *SHORT]
    adapters = plan(options(*options_3b, "--lora.rank", "64", "--freeze_vision"), shape)
    base = sum(adapters.parameters.values()) - adapters.parameters["adapters"]
    parts = adapters.phases[-1].parts
    assert adapters.trainable == adapters.parameters["adapters"] == 119_734_272 * layers // 36
    rows = 64 * (6 * 2048 + 11008) * layers  # of the joined weights, for the adapters' A in bf16
    assert parts["weights"] == pytest.approx(2 * base + 4 * adapters.trainable + 2 * rows, rel=1e-3)
    assert parts["optimizer states"] == pytest.approx(8 * adapters.trainable, rel=1e-2)
    assert parts["gradients"] == pytest.approx(4 * adapters.trainable, rel=1e-3)
    assert "reference model" not in parts
    assert adapters.fits(24)

    whole = plan(options(*options_3b), shape)
    parts = whole.phases[-1].parts
    assert parts["weights"] == pytest.approx(4 * base, rel=1e-3)
    assert parts["reference model"] == pytest.approx(2 * base, rel=1e-3)
    assert parts["optimizer states"] == pytest.approx(8 * base, rel=1e-2)
    # 16 bytes a parameter of states, 2 of the reference; the fused update of AdamW needs no more.
    update = next(phase for phase in whole.phases if phase.name == "optimizer")
    assert sum(update.parts.values()) == pytest.approx(18 * base, rel=1e-2)
    assert whole.binding.name == "policy"
    assert whole.total > whole.peak + GIB
    if layers == 36:
        assert "24 GB no, 48 GB no, 80 GB yes, 141 GB yes" in table(whole)


@pytest.mark.parametrize("tokens", [1000, 12288])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_on_a_card_takes_what_its_kernels_do(tokens: int, frozen: bool) -> None:
    """fp32 logits of a chunk of at most 2816 rows, d_weight in fp32, a gradient of each input in bf16; d_hidden's parts
    and their sum in fp32.
    """
    hidden, vocabulary = 64, 151936
    fake, ledger = FakeTensorMode(allow_non_fake_inputs=True), Ledger(cuda=True)
    with fake:
        x = torch.empty(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(vocabulary, hidden, dtype=torch.bfloat16, requires_grad=not frozen)
    labels, advantages = torch.zeros(tokens, dtype=torch.int64), torch.ones(1)
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    with ledger:
        before = ledger.total
        loss = linear_grpo_loss(x, weight, labels, advantages, ends, beta=0.0).loss
        forward = sum(ledger.peak.values()) - before
        held = ledger.total - before
        loss.backward()
    rows = chunk_rows(tokens, vocabulary)
    assert rows <= 2816
    d_hidden, d_weight = 2 * tokens * hidden, 4 * vocabulary * hidden * (not frozen)
    logits = 4 * rows * vocabulary
    assert held == pytest.approx(d_hidden + d_weight, rel=0.1)
    parts = inner_parts(rows, hidden, vocabulary, 132)
    assert parts > 1
    assert forward == pytest.approx(held + logits + rows * hidden * (2 + 4 * (parts + 1)), rel=0.001)
    assert x.grad is not None
    assert (weight.grad is None) == frozen


def test_attention_on_a_card_keeps_its_output_and_one_number_a_head() -> None:
    fake, ledger = FakeTensorMode(allow_non_fake_inputs=True), Ledger(cuda=True)
    layout = PrefixLayout([600], [[300, 300]])
    with fake:
        q, k, v = (torch.empty(1200, heads, 128, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2))
    with ledger:
        out = prefix_attention(q, k, v, layout)
        assert ledger.total == out.nbytes + 1200 * 8 * 4
        ledger.restart()
        before = ledger.total
        out.backward(out.detach())
        # dq, dk, dv; one number a head and token; partial sums of the keys that both completions see, fp32.
        gradients = q.nbytes + k.nbytes + v.nbytes
        assert gradients + 1200 * 8 * 4 < sum(ledger.peak.values()) - before < 4 * gradients


def test_the_largest_usual_video_is_planned_for() -> None:
    assert largest_grid(options()) == (8, 20, 28)  # 320 x 240 becomes 392 x 280
    assert largest_grid(options("--video.max_frames", "4", "--video.max_pixels", "3136")) == (2, 4, 4)


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    small_shape(vocab_size=2048).save_pretrained(tmp_path)
    made = plan(options("--model_name_or_path", str(tmp_path), *SMALL))
    assert made.parameters["head"] == 2048 * 256
    assert made.context > 0  # of a card, which this machine need not have
    loaded = json.loads(json.dumps(made.to_json()))
    assert loaded["total"] == made.total == int(made.peak * (1 + made.slack)) + made.context
    assert loaded["fits"] == {str(card): made.fits(card) for card in CARDS}
    cpu = dataclasses.replace(made, context=0, slack=0.0)
    assert "Fits" in table(made)
    assert "Fits" not in table(cpu)
    for excess in (0, 1):
        phase = Phase("policy", {"weights": int(48 * GIB * USABLE) + excess}, 0)
        fits = [dataclasses.replace(cpu, phases=(phase,)).fits(card) for card in CARDS]
        assert fits == [False, not excess, True, True]


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert train(["--plan", *TINY, "--per_device_train_batch_size", "2"]) == 0  # the demonstration
    shown = capsys.readouterr().out
    assert "1,101,632" in shown
    for word in ("weights", "optimizer states", "KV cache", "vision tower", "Peak", "Fits on one card of: 24 GB yes"):
        assert word in shown
    assert "To lower" not in shown
    shape = card_shape(2)
    shape.text_config.intermediate_size *= 6  # as large as one of ten layers, and planned in less time
    shape.save_pretrained(tmp_path)
    assert train(["--plan", "--config", "qwen2_5_vl_3b", "--model_name_or_path", str(tmp_path), *SHORT]) == 0
    shown = capsys.readouterr().out
    assert "24 GB no, 48 GB yes" in shown
    listed = shown.split("To lower")[1].splitlines()
    sizes = [float(line.split(": by ")[1].split()[0]) for line in listed if ": by " in line]
    assert "--lora.rank 64" in listed[1]
    assert len(sizes) > 1
    assert sizes == sorted(sizes, reverse=True)


def test_mistakes_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json can be read.*qwen2.5-vl-7b, .*qwen3-vl-4b"):
        plan(options("--model_name_or_path", str(tmp_path)))
    with pytest.raises(ConfigError, match=r"1120 video tokens.*200 of text is longer than the 512"):
        plan(options("--max_prompt_length", "512"))
    with pytest.raises(ConfigError, match=r"distributed.engine none.*got deepspeed"):
        plan(options("--distributed.engine", "deepspeed"))
    with pytest.raises(ConfigError, match="expected --check"):
        main([])


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--check", "--help"]])
def test_help_is_no_mistake(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: python -m videor1.plan --check [options of videor1.train]" in shown
    assert re.search(r"^  --check +\w", shown, re.MULTILINE)


def test_check_prints_plan_and_measured(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY, "--beta", "0.1", CHECKPOINTED, "--per_device_train_batch_size", "2"]
    assert main(["--check", "--device", "cpu", *flags]) == 0
    _, header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[-3:] == ["planned", "measured", "ratio"]
    ratios = {row.split()[0]: float(row.split()[-1]) for row in rows}
    assert ratios == pytest.approx(dict.fromkeys(("rollout", "reference", "policy", "optimizer"), 1), abs=WITHIN)
    assert ratios["policy"] == pytest.approx(1, abs=0.03)


def test_what_a_rollout_keeps_stays_in_every_phase() -> None:
    flags = ["--config", "demo", "--max_completion_length", "9", "--beta", "0", "--per_device_train_batch_size", "2"]
    plain, kept = (plan(options(*flags, *more), shape_of(None)) for more in ([], ["--rollout.keep_cache", "true"]))
    for before, after in zip(plain.phases[1:], kept.phases[1:], strict=True):
        assert after.parts["KV cache"] == kept.kv > 0
        assert "KV cache" not in before.parts
    # auto, on a card: where there is room for it beside training.
    assert (plain.kept, plain.keep_cache) == (kept.kept, "auto")
    assert plain.kept >= plain.kv
    assert abs(plain.room(80 * GIB) - kept.room(80 * GIB)) < MIB
    training = max(phase.bytes for phase in plain.phases if phase.name != "rollout")
    assert plain.room(10 * GIB) == int(10 * GIB - plain.context - training * (1 + plain.slack))
    assert dataclasses.replace(plain, kept=plain.room(int(24 * GIB * USABLE))).keeps(24)
    assert not dataclasses.replace(plain, kept=plain.room(int(24 * GIB * USABLE)) + 1).keeps(24)
    assert "Kept between rollouts: " in table(plain)
    never = dataclasses.replace(plain, kept=0)
    assert not never.keeps(141)
    assert "Kept" not in table(never)


def test_a_run_on_a_card_tells_its_engine_what_training_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 80 * GIB))
    made = SimpleNamespace(room=lambda memory: memory - 1)
    monkeypatch.setattr("videor1.plan.plan.plan", lambda config: made)
    for device, flags, room in (
        ("cuda", [], 80 * GIB - 1),
        ("cuda", ["--rollout.keep_cache", "true", "--rollout.decode_weights", "packed"], None),
        ("cpu", [], None),
    ):
        engine = LocalEngine(make_lm(), SamplingOptions(1))
        model = SimpleNamespace(device=torch.device(device))
        _plan_room(SimpleNamespace(engine=engine, model=model, config=options(*flags)))  # type: ignore[arg-type]
        assert engine.room == room
