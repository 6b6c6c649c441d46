"""A model class for lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval).

It runs lmms-eval's tasks with this library's video decoding and rollout engine:

    lmms-eval --model videor1 --model_args pretrained=FOLDER,max_frames=32 --tasks mvbench

lmms-eval must be installed; no other module of videor1 imports it.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from videor1.answer import extract_answer, whole_text
from videor1.config import IMAGE_MAX_PIXELS, VIDEO_MAX_PIXELS, DataConfig, EvaluateConfig, ModelConfig, VideoConfig
from videor1.data.prefetch import Prefetcher
from videor1.errors import ConfigError
from videor1.model import load_model
from videor1.model.features import prompt_features
from videor1.model.prompts import INSTRUCTION, encode, expand_media, place_media
from videor1.rollout import Branch, LocalEngine, Request, SamplingOptions
from videor1.types import Clip, Completion, DataType, Media, Prompt, PromptMedia, Sample, SampleError
from videor1.video.media import load_media, media_key
from videor1.video.patches import media_from_clip
from videor1.video.shuffle import draw_permutation
from videor1.video.still import rgb_of

_lmms: Any = import_module("lmms_eval.api.model").lmms
_instance: Any = import_module("lmms_eval.api.instance")
_log = logging.getLogger(__name__)

_BATCH_SIZE = 32  # prompts answered together, where lmms-eval's batch_size is 1 (its default)
_REASONING_TOKENS = 1024  # limit for a completion with reasoning, where max_new_tokens is not given
_GENERATION_OPTIONS = {"max_new_tokens", "temperature", "top_p", "top_k", "do_sample", "num_beams", "until"}


@dataclass(frozen=True)
class _Question:
    """A request of lmms-eval, converted for this library."""

    index: int  # in the list of requests
    conversation: list[dict[str, Any]]  # messages for the chat template
    sample: Sample  # its media are to be decoded; its index is the document's number
    image: Image.Image | None  # an image that lmms-eval holds in memory, in place of a file to decode
    names: tuple[str | int, ...]  # part of the sampling's seed
    until: tuple[str, ...]  # strings before which the answer is cut
    request: Any  # lmms-eval's own object


class VideoR1(_lmms):
    """Answers lmms-eval's generation requests with one video, one image or neither.

    A request whose media cannot be read is answered with an empty text, which tasks count as wrong. Each such request
    is logged, and their number at the end.

    Args:
        pretrained: a model's folder or hub id.
        think: ask for reasoning and tags as in training, and give the task the text in the answer tag (all that the
            model wrote if there is no tag). The task's own limit, which is for a bare answer, does not apply then.
        shuffle: show the frames in a seeded random order. The accuracy without it minus this one is the temporal gap.
        max_new_tokens: most tokens of a completion; None: 1024 with ``think``, else the task's limit.
        max_frames, fps, max_pixels, min_pixels, image_max_pixels: as the trainer's ``video.*`` options.
        max_prompt_length: most tokens of a prompt; a longer request counts as one that cannot be read.
        workers, timeout: as the trainer's ``data.*`` options.
        seed: seed of the sampling and the permutations.
        kernels: as the trainer's option.
        positions: as the trainer's ``model.positions``: paper, transformers, or by default as the model was trained.
        batch_size, max_batch_size, device: lmms-eval's own options. ``batch_size`` prompts are answered together; 1,
            its default, means 32. max_batch_size is not used.

    Raises:
        ConfigError: an option is wrong, or lmms-eval was started in several processes.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        *,
        think: bool = True,
        shuffle: bool = False,
        max_new_tokens: int | None = None,
        max_frames: int = 16,
        fps: float = 2.0,
        max_pixels: int = VIDEO_MAX_PIXELS,
        min_pixels: int | None = None,
        image_max_pixels: int = IMAGE_MAX_PIXELS,
        max_prompt_length: int = 16384,
        workers: int = 2,
        timeout: float = 60.0,
        seed: int = 42,
        kernels: Any = "auto",
        positions: Any = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | str | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("videor1 answers in one process: start lmms-eval without accelerate or torchrun")
        if not str(batch_size or 1).isdecimal():
            raise ConfigError(f"batch_size: expected a whole number, got {batch_size!r}")
        self.batch_size = int(batch_size or 1)
        self.think, self.shuffle, self.max_new_tokens = think, shuffle, max_new_tokens
        video = VideoConfig(
            max_frames=max_frames,
            fps=fps,
            max_pixels=max_pixels,
            min_pixels=min_pixels,
            image_max_pixels=image_max_pixels,
        )
        self.config = EvaluateConfig(
            model_name_or_path=pretrained,
            video=video,
            data=DataConfig(workers=workers, timeout=timeout),
            seed=seed,
            kernels=kernels,
            device=device or "auto",
            max_prompt_length=max_prompt_length,
            model=ModelConfig(positions=positions),
        )
        self.model = load_model(self.config)
        self.device = self.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests; return a ``GenerationResult`` for each, in their order."""
        results: list[Any] = [None] * len(requests)
        groups: dict[SamplingOptions, list[tuple[int, Any]]] = {}
        for item in enumerate(requests):
            groups.setdefault(self._sampling(item[1].args[2]), []).append(item)
        # Number of requests per document so far: a task may ask for several answers to one.
        seen: Counter[tuple[str | int, ...]] = Counter()
        failed: list[SampleError] = []
        progress = tqdm(total=len(requests), desc="videor1", unit="answer")
        for options, members in groups.items():
            batch_size = self.batch_size if self.batch_size > 1 else _BATCH_SIZE
            engine = LocalEngine(self.model, options, max_rows=2 * batch_size, backend=self.config.kernels)
            loaded = self._load_questions(members, seen)
            while block := list(itertools.islice(loaded, batch_size)):
                for question, outcome in self._answer(engine, block):
                    if isinstance(outcome, SampleError):
                        failed.append(outcome)
                        _log.warning("answered with an empty text: %s", outcome)
                        outcome = Completion(torch.zeros(0), torch.zeros(0), True, "")
                    results[question.index] = self._result(question, outcome)
                progress.update(len(block))
        progress.close()
        if failed:
            kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(e.kind for e in failed).items()))
            _log.warning(
                "%d of %d requests could not be read (%s) and count as wrong", len(failed), len(requests), kinds
            )
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError("videor1 answers in one round; this task needs several")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("videor1 generates answers; this task needs log-likelihoods of given ones")

    def _sampling(self, given: Mapping[str, Any]) -> SamplingOptions:
        """Convert the generation options of a request.

        Raises:
            ConfigError: the request asks for beam search.
        """
        if given.get("num_beams") not in (None, 1):
            raise ConfigError(f"num_beams: videor1 has no beam search, expected 1, got {given['num_beams']}")
        if unknown := sorted(name for name in given if name not in _GENERATION_OPTIONS and given[name] is not None):
            _warn_once(f"generation options that videor1 does not have are not used: {', '.join(unknown)}")
        limit = self.max_new_tokens or (_REASONING_TOKENS if self.think else int(given.get("max_new_tokens") or 128))
        temperature = 0.0 if given.get("do_sample") is False else float(given.get("temperature") or 0.0)
        if temperature == 0:
            return SamplingOptions(limit, 0.0)
        return SamplingOptions(limit, temperature, float(given.get("top_p") or 1.0), int(given.get("top_k") or 0))

    def _load_questions(
        self, members: Sequence[tuple[int, Any]], seen: Counter[tuple[str | int, ...]]
    ) -> Iterator[tuple[_Question, PromptMedia | SampleError]]:
        """Yield each request, converted, with its media, which worker processes decode ahead."""
        pending: deque[_Question] = deque()

        def samples() -> Iterator[Sample]:
            for index, request in members:
                pending.append(self._question(index, request, seen))
                yield pending[-1].sample

        data = self.config.data
        with Prefetcher(
            functools.partial(
                load_media, video=self.config.video, max_decoded_mb=data.max_decoded_mb, rules=self.model.family.frames
            ),
            workers=data.workers,
            depth=data.prefetch,
            timeout=data.timeout,
            cache_bytes=data.cache_mb * 2**20,
            key=media_key,
        ) as prefetcher:
            for _, outcome in prefetcher.iterate(samples()):
                question = pending.popleft()
                yield question, outcome if question.image is None else self._image(question.image)

    def _question(self, index: int, request: Any, seen: Counter[tuple[str | int, ...]]) -> _Question:
        """Convert a request.

        Raises:
            ConfigError: it has more than one video or image, or other media.
        """
        _, to_messages, given, number, task, split = request.args
        media: list[Any] = []
        conversation = []
        for message in to_messages(self.task_dict[task][split][number]):
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            media += [part for part in parts if part["type"] != "text"]
            plain = [{k: part[k] for k in ("type", "text") if k in part} for part in parts]
            conversation.append({"role": message["role"], "content": plain})
        if self.think:
            conversation[-1]["content"].append({"type": "text", "text": f"\n{INSTRUCTION}"})
        if len(media) > 1 or any(part["type"] not in ("image", "video") for part in media):
            kinds = [part["type"] for part in media]
            raise ConfigError(f"task {task}: videor1 takes one video or one image a question, got {kinds}")
        part: dict[str, Any] = media[0] if media else {"type": "text", "url": None}
        kind, source = part["type"], part["url"]
        image = source if isinstance(source, Image.Image) else None
        if media and image is None and not isinstance(source, (str, Path)):
            raise ConfigError(f"task {task}: expected the path of a {kind}, got {type(source).__name__}")
        sample = Sample(
            index=number,
            problem_id=f"{task}/{number}",
            problem="",
            data_type=_data_type("text" if image else kind),
            problem_type="free-form",
            solution="",
            path=Path(source) if media and image is None else None,
            start=part.get("start_time"),
            end=part.get("end_time"),
        )
        names = ("lmms-eval", task, number)
        until = given.get("until") or []
        stops = (until,) if isinstance(until, str) else tuple(until)
        question = _Question(index, conversation, sample, image, (*names, seen[names]), stops, request)
        seen[names] += 1
        return question

    def _answer(
        self, engine: LocalEngine, block: Sequence[tuple[_Question, PromptMedia | SampleError]]
    ) -> Iterator[tuple[_Question, Completion | SampleError]]:
        """Yield the completion of each question of a block, or the error for which there is none."""
        prompted: list[tuple[_Question, Prompt]] = []
        for question, media in block:
            try:
                if isinstance(media, SampleError):
                    raise media
                prompt = Prompt(question.sample, self._ids(question, media), media, question.sample.index)
                prompted.append((question, prompt))
            except SampleError as error:
                yield question, error
        prompts = [prompt for _, prompt in prompted]
        orders = [draw_permutation(p, "frame", self.config.seed) if self.shuffle else None for p in prompts]
        with self.model.inference():
            features = prompt_features(self.model, prompts, orders)
        requests = [
            Request(p, self.config.seed, Branch(1, question.names, media_features, order))
            for (question, p), media_features, order in zip(prompted, features, orders, strict=True)
        ]
        for (question, _), group in zip(prompted, engine.generate(requests).groups, strict=True):
            assert group is not None, "this engine never fails a single request"
            yield question, group.ordered[0]

    def _ids(self, question: _Question, media: PromptMedia) -> torch.Tensor:
        """Return the token ids of the conversation, with its media expanded.

        Raises:
            SampleError: ``special_token`` if a text of lmms-eval holds media tokens; ``bad_text``; ``too_long``.
        """
        tokenizer, special = self.model.tokenizer, self.model.special
        text = tokenizer.apply_chat_template(question.conversation, add_generation_prompt=True, tokenize=False)
        sample = question.sample
        ids = encode(tokenizer, text, sample)
        if (found := sum(ids.count(pad) for pad in (special.video_pad, special.image_pad))) != (media is not None):
            message = f"{sample.problem_id}: expected {int(media is not None)} media tokens, got {found}"
            raise SampleError("special_token", message, sample.path)
        if (placed := place_media(text, media, self.model.family, tokenizer)) != text:
            ids = encode(tokenizer, placed, sample)
        return expand_media(
            special,
            ids,
            sample,
            media,
            max_prompt_length=self.config.max_prompt_length,
            options="max_pixels, image_max_pixels or max_frames",
        )

    def _image(self, image: Image.Image) -> Media | SampleError:
        """Resize an image in memory as the trainer does with files, and cut it into patches."""
        started = time.perf_counter()
        video, rules = self.config.video, self.model.family.frames
        try:
            pixels = rgb_of(image, Path("image"), max_decoded_mb=self.config.data.max_decoded_mb)
            height, width = pixels.shape[:2]
            size = rules.size_of_image(Path("image"), height, width, video.image_min_pixels, video.image_max_pixels)
        except SampleError as error:
            return error
        clip = Clip(torch.from_numpy(pixels)[None], size, 0.0, (0.0,), 1, 0.0, "", "pillow")
        return media_from_clip(clip, "image", seconds=time.perf_counter() - started, rules=rules)

    def _result(self, question: _Question, completion: Completion) -> Any:
        """Return the answer in a completion as lmms-eval's result, and pass it to lmms-eval's cache."""
        text = completion.text
        if self.think:
            text = extract_answer(whole_text(self.model.opened_text, text)) or text
        for stop in question.until:
            text = text.partition(stop)[0] if stop else text
        context, _, given = question.request.args[:3]
        self.cache_hook.add_partial("generate_until", (context, given), text)
        counts = _instance.TokenCounts(output_tokens=len(completion.token_ids))
        return _instance.GenerationResult(text=text, token_counts=counts)


def _data_type(kind: str) -> DataType:
    assert kind in ("video", "image", "text"), kind
    return kind  # type: ignore[return-value]


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)
