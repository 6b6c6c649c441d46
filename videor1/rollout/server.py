"""Answers from a server of the OpenAI protocol that holds a copy of the policy. For vLLM 0.19 or newer::

    VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen2.5-VL-7B-Instruct --trust-request-mm-kwargs

Development mode opens /collective_rpc and the cache resets, by which new weights reach the server; it lets whoever
reaches the port run code, so keep that port private. --trust-request-mm-kwargs (0.31 and newer; earlier ones need no
flag) lets a request say that frames are neither resampled nor resized, and how many seconds lie between them.
VLLM_BATCH_INVARIANT=1 makes a row's tokens independent of its batch mates where the GPU supports it. Take neither
--reasoning-parser nor --video-pruning-rate.

What the server samples from is not bit for bit the policy that is trained: its kernels round otherwise. The trainer
computes log-probs anew. vLLM and SGLang number text after a video by the rule ``paper`` of :mod:`videor1.positions`;
under ``transformers`` their answers to longer clips come from another policy, up to several nats a token away.

SGLang serves prompts of images and text alike; it takes no list of frames, and its weights only with ``sync="none"``.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from videor1.prompts import SpecialIds, question_text
from videor1.rollout.protocol import Branch, Request, Rollout, RolloutEngine, RolloutError, RolloutStats
from videor1.rollout.server_answer import AnswerReader
from videor1.rollout.server_client import RequestFailed, ServerClient, quoted
from videor1.rollout.server_media import media_fields, media_part
from videor1.sampling import SamplingOptions
from videor1.seeding import derive_seed
from videor1.types import Completion, Group
from videor1_kernels.checks import check_choice, check_number

_T = TypeVar("_T")


class ServerEngine(RolloutEngine):
    """One request per answer, each with its own seed, so that a row's tokens hang on its batch mates only through the
    server's rounding. Media travel with every request; the server encodes them once.

    Args:
        url: base of the API, such as ``http://host:8000/v1``.
        model: its name at the server; None: the only one served.
        tokenizer, special: the policy's.
        options: how answers are drawn.
        shuffle_unit: what permutations are of, "frame" or "temporal_patch".
        timeout: seconds one attempt at an answer may take, or at loading weights.
        retries: attempts after the first.
        concurrency: requests in flight at most.
        api_key: None: environment OPENAI_API_KEY, or "EMPTY".
        save_weights: writes the policy to a folder, in Hugging Face's format.
        sync_dir: where that folder is; the server must see it under the same path. It holds one at a time.
        sync: "vllm": :meth:`weights_changed` hands the weights over. "none": it does nothing, for a policy that does
            not change: the answers to one that does are off-policy.
    """

    needs_features = False

    def __init__(
        self,
        *,
        url: str,
        model: str | None = None,
        tokenizer: Any,
        special: SpecialIds,
        options: SamplingOptions,
        shuffle_unit: str = "frame",
        timeout: float = 600.0,
        retries: int = 3,
        concurrency: int = 64,
        api_key: str | None = None,
        save_weights: Callable[[Path], None],
        sync_dir: Path,
        sync: str = "vllm",
    ) -> None:
        check_choice("ServerEngine", "shuffle_unit", shuffle_unit, ("frame", "temporal_patch"))
        check_choice("ServerEngine", "sync", sync, ("vllm", "none"))
        check_number("ServerEngine", "timeout", timeout, above=0)
        check_number("ServerEngine", "retries", retries, at_least=0)
        check_number("ServerEngine", "concurrency", concurrency, at_least=1)
        self._connect = lambda: ServerClient(url, timeout=timeout, retries=retries, api_key=api_key)
        self._connect()  # a bad URL or a missing package shows now
        self._model, self._options, self._unit, self._concurrency = model, options, shuffle_unit, concurrency
        self._save_weights, self._sync_dir, self._sync = save_weights, sync_dir.absolute(), sync
        self._special, self._reader = special, AnswerReader(tokenizer, special, options)

    def generate(self, requests: Sequence[Request]) -> Rollout:
        """All answers. A group of which a row fails, its retries included, is given up alone. Raises RolloutError where
        all of them are, or where the server reads another prompt than ours.

        ``stats.tokens`` leaves out those of stopped answers, which a server does not tell.
        """
        return _run(self._generate(requests)) if requests else Rollout([])

    def weights_changed(self) -> None:
        """Hand the policy's weights over, and have the server forget what it computed with the old ones."""
        if self._sync == "vllm":
            _run(self._hand_over(self._write_weights()))

    def close(self) -> None:
        """Nothing outlives a call."""

    async def _generate(self, requests: Sequence[Request]) -> Rollout:
        stats = RolloutStats()
        groups = [_Group(request) for request in requests]
        async with self._connect() as client:
            try:
                self._model = self._model or _only(await client.models())
            except RequestFailed as failure:
                raise client.dead("no model to ask", failure) from None
            await self._answer_all(client, groups)
            stats.retries = client.retried
            failed = {i: group.failed for i, group in enumerate(groups) if group.failed}
            if len(failed) == len(groups):
                raise client.dead(f"none of {len(groups)} prompts was answered. The first", failed[0])
        for row in (row for group in groups for row in group.rows):
            stats.tokens += len(row.answer.token_ids) if row.answer else 0
            if row.shuffled:
                stats.shuffled_asked += 1
                stats.shuffled_skipped += not row.started
                stats.shuffled_stopped += row.stopped
        return Rollout([None if group.failed else group.result() for group in groups], stats, failed)

    async def _answer_all(self, client: ServerClient, groups: Sequence[_Group]) -> None:
        """Keep ``concurrency`` rows in flight, the most wanted first, until none is wanted."""
        waiting = sorted((row for group in groups for row in group.rows), key=lambda row: row.shuffled)
        running: dict[asyncio.Task[Completion], _Row] = {}
        try:
            while True:
                unwanted = [task for task, row in running.items() if not row.wanted]
                await _cancel(unwanted)
                for task in unwanted:
                    running.pop(task).stopped = True
                waiting = [row for row in waiting if row.wanted]
                while waiting and len(running) < self._concurrency:
                    row = min(waiting, key=_Row.priority)
                    waiting.remove(row)
                    row.started = True
                    running[asyncio.create_task(self._answer(client, row))] = row
                if not running:
                    return
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in running if task.done()]:
                    row = running.pop(task)
                    try:
                        row.done(task.result())
                    except RequestFailed as failure:
                        row.group.failed = row.group.failed or f"{row.name}: {failure}"
        finally:
            await _cancel(running)

    async def _answer(self, client: ServerClient, row: _Row) -> Completion:
        options, request, special = self._options, row.group.request, self._special
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": row.group.content(row, self._unit)}],
            "max_completion_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k or -1,
            # A model's generation_config.json must not have a say: Qwen2.5-VL's penalises repetition.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": derive_seed(request.seed, *row.branch.names, row.number) % 2**31,
            "logit_bias": {str(token): -100 for token in special.vision},
            "stop_token_ids": [special.eos, special.pad],
            "logprobs": self._reader.wants_logp,
            "return_token_ids": True,
            **media_fields(request.prompt.media),
        }
        return self._reader.read(await client.post("/chat/completions", body), request.prompt)

    def _write_weights(self) -> Path:
        """A new folder under a new name: a half-written one is never seen, nor one taken for the last."""
        try:
            self._sync_dir.mkdir(parents=True, exist_ok=True)
            for old in (self._sync_dir / "next", *self._sync_dir.glob("weights-[0-9]*")):
                shutil.rmtree(old, ignore_errors=True)  # loaded long ago, or left by a run that was killed
            self._save_weights(self._sync_dir / "next")
            folder = self._sync_dir / f"weights-{time.time_ns()}"
            os.replace(self._sync_dir / "next", folder)
        except OSError as error:
            raise RolloutError(f"rollout server: cannot write the weights to {self._sync_dir}: {error}") from error
        return folder

    async def _hand_over(self, folder: Path) -> None:
        # Answers computed with old keys, values or vision features would be off-policy; nothing but stray rows that
        # were cancelled can be running.
        steps: tuple[tuple[str, dict[str, Any]], ...] = (
            ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}),
            ("/reset_prefix_cache?reset_running_requests=true", {}),
            ("/reset_encoder_cache", {}),
        )
        async with self._connect() as client:
            for path, body in steps:
                try:
                    reply = await client.control(path, body)
                    if isinstance(reply, dict) and reply.get("success") is False:
                        raise RequestFailed(f"it was refused: {quoted(reply)}")
                except RequestFailed as failure:
                    what = f"the weights in {folder} were not handed over: POST {path}"
                    raise client.dead(what, f"{failure} (it takes vLLM with VLLM_SERVER_DEV_MODE=1)") from None


@dataclass(eq=False)
class _Row:
    """One answer wanted."""

    group: _Group
    branch: Branch
    number: int  # of the branch's rows
    shuffled: bool
    started: bool = False
    stopped: bool = False
    answer: Completion | None = None

    @property
    def name(self) -> str:
        return f"{'shuffled' if self.shuffled else 'ordered'} answer {self.number + 1} of {self.branch.count}"

    @property
    def wanted(self) -> bool:
        return not self.group.failed and not (self.shuffled and self.group.needs_shuffled is False)

    def priority(self) -> int:
        """Ordered answers first; then shuffled ones that matter, then those that may."""
        return 0 if not self.shuffled else 1 if self.group.needs_shuffled else 2

    def done(self, answer: Completion) -> None:
        self.answer = answer
        if judge := self.group.request.judge:
            (judge.shuffled_done if self.shuffled else judge.ordered_done)(answer)


@dataclass(eq=False)
class _Group:
    """A request and its rows."""

    request: Request
    failed: str | None = None  # why
    rows: list[_Row] = field(default_factory=list)
    _content: dict[bool, list[dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for branch in (self.request.ordered, self.request.shuffled):
            if branch is not None:
                shuffled = branch is self.request.shuffled
                self.rows += [_Row(self, branch, i, shuffled) for i in range(branch.count)]

    @property
    def needs_shuffled(self) -> bool | None:
        return self.request.judge.needed if self.request.judge else True

    def content(self, row: _Row, unit: str) -> list[dict[str, Any]]:
        """The user turn as the row's branch sees it: media, then text. Encoded once, kept until the last row has it."""
        prompt, kept = self.request.prompt, self._content
        if row.shuffled not in kept:
            media = [media_part(prompt.media, row.branch.permutation, unit)] if prompt.media else []
            kept[row.shuffled] = [*media, {"type": "text", "text": question_text(prompt.sample)}]
        return kept.pop(row.shuffled) if row.number == row.branch.count - 1 else kept[row.shuffled]

    def result(self) -> Group:
        ordered, shuffled = (tuple(r.answer for r in self.rows if r.shuffled is s and r.answer) for s in (False, True))
        branch = self.request.shuffled
        if branch is None:
            return Group(self.request.prompt, ordered)
        return Group(self.request.prompt, ordered, shuffled, branch.permutation, branch.count)


def _only(models: list[str]) -> str:
    if len(models) != 1:
        raise RequestFailed(f"the server has {len(models)} models ({', '.join(models)}): name one")
    return models[0]


async def _cancel(tasks: Any) -> None:
    """Stop requests; their connections are closed, by which the server knows."""
    for task in (tasks := list(tasks)):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """``work`` to its end: in this thread, or in another where this one's event loop runs (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
