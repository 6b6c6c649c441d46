"""The demonstration's files: what is asked is what its clips show, and they are made whole, once, alike each time."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from random import Random

import jiwer
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil

from videor1.config import VideoConfig
from videor1.data import load_samples
from videor1.demo import assets as assets_module
from videor1.demo.assets import Assets, Sizes, make_assets
from videor1.demo.clips import PALETTES, RGB
from videor1.demo.questions import draw_questions, guessing_reward
from videor1.demo.tokenizer import make_tokenizer
from videor1.errors import ConfigError
from videor1.model.prompts import build_sft_ids, question_text, special_ids
from videor1.rewards import accuracy_reward, format_reward
from videor1.types import Sample
from videor1.video import read_frames
from videor1.video.media import load_media

SIZES = Sizes(sft_videos=8, sft_images=4, train_videos=8, train_images=2, dev_videos=4, test_videos=16, test_images=2)
LEAST = Sizes(1, 0, 1, 0, 1, 0, 1, 0)
SPLITS = ("sft", "train", "dev", "test")
VIDEO = VideoConfig(max_frames=8, fps=2.0, max_pixels=56 * 56, min_pixels=56 * 56)
OPTIONS = {"color": ["blue", "green", "red", "yellow"], "shape": ["circle", "cross", "square", "triangle"]}
PLACES = {"first": 0, "second": 1, "third": 2, "last": 3}
Samples = dict[str, list[Sample]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    return make_assets(tmp_path_factory.mktemp("demo") / "assets", seed=3, sizes=SIZES, progress=False)


@pytest.fixture(scope="module")
def samples(made: Assets) -> Samples:
    datasets = {split: load_samples(getattr(made, split), require_process=True) for split in SPLITS}
    assert not any(dataset.errors for dataset in datasets.values())
    return {split: list(dataset.samples) for split, dataset in datasets.items()}


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def seen(frame: np.ndarray) -> str:
    """The colour or shape of a frame, told from its pixels alone."""
    frame = frame.astype(float)
    if np.ptp(frame, axis=2).max() > 60:
        mean = frame.mean(axis=(0, 1))
        return min(RGB, key=lambda name: np.abs(mean - RGB[name]).sum())
    shape = frame.mean(axis=2) > 128
    side = len(shape)
    if not shape[side // 2, side // 2]:
        return "circle"
    rows, columns = shape.any(1).nonzero()[0], shape.any(0).nonzero()[0]
    inside = shape[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if inside.mean() > 0.9:
        return "square"
    return "triangle" if inside[-2].mean() > 0.8 else "cross"


def true_answer(problem: str, order: list[str]) -> str:
    """The answer to a question about what was seen, from the question's words."""
    words = problem.rstrip("?").split()
    if "order" in words:
        return " ".join(order)
    place = 0 if len(order) == 1 else PLACES[words[-1]] + ("after" in words) - ("before" in words)
    return "ABCD"[OPTIONS[words[1]].index(order[place])]


def test_counts_and_kinds(made: Assets, samples: Samples) -> None:
    for split in SPLITS:
        count = Counter(sample.data_type for sample in samples[split])
        assert all(count[kind] == getattr(SIZES, f"{split}_{kind}s") for kind in ("video", "image"))
    kinds = Counter(sample.data_source.removeprefix("demo/") for sample in samples["test"])
    assert kinds == {"ordinal/color": 8, "neighbour/color": 4, "list/shape": 4, "still/color": 1, "still/shape": 1}
    files = list((made.folder / "clips").iterdir())
    assert len({path.read_bytes() for path in files}) == len(files) == sum(vars(SIZES).values())  # no two are the same


def test_a_deck_of_questions_is_even() -> None:
    drawn = Counter(question.text for question in draw_questions(192, Random(5)))
    assert len(drawn) == 4 + 2 + 1
    for text, count in drawn.items():
        assert count == (48 if "order" in text else 24)


def test_answers_are_what_the_decoded_frames_show(samples: Samples) -> None:
    for sample in itertools.chain(*samples.values()):
        if sample.data_type == "image":
            order = [seen(np.array(Image.open(sample.path)))]
        else:
            names = [seen(frame) for frame in read_frames(sample.path, max_frames=8, fps=2.0).frames.numpy()]
            assert names[0::2] == names[1::2]
            order = names[0::2]
            assert len(set(order)) == 4
        answer = true_answer(sample.problem, order)
        assert sample.solution == f"<answer>{answer}</answer>"
        if sample.problem_type == "multiple choice":
            topic = "color" if "color" in sample.problem else "shape"
            assert sample.options == tuple(f"{'ABCD'[i]}. {name}" for i, name in enumerate(OPTIONS[topic]))
            word = OPTIONS[topic]["ABCD".index(answer)]
            place = "" if sample.data_type == "image" else list(PLACES)[order.index(word)] + " "
            assert sample.process == f"<think>{place}{word}</think>"
        else:
            assert sample.process == f"<think>{answer}</think>"
        completion = f"{sample.process}\n{sample.solution}"
        assert accuracy_reward(completion, sample.solution, sample.problem_type) == format_reward(completion) == 1.0


def test_every_frame_of_a_segment_decodes_to_the_same_pixels(samples: Samples) -> None:
    # Otherwise the traces that compression leaves in a frame could tell its place to a model that sees it shuffled.
    for sample in samples["sft"]:
        if sample.data_type == "video":
            clip = read_frames(sample.path, max_frames=32, fps=8.0)
            assert (clip.frames.shape, clip.source_fps) == ((32, 112, 112, 3), 8.0)
            segments = clip.frames.unflatten(0, (4, 8))
            assert torch.equal(segments, segments[:, :1].expand_as(segments))


def test_eight_sampled_frames_fall_two_in_each_segment(samples: Samples) -> None:
    clip = read_frames(samples["train"][0].path, max_frames=8, fps=2.0, max_pixels=56 * 56, min_pixels=56 * 56)
    assert clip.timestamps == tuple(number / 8 for number in (0, 4, 9, 13, 18, 22, 27, 31))
    media = load_media(samples["train"][0], VIDEO)
    assert (media.grid_thw, media.second_per_grid) == ((4, 4, 4), 1.0)


def test_chance(made: Assets) -> None:
    words = OPTIONS["shape"]
    lists = [max(0.0, 1 - jiwer.wer(" ".join(words), " ".join(guess))) for guess in itertools.permutations(words)]
    entries = json.loads(made.test.read_text())
    assert guessing_reward([e for e in entries if e["problem_type"] == "OCR"]) == pytest.approx(np.mean(lists))
    assert made.chance == pytest.approx(0.75 * 0.25 + 0.25 * np.mean(lists))


def test_the_same_seed_gives_the_same_files_and_another_seed_others(made: Assets, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    again = make_assets(tmp_path / "again", seed=3, sizes=SIZES, progress=False)
    assert content(again.folder) == content(made.folder)
    assert torch.equal(torch.get_rng_state(), before)
    other = content(make_assets(tmp_path / "other", seed=4, sizes=SIZES, progress=False).folder)
    same = {name for name, digest in content(made.folder).items() if other[name] == digest}
    assert {Path(name).suffix for name in same} == {".json", ".jinja"}
    assert all(Path(name).parent.name == "model" for name in same)
    # One split does not shift another.
    sizes = Sizes(1, 0, SIZES.train_videos, SIZES.train_images, 1, 0, 1, 0)
    small = make_assets(tmp_path / "small", seed=3, sizes=sizes, progress=False)
    assert small.train.read_bytes() == made.train.read_bytes()


def test_complete_files_are_used_again_and_incomplete_ones_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "assets"
    first = make_assets(folder, sizes=LEAST, progress=False)
    before, clip = content(folder), folder / "clips" / "sft-0000.mp4"
    changed = {path: path.stat().st_mtime_ns for path in (clip, folder / "demo.json")}
    assert make_assets(folder, sizes=LEAST, progress=False) == first
    assert {path: path.stat().st_mtime_ns for path in changed} == changed

    clip.unlink()
    make_assets(folder, sizes=LEAST, progress=False)
    assert content(folder) == before
    (folder / "model" / "model.safetensors").write_bytes(b"cut")
    make_assets(folder, sizes=LEAST, progress=False)
    assert content(folder) == before

    make_assets(folder, sizes=LEAST, seed=1, progress=False)
    assert content(folder).keys() == before.keys()
    assert content(folder) != before
    assert [path.name for path in folder.parent.iterdir()] == ["assets"]

    def fail(*_: object) -> None:
        raise OSError("disk full")

    before = content(folder)
    monkeypatch.setattr(assets_module, "save_model", fail)
    with pytest.raises(OSError, match="disk full"):
        make_assets(folder, sizes=LEAST, progress=False)
    assert content(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["assets"]


def test_a_folder_of_someone_else_and_sizes_below_the_least_are_refused(tmp_path: Path) -> None:
    for name, least in (("train_videos", 1), ("test_images", 0)):
        with pytest.raises(ValueError, match=f"sizes.{name}: expected at least {least}, got {least - 1}"):
            make_assets(tmp_path / "assets", sizes=Sizes(**{name: least - 1}))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="Name another folder"):
        make_assets(tmp_path, sizes=SIZES)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_tokenizer_loads_back(made: Assets) -> None:
    loaded, fresh = AutoTokenizer.from_pretrained(made.model), make_tokenizer()
    assert isinstance(loaded, Qwen2Tokenizer)
    assert loaded.get_vocab() == fresh.get_vocab()
    assert loaded.chat_template == fresh.chat_template
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    texts = "third red", "Grüße, don't! 12 日本語 🎞\r\n\n  end ", "<think>x</think>\n<answer>C</answer>", "\x00\x7f"
    for text in texts:
        ids = loaded(text)["input_ids"]
        assert ids == fresh(text)["input_ids"]
        assert loaded.decode(ids, skip_special_tokens=True) == text


def test_words_are_single_tokens_and_only_special_tokens_are_skipped() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("<|vision_start|><|video_pad|><|vision_end|><think>red</think><|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>red</think>"
    assert set(ids) & set(special_ids(tokenizer).vision) == {ids[0], ids[1], ids[2]}
    for word in itertools.chain(*PALETTES.values()):
        assert len(tokenizer.tokenize(f" {word}")) == len(tokenizer.tokenize(word)) == 1
    assert len(tokenizer.tokenize("<think>third red</think>\n<answer>C</answer>")) == 8


def test_chat_template() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "That."},
    ]
    assert make_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        "Which?<|im_end|>\n<|im_start|>assistant\nThat.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_prompts_and_answers_are_short(made: Assets, samples: Samples) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    for sample in samples["test"]:
        ids, answer = build_sft_ids(tokenizer, sample, load_media(sample, VIDEO), 100)
        assert len(ids) - answer.sum() <= 77
        assert answer.sum() == (14 if sample.problem_type == "OCR" else 9 if sample.data_type == "video" else 8)
        assert question_text(sample) in tokenizer.decode(ids)


def test_model_loads_and_sees(made: Assets, samples: Samples) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(made.model, output_loading_info=True)
    assert not any(info.values())
    assert 1e6 < model.num_parameters() < 3e6
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings
    ids = special_ids(tokenizer)
    assert model.generation_config.eos_token_id == [ids.eos, ids.pad]
    assert (model.config.video_token_id, model.config.image_token_id) == (ids.video_pad, ids.image_pad)

    still = next(sample for sample in samples["test"] if sample.data_type == "image")
    pixels = Qwen2VLImageProcessorPil.from_pretrained(made.model)(Image.open(still.path), return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [list(load_media(still, VIDEO).grid_thw)]
    assert model.model.get_image_features(**pixels).pooler_output[0].shape == (4, 128)
