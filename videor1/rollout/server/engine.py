"""The rollout engine that samples from a server with OpenAI's API, which holds a copy of the policy.

Start vLLM, 0.19 or newer, like this::

    VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen2.5-VL-7B-Instruct --trust-request-mm-kwargs

Development mode opens /collective_rpc and the cache resets, by which the server gets new weights. It also lets anyone
who can reach the port run code, so keep the port private. --trust-request-mm-kwargs (0.31 and newer; earlier versions
need no flag) lets a request say that frames are neither resampled nor resized, and how many seconds lie between them.
Qwen3-VL needs a version whose loader of frames takes ``frames_indices``; an earlier one writes other times into the
prompt, which is noticed and ends the run.
VLLM_BATCH_INVARIANT=1 makes a completion's tokens independent of the other sequences of its batch where the GPU
supports it. Use neither --reasoning-parser nor --video-pruning-rate.

The server does not sample from bit for bit the policy that is trained, since its kernels round differently. The trainer
therefore computes log-probs anew. vLLM and SGLang number text after a video by the rule ``paper`` of
:mod:`videor1.model.positions`; under ``transformers`` their completions of prompts with longer clips come from another
policy, up to several nats per token away.

SGLang serves prompts with images and text prompts in the same way. It takes no list of frames, and cannot be given new
weights: use ``sync="none"``.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from videor1.model.families import QWEN2_5_VL, Family
from videor1.model.prompts import SpecialIds, conversation, template_messages
from videor1.remote.client import MAX_BYTES, RequestFailed, ServerClient, quoted
from videor1.rollout.protocol import (
    Branch,
    Request,
    Rollout,
    RolloutEngine,
    RolloutError,
    RolloutStats,
    SamplingOptions,
)
from videor1.rollout.server.answer import AnswerReader
from videor1.rollout.server.media import media_fields, media_part
from videor1.seeding import derive_seed
from videor1.types import Completion, Group
from videor1_kernels.checks import check_choice, check_number

BYTES_PER_TOKEN = 1024  # most that a reply may take for a token of its answer, with its log-prob

_T = TypeVar("_T")


class ServerEngine(RolloutEngine):
    """Samples each completion by one request to a server.

    Each request has its own seed, so that the tokens of a completion depend on the other sequences of its batch only
    through the server's rounding. Media are sent with every request; the server encodes them once.

    Args:
        url: base of the API, such as ``http://host:8000/v1``.
        model: the model's name at the server; None: the only one served.
        tokenizer, special, family: those of the policy.
        options: how completions are sampled.
        shuffle_unit: what permutations are of, "frame" or "temporal_patch".
        timeout: seconds that one attempt at a completion, or at loading weights, may take to the end of its reply.
        retries: attempts after the first.
        concurrency: most requests in flight.
        api_key: None: environment OPENAI_API_KEY, or "EMPTY".
        save_weights: writes the policy to a folder, in Hugging Face's format.
        sync_dir: folder for the weights, one copy at a time; the server must see it under the same path.
        sync: "vllm": :meth:`weights_changed` has the server load the weights. "none": it does nothing, which is right
            only for a policy that does not change; completions of one that does are off-policy.
    """

    needs_features = False

    def __init__(
        self,
        *,
        url: str,
        model: str | None = None,
        tokenizer: Any,
        special: SpecialIds,
        family: Family = QWEN2_5_VL,
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
        max_bytes = MAX_BYTES + BYTES_PER_TOKEN * options.max_new_tokens
        self._connect = lambda: ServerClient(
            url, timeout=timeout, retries=retries, api_key=api_key, max_bytes=max_bytes
        )
        self._connect()  # Raises now for a bad URL or a missing package.
        self._model, self._options, self._unit, self._concurrency = model, options, shuffle_unit, concurrency
        self._save_weights, self._sync_dir, self._sync = save_weights, sync_dir.absolute(), sync
        self._family, self._special, self._reader = family, special, AnswerReader(tokenizer, special, options)

    def generate(self, requests: Sequence[Request]) -> Rollout:
        """Sample the completions of all requests.

        If a completion and its retries fail, only its request fails. ``stats.tokens`` does not count the tokens of
        stopped completions, which a server does not report.

        Raises:
            RolloutError: all requests failed, or the server has read another prompt than the one that was sent.
        """
        return _run(self._generate(requests)) if requests else Rollout([])

    def weights_changed(self) -> None:
        """Have the server load the policy's weights, and empty the caches that it computed with the old ones."""
        if self._sync == "vllm":
            _run(self._load_weights(self._write_weights()))

    def close(self) -> None:
        """Do nothing: the engine holds no resources between calls."""

    async def _generate(self, requests: Sequence[Request]) -> Rollout:
        stats = RolloutStats()
        groups = [_PendingGroup(request) for request in requests]
        async with self._connect() as client:
            try:
                self._model = self._model or _only_model(await client.models())
            except RequestFailed as failure:
                raise _fatal(client, "no model to ask", failure) from None
            await self._sample_all(client, groups)
            stats.retries = client.retried
            failed = {i: group.failed for i, group in enumerate(groups) if group.failed}
            if len(failed) == len(groups):
                raise _fatal(client, f"none of {len(groups)} prompts was answered. The first", failed[0])
        for pending in (pending for group in groups for pending in group.pending):
            stats.tokens += len(pending.completion.token_ids) if pending.completion else 0
            if pending.shuffled:
                stats.shuffled_asked += 1
                stats.shuffled_skipped += not pending.started
                stats.shuffled_stopped += pending.stopped
        return Rollout([None if group.failed else group.result() for group in groups], stats, failed)

    async def _sample_all(self, client: ServerClient, groups: Sequence[_PendingGroup]) -> None:
        """Keep ``concurrency`` requests in flight, in the order of their priority, until no completion is needed.

        Completions that may be needed do not wait for late scores: those that arrive meanwhile may stop them.
        """
        waiting = sorted((p for group in groups for p in group.pending), key=lambda pending: pending.shuffled)
        running: dict[asyncio.Task[Completion], _PendingCompletion] = {}
        arrivals = _Arrivals()
        try:
            while True:
                arrivals.settle(groups)
                unneeded = [task for task, pending in running.items() if not pending.needed]
                await _cancel(unneeded)
                for task in unneeded:
                    running.pop(task).stopped = True
                waiting = [pending for pending in waiting if pending.needed]
                while waiting and len(running) < self._concurrency:
                    pending = min(waiting, key=_PendingCompletion.priority)
                    waiting.remove(pending)
                    pending.started = True
                    running[asyncio.create_task(self._sample(client, pending))] = pending
                if not running:
                    return
                await arrivals.wait(running)
                for task in [task for task in running if task.done()]:
                    pending = running.pop(task)
                    try:
                        pending.done(task.result())
                    except RequestFailed as failure:
                        pending.group.failed = pending.group.failed or f"{pending.name}: {failure}"
        finally:
            await _cancel(running)

    async def _sample(self, client: ServerClient, pending: _PendingCompletion) -> Completion:
        """Request one completion from the server."""
        options, request, special = self._options, pending.group.request, self._special
        body = {
            "model": self._model,
            "messages": pending.group.messages(pending, self._unit),
            "max_completion_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k or -1,
            # These override the model's generation_config.json: that of Qwen2.5-VL penalises repetition.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": derive_seed(request.seed, *pending.branch.names, pending.number) % 2**31,
            "logit_bias": {str(token): -100 for token in special.vision},
            "stop_token_ids": [special.eos, special.pad],
            "logprobs": self._reader.logp_usable,
            "return_token_ids": True,
            **media_fields(request.prompt.media, self._family),
        }
        if request.prompt.sample.chat_template_kwargs:
            body["chat_template_kwargs"] = dict(request.prompt.sample.chat_template_kwargs)
        return self._reader.read(await client.post("/chat/completions", body), request.prompt)

    def _write_weights(self) -> Path:
        """Write the weights to a folder with a new name, and return it.

        The name is given once the folder is complete, and is never used twice, so that the server can neither read an
        incomplete folder nor mistake it for the last one.
        """
        try:
            self._sync_dir.mkdir(parents=True, exist_ok=True)
            for old in (self._sync_dir / "next", *self._sync_dir.glob("weights-[0-9]*")):
                shutil.rmtree(old, ignore_errors=True)  # The server has loaded it, or a killed run has left it.
            self._save_weights(self._sync_dir / "next")
            folder = self._sync_dir / f"weights-{time.time_ns()}"
            os.replace(self._sync_dir / "next", folder)
        except OSError as error:
            raise RolloutError(f"rollout server: cannot write the weights to {self._sync_dir}: {error}") from error
        return folder

    async def _load_weights(self, folder: Path) -> None:
        """Have the server load the weights in ``folder`` and empty its caches."""
        # Completions that use old keys, values or vision features would be off-policy. Only requests that were
        # cancelled can still be running.
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
                    problem = f"the weights in {folder} were not handed over: POST {path}"
                    reason = f"{failure} (it takes vLLM with VLLM_SERVER_DEV_MODE=1)"
                    raise _fatal(client, problem, reason) from None


@dataclass(eq=False)
class _PendingCompletion:
    """A completion to sample, and its state."""

    group: _PendingGroup
    branch: Branch
    number: int  # index in its branch
    shuffled: bool
    started: bool = False
    stopped: bool = False
    completion: Completion | None = None

    @property
    def name(self) -> str:
        """The completion's name in error messages."""
        return f"{'shuffled' if self.shuffled else 'ordered'} answer {self.number + 1} of {self.branch.count}"

    @property
    def needed(self) -> bool:
        """Whether its group has not failed, and it may still change the advantages."""
        return not self.group.failed and not (self.shuffled and self.group.needs_shuffled is False)

    def priority(self) -> int:
        """Return 0 for ordered completions, 1 for shuffled ones that are needed, 2 for those that may be."""
        return 0 if not self.shuffled else 1 if self.group.needs_shuffled else 2

    def done(self, completion: Completion) -> None:
        """Store the completion and report it to the group's judge."""
        self.completion = completion
        if judge := self.group.request.judge:
            (judge.shuffled_done if self.shuffled else judge.ordered_done)(completion)


@dataclass(eq=False)
class _PendingGroup:
    """A request and its completions, those from ordered frames first."""

    request: Request
    failed: str | None = None  # the reason
    pending: list[_PendingCompletion] = field(default_factory=list)
    _messages: dict[bool, list[dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for branch in (self.request.ordered, self.request.shuffled):
            if branch is not None:
                shuffled = branch is self.request.shuffled
                self.pending += [_PendingCompletion(self, branch, i, shuffled) for i in range(branch.count)]

    @property
    def needs_shuffled(self) -> bool | None:
        return self.request.judge.needed if self.request.judge else True

    def messages(self, pending: _PendingCompletion, unit: str) -> list[dict[str, Any]]:
        """Return the turns of a completion's branch, as the prompt has them, with their media.

        They are encoded once per branch, and kept until the last completion of the branch is requested.
        """
        prompt, cache, shuffled = self.request.prompt, self._messages, pending.shuffled
        if shuffled not in cache:
            orders = prompt.orders(pending.branch.permutation)
            media = iter([media_part(one, order, unit) for one, order in zip(prompt.all_media, orders, strict=True)])
            filled = template_messages(conversation(prompt.sample))
            for message in filled:
                if isinstance(message["content"], list):
                    message["content"] = [part if "text" in part else next(media) for part in message["content"]]
            cache[shuffled] = filled
        return cache.pop(shuffled) if pending.number == pending.branch.count - 1 else cache[shuffled]

    def result(self) -> Group:
        """Return the request's prompt with the completions that were sampled to their end."""
        ordered, shuffled = (
            tuple(p.completion for p in self.pending if p.shuffled is s and p.completion) for s in (False, True)
        )
        branch = self.request.shuffled
        if branch is None:
            return Group(self.request.prompt, ordered)
        return Group(self.request.prompt, ordered, shuffled, branch.permutation, branch.count)


class _Arrivals:
    """Wakes the engine when a late score arrives that some running completion may not be needed for."""

    def __init__(self) -> None:
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        self._watched: set[Future[Any]] = set()

    def settle(self, groups: Sequence[_PendingGroup]) -> None:
        """Take the scores into account that have arrived, and watch the others."""
        self._arrived.clear()
        for late in (group.request.late for group in groups):
            if late is None:
                continue
            late.settle(wait=False)
            for score in late.unsettled:
                if score not in self._watched:
                    self._watched.add(score)
                    score.add_done_callback(self._wake)

    async def wait(self, running: Collection[asyncio.Task[Completion]]) -> None:
        """Wait for the end of a request, or for a score."""
        arrival = asyncio.create_task(self._arrived.wait())
        try:
            await asyncio.wait([*running, arrival], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel([arrival])

    def _wake(self, _: object) -> None:
        """Called in the thread of the scores, or at once where one has just arrived."""
        with suppress(RuntimeError):  # The rollout has ended, and its loop with it.
            self._loop.call_soon_threadsafe(self._arrived.set)


def _fatal(client: ServerClient, problem: str, reason: object) -> RolloutError:
    """Return the error to raise where the engine cannot go on."""
    return RolloutError(f"{client.url}: {problem}: {reason}\n{client.advice()}")


def _only_model(models: list[str]) -> str:
    if len(models) != 1:
        raise RequestFailed(f"the server has {len(models)} models ({quoted(', '.join(models))}): name one")
    return models[0]


async def _cancel(tasks: Any) -> None:
    """Cancel requests; closing their connections tells the server to stop."""
    for task in (tasks := list(tasks)):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run ``work`` to its end: in this thread, or in another one if an event loop runs in this one (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
