"""The server engine itself: in which order it asks, what it stops, and how it hands over weights."""

import asyncio
import dataclasses
import itertools
import sys
import threading
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest
from asking import TEXT, VIDEO, ask_once, has_media, is_shuffled, make_engine, request, wait_until
from fake_server import Body, FakeServer, Reply, completion
from patience import PATIENCE
from rollouts import Judge

from videor1.errors import ConfigError
from videor1.rollout.protocol import RolloutError
from videor1.seeding import derive_seed


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_than_concurrency_requests_are_in_flight(server: FakeServer, concurrency: int) -> None:
    def respond(body: Body, _: int) -> Reply:
        wait_until(lambda: server.most_in_flight >= concurrency)
        return Reply(body=completion(body), delay=0.03)

    server.respond = respond
    rollout = make_engine(server, concurrency=concurrency).generate([request(VIDEO, 4, 2), request(TEXT, 4)])
    assert server.most_in_flight == concurrency
    assert (len(server.asked), rollout.failed) == (10, {})


def test_ordered_answers_are_asked_for_first_then_the_shuffled_ones_that_matter(server: FakeServer) -> None:
    maybe, surely = Judge(None), Judge(None, True)
    other = dataclasses.replace(VIDEO, draw=9)
    make_engine(server, concurrency=1).generate([request(VIDEO, 1, 1, maybe), request(other, 1, 1, surely)])
    seeds = [derive_seed(7, *names) % 2**31 for names in (("ordered", 1, 0), ("ordered", 9, 0), ("shuffled", 9, 0))]
    assert [body["seed"] for body in server.asked[:3]] == seeds
    assert len(server.asked) == 4
    # Those that cannot matter are never asked for.
    server.asked.clear()
    judge = Judge(None, None, False)
    rollout = make_engine(server, concurrency=1).generate([request(VIDEO, 2, 3, judge)])
    assert not any(map(is_shuffled, server.asked))
    assert len(judge.ordered) == len(server.asked) == 2
    assert (rollout.groups[0].shuffled, rollout.groups[0].shuffled_asked) == ((), 3)
    stats = rollout.stats
    assert (stats.shuffled_asked, stats.shuffled_skipped, stats.shuffled_stopped) == (3, 3, 0)


def hold_shuffled(server: FakeServer) -> None:
    """Of VIDEO, shuffled answers never come, and the ordered one once two of them are under way; of TEXT once they were
    stopped, so that the server stops too."""
    under_way = threading.Barrier(3)

    def respond(body: Body, _: int) -> Reply:
        if not has_media(body):
            wait_until(lambda: server.cut_off == 2)
            return Reply(body=completion(body))
        under_way.wait(PATIENCE)
        return Reply(body=completion(body), delay=2 * PATIENCE if is_shuffled(body) else 0.0)

    server.respond = respond


def test_shuffled_answers_in_flight_are_stopped_once_they_cannot_matter(server: FakeServer) -> None:
    hold_shuffled(server)
    judge = Judge(None, False)
    rollout = make_engine(server, concurrency=4).generate([request(VIDEO, 1, 4, judge), request(TEXT, 1)])
    stats = rollout.stats
    assert (stats.shuffled_asked, stats.shuffled_skipped, stats.shuffled_stopped) == (4, 2, 2)
    assert (len(rollout.groups[0].ordered), rollout.groups[0].shuffled, rollout.failed) == (1, (), {})
    assert (judge.shuffled, len(server.asked)) == ([], 4)
    # Those that ended before are kept.
    judge = Judge(None, False)

    def respond(body: Body, _: int) -> Body:
        if not is_shuffled(body):
            wait_until(lambda: bool(judge.shuffled))
        return completion(body)

    server.respond = respond
    rollout = make_engine(server, concurrency=2).generate([request(VIDEO, 1, 1, judge)])
    assert len(rollout.groups[0].shuffled) == len(judge.shuffled) == 1
    assert (rollout.stats.shuffled_skipped, rollout.stats.shuffled_stopped) == (0, 0)
    # An interrupt stops the requests, too.
    server.cut_off = 0
    hold_shuffled(server)
    judge = MagicMock(spec=Judge, needed=None)
    judge.ordered_done.side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        make_engine(server).generate([request(VIDEO, 1, 2, judge)])
    wait_until(lambda: server.cut_off == 2)


def test_nothing_is_left_behind(server: FakeServer, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    engine = make_engine(server, tmp_path)
    assert engine.generate([]).groups == server.asked == []
    engine.generate([request(VIDEO, 3, 2), request(TEXT, 2)])
    engine.weights_changed()
    engine.close()
    engine.close()
    wait_until(lambda: set(threading.enumerate()) <= before)  # the server's threads end with their connections

    async def notebook() -> int:
        return len(make_engine(server).generate([request(TEXT, 2)]).groups[0].ordered)

    assert asyncio.run(notebook()) == 2, "where an event loop runs"


def test_the_key_comes_from_the_caller_or_the_environment(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    ask_once(server)
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    ask_once(server)
    ask_once(server, api_key="given")
    assert server.keys == ["Bearer EMPTY", "Bearer from-environment", "Bearer given"]


def test_options_that_cannot_work_are_refused(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, message in (
        ({"url": "localhost:8000"}, "http://host:8000/v1, got 'localhost:8000'"),
        ({"sync": "vlm"}, "did you mean 'vllm'"),
        ({"shuffle_unit": "patch"}, "shuffle_unit: expected one of 'frame', 'temporal_patch'"),
        ({"timeout": 0}, "timeout: expected a finite number above 0"),
        ({"retries": -1}, "retries: expected a finite number of 0 or more"),
        ({"concurrency": 0}, "concurrency: expected a finite number of 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            make_engine(server, **changes)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[server\]"'):
        make_engine(server)


def test_weights_are_handed_over_whole_and_the_caches_dropped(server: FakeServer, tmp_path: Path) -> None:
    events: list[str] = []

    def save(folder: Path) -> None:
        assert folder == tmp_path / "next"
        folder.mkdir()
        (folder / "model.safetensors").write_text(f"version {len(events)}")
        events.append("save")

    def control(path: str, body: Body) -> Reply | Body:
        events.append(path)
        if path != "/collective_rpc":
            return Reply(body={"success": True} if "prefix" in path else "")
        folder = Path(body["kwargs"]["weights_path"])
        events.append((folder / "model.safetensors").read_text())
        assert folder.parent == tmp_path
        assert [p.name for p in tmp_path.iterdir()] == [folder.name]  # the whole of it, and nothing else
        assert body["method"] == "reload_weights"
        return {"results": [None]}

    server.control = control
    (tmp_path / "next").mkdir()
    (tmp_path / "next" / "half").touch()  # a run was killed
    engine = make_engine(server, tmp_path, save_weights=save)
    handed = []
    for _ in range(2):
        engine.weights_changed()
        handed.append(server.controlled[-3][1]["kwargs"]["weights_path"])
    after = ["/reset_prefix_cache?reset_running_requests=true", "/reset_encoder_cache"]
    assert events == ["save", "/collective_rpc", "version 0", *after, "save", "/collective_rpc", "version 5", *after]
    assert handed[0] != handed[1]  # a server could take the same path for the same weights
    assert [str(p) for p in tmp_path.iterdir()] == handed[1:]


def test_a_hand_over_that_fails_is_an_error(server: FakeServer, tmp_path: Path) -> None:
    calls = ("/collective_rpc", "/reset_prefix_cache", "/reset_encoder_cache")
    for path, status in itertools.product(calls, (404, 500)):
        server.control = lambda asked, _, at=(path, status): Reply(at[1], "what?") if asked.startswith(at[0]) else {}
        with pytest.raises(RolloutError, match=f"POST {path}.*: HTTP {status}: what.*VLLM_SERVER_DEV_MODE=1"):
            make_engine(server, tmp_path, retries=0).weights_changed()
        assert server.controlled[-1][0].startswith(path)  # nothing follows
    server.control = lambda path, body: {"success": False} if "prefix" in path else {}
    with pytest.raises(RolloutError, match=r"reset_prefix_cache.*refused: \{\"success\": false\}"):
        make_engine(server, tmp_path).weights_changed()
    server.controlled.clear()
    with pytest.raises(RolloutError, match="no space left"):
        make_engine(server, tmp_path, save_weights=Mock(side_effect=OSError("no space left"))).weights_changed()
    # Nor is a policy handed over that does not change.
    make_engine(server, tmp_path / "sync", sync="none").weights_changed()
    assert server.controlled == []
    assert not (tmp_path / "sync").exists()
