"""The stream of records: its seeded order, its position, its skips, with and without decoding ahead."""

import hashlib
import itertools
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import entries, last_metrics, run_lines, trainer, write_data
from spies import spy

from videor1.config import DataConfig, TrainConfig, VideoConfig
from videor1.data import Dataset, load_samples
from videor1.data.order import SampleStream
from videor1.data.source import Source
from videor1.demo.assets import Assets
from videor1.errors import ConfigError, DataError
from videor1.seeding import derive_seed, generator
from videor1.training.tgrpo import Trainer
from videor1.types import Media, Sample, SampleError

Record = tuple[int, str]  # draw, problem_id


@pytest.fixture(scope="module")
def dataset(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three videos, an image, a text, and a video whose file is missing (problem_id bad)."""
    found = entries(assets.train)
    text = {key: value for key, value in found[0].items() if key != "path"} | {"data_type": "text", "problem_id": "t"}
    bad = found[0] | {"path": str(assets.folder / "gone.mp4"), "problem_id": "bad"}
    path = write_data(tmp_path_factory.mktemp("source") / "data.json", [*found[:2], bad, *found[2:], text])
    return load_samples(path, root="/")


class Reader:
    """A source that records its skips."""

    def __init__(self, dataset: Dataset, *, start: int = 0, refuse: Collection[str] = (), **data: Any) -> None:
        self.skips: list[tuple[int, str, str | None]] = []
        self.media: dict[int, Media | None] = {}

        def build(sample: Sample, media: Media | None, draw: int) -> Record:
            if sample.problem_id in refuse:
                raise SampleError("too_long", "refused")
            self.media[draw] = media
            return draw, sample.problem_id

        config = TrainConfig(
            seed=5, data=DataConfig(**{"workers": 0, **data}), video=VideoConfig(max_pixels=3136, min_pixels=3136)
        )
        self.source: Source[Record] = Source(dataset, config, build, on_skip=self.on_skip, start=start)

    def on_skip(self, draw: int, error: SampleError) -> None:
        self.skips.append((draw, error.kind, error.path))

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()


def expected_records(dataset: Dataset, shuffle: bool, count: int) -> list[Record]:
    stream = SampleStream(len(dataset), 5, shuffle)
    draws = ((draw, dataset.samples[stream.at(draw)].problem_id) for draw in range(10 * count))
    return [record for record in draws if record[1] != "bad"][:count]


@pytest.mark.grid(workers=[0, 1], shuffle=[True, False])
def test_order_position_and_skips(workers: int, shuffle: bool, dataset: Dataset) -> None:
    expected = expected_records(dataset, shuffle, 12)
    with Reader(dataset, shuffle=shuffle, workers=workers, prefetch=4) as reader:
        positions = []
        for record in expected:
            assert next(reader.source) == record
            positions.append(reader.source.position)
        # What was decoded ahead is not counted: a resumed run begins after the last record that was taken.
        assert positions == [draw + 1 for draw, _ in expected]
        bad = [draw for draw in range(expected[-1][0]) if draw not in dict(expected)]
        assert [draw for draw, _, _ in reader.skips] == bad
        assert {skip[1:] for skip in reader.skips} == {("missing_file", str(dataset.samples[2].path))}
        assert reader.source.skipped == {"missing_file": len(bad)}


@pytest.mark.parametrize("taken", [0, 1, 2, 4, 6, 7])
def test_going_on_from_a_position(taken: int, dataset: Dataset) -> None:
    with Reader(dataset, prefetch=7) as first:
        first.source.take(taken)
        position, skips = first.source.position, first.skips
    with Reader(dataset, prefetch=2, start=position) as second:
        records = second.source.take(12 - taken)
    expected = expected_records(dataset, True, 12)
    assert records == expected[taken:]
    draws = [draw for draw, _, _ in skips + second.skips]
    assert draws == sorted(set(range(expected[-1][0])) - dict(expected).keys())  # none lost, none twice


def test_records_carry_their_own_media_and_an_error_of_the_build_is_a_skip(dataset: Dataset) -> None:
    refused, *names = (sample.problem_id for sample in dataset.samples)
    with Reader(dataset, shuffle=False, refuse={refused}) as reader:
        records = reader.source.take(4)
    assert [name for _, name in records] == [name for name in names if name != "bad"]
    kinds = [None if (media := reader.media[draw]) is None else media.kind for draw, _ in records]
    assert kinds == ["video", "video", "image", None]
    assert reader.skips[0] == (0, "too_long", str(dataset.samples[0].path))
    assert reader.source.skipped == {"too_long": 1, "missing_file": 1}


def test_a_whole_pass_without_a_record_stops(dataset: Dataset, assets: Assets, tmp_path: Path) -> None:
    everything = {sample.problem_id for sample in dataset.samples}
    with Reader(dataset, refuse=everything) as reader, pytest.raises(DataError) as caught:
        reader.source.take(1)
    assert len(reader.skips) == len(dataset) == 6
    assert "none of its 6 samples can be used (too_long 5, missing_file 1). The last: " in str(caught.value)
    first = entries(assets.train)[0]
    one = write_data(tmp_path / "one.json", [first])
    gone = write_data(tmp_path / "gone.json", [first | {"path": "/gone.mp4"}])
    with Reader(load_samples(one, root="/")) as reader:
        assert [draw for draw, _ in reader.source.take(3)] == [0, 1, 2]
    message = r"none of its 1 samples can be used \(missing_file 1\)"
    with Reader(load_samples(gone, root="/")) as reader, pytest.raises(DataError, match=message):
        reader.source.take(1)


def test_failures_with_a_success_in_between_do_not_stop(dataset: Dataset) -> None:
    allowed = dataset.samples[4].problem_id
    others = {sample.problem_id for sample in dataset.samples} - {allowed}
    with Reader(dataset, refuse=others) as reader:
        assert [name for _, name in reader.source.take(40)] == [allowed] * 40
        draws = [draw for draw, _, _ in reader.skips]
    # Two epochs' orders put more failures in a row than there are samples.
    taken = [-1, *sorted(set(range(draws[-1] + 2)) - set(draws))]
    assert max(b - a - 1 for a, b in itertools.pairwise(taken)) > len(dataset)


def test_a_disk_cache_serves_the_next_source(dataset: Dataset, tmp_path: Path) -> None:
    kept, seen = tmp_path / "kept", []
    for decoded, from_disk in ((4, 0), (0, 4), (4, 0)):
        with Reader(dataset, shuffle=False, cache_mb=0, cache_dir=str(kept)) as reader:
            told: list[str] = []
            reader.source.on_report = told.append
            records = reader.source.take(5)
            stats = reader.source.stats
            assert (stats.loaded, stats.disk_hits, stats.cache_hits) == (decoded, from_disk, 0)
            seen.append((records, [None if m is None else m.patches.tolist() for m in reader.media.values()]))
        assert len(told) == stats.cache_damaged == (4 if len(seen) == 3 else 0)
        for file in kept.glob("*.safetensors") if len(seen) == 2 else ():
            file.write_bytes(b"")
    assert seen[0] == seen[1] == seen[2]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"data\.cache_dir: expected a folder"):
        Reader(dataset, cache_dir=str(tmp_path / "file"))


SUMMARY = "data, over the whole run: "


def screen(capfd: pytest.CaptureFixture[str], *beginnings: str) -> list[str]:
    """The lines on the screen that begin so."""
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith(beginnings)]


def test_metrics_of_runs_with_a_cache_on_disk(
    assets: Assets, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first decodes its 4 samples, the second reads them, and the third cannot use the folder and goes on."""
    (tmp_path / "file").write_text("x")
    for name, folder, decoded, from_disk in (
        ("cold", tmp_path / "kept", 4, 0),
        ("warm", tmp_path / "kept", 0, 4),
        ("none", tmp_path / "file" / "cache", 4, 0),
    ):
        trainer(assets, tmp_path / name, data__cache_dir=folder, max_steps=5).train()
        lines = run_lines(tmp_path / name, "metrics.jsonl")
        times = {key: value for key, value in lines[-1].items() if "time/data" in key}
        hits = {"time/data_memory_hits": 1, "time/data_disk_hits": from_disk, "time/data_decoded": decoded}
        assert times | hits == times
        decoders = {key.rpartition("/")[2]: times[key] for key in times.keys() - hits.keys()}
        assert decoders.pop("data") >= 0
        assert decoders.pop("data_share") < 1
        assert decoders == ({"pyav": 3, "pillow": 1} if decoded else {})
        shares = [line["time/data_share"] for line in lines]
        assert all(0 <= share < 1 for share in shares)
        assert shares[0] > 0
        assert shares[4] == 0  # from memory: it waited for nothing
        row = last_metrics(tmp_path / name)
        problems = {"data/changed_files": 0, "data/worker_deaths": 0, "data/cache_errors": 0, "data/cache_damaged": 0}
        problems["data/cache_errors"] = 5 if name == "none" else 0  # four reads, and a write before they pause
        assert row == last_metrics(tmp_path / "cold") | problems
        told = screen(capfd, SUMMARY, "disk cache: ")
        assert len([line for line in told if line.startswith("disk cache: read failed: ")]) == (name == "none")
        assert len([line for line in told if line.startswith("disk cache: write failed: ")]) == (name == "none")
        assert [line for line in told if SUMMARY in line] == [f"{SUMMARY}disk cache errors 5"] * (name == "none")


def test_a_file_that_changes_during_a_run_is_counted_over_its_resumption(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clip, first = tmp_path / "clip.mp4", entries(assets.train)[0]
    clip.write_bytes(Path(first["path"]).read_bytes())

    spy(monkeypatch, Trainer, "train_batch", lambda _, run: os.utime(clip, (5, 5)) if run.step == 1 else None)
    data = write_data(tmp_path / "data.json", [first | {"path": "clip.mp4"}])
    options: dict[str, Any] = {"dataset_name": data, "data__prefetch": 1, "num_train_epochs": 9}
    trainer(assets, tmp_path / "run", max_steps=3, **options).train()
    lines = run_lines(tmp_path / "run", "metrics.jsonl")
    # Drawn one ahead: what comes second was looked up before the file changed.
    assert [line["data/changed_files"] for line in lines] == [0, 0, 1]
    assert [line["time/data_decoded"] for line in lines] == [1, 1, 2]
    told = [f"changed while it was cached or decoded: {clip}; decoded anew", f"{SUMMARY}changed files 1"]
    assert screen(capfd, "changed while", SUMMARY) == told
    trainer(assets, tmp_path / "run", max_steps=4, resume="auto", **options).train()
    assert last_metrics(tmp_path / "run")["data/changed_files"] == 1
    assert screen(capfd, SUMMARY) == told[1:]


def order(count: int, samples: int, **options: int) -> list[int]:
    stream = SampleStream(samples, **{"seed": 1} | options)
    return [stream.at(draw) for draw in range(count)]


def test_stream_draws_every_sample_once_an_epoch_in_new_orders() -> None:
    draws = order(40, 10, seed=3)
    epochs = [tuple(draws[i : i + 10]) for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({*epochs, tuple(order(10, 10, seed=4))}) == 5
    expected = torch.randperm(10, generator=generator(3, "data", 2)).tolist()  # as documented
    assert list(epochs[2]) == expected
    assert order(7, 3, shuffle=False) == [0, 1, 2, 0, 1, 2, 0]


def test_stream_is_stateless() -> None:
    straight, stream = order(50, 7), SampleStream(7, seed=1)
    jumps = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    assert {draw: stream.at(draw) for draw in jumps} == dict(enumerate(straight))
    for start in (0, 20):
        drawn = itertools.islice(SampleStream(7, seed=1).iterate(start), 50 - start)
        assert list(drawn) == list(enumerate(straight))[start:]


def test_stream_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        SampleStream(0, seed=1)
    with pytest.raises(ValueError, match="draw: expected 0 or more, got -1"):
        SampleStream(3, seed=1).at(-1)


def test_derived_seeds_follow_their_documented_formula() -> None:
    # A change here changes the data order and the permutations of every run.
    digest = hashlib.sha256(b"i2:42s11:permutationi1:7s2:\xc3\xa9").digest()
    assert derive_seed(42, "permutation", 7, "é") == int.from_bytes(digest[:8], "big") >> 1
    assert derive_seed(42) == 5957220968500082653


def test_derived_seeds_differ_by_every_name() -> None:
    names = [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", ""), ("1",), (1,), (11,), (1, 1), (-1,), ("a", 1), (1, "a")]
    seeds = {derive_seed(seed, *name) for seed in (0, 1, -1, 2**70) for name in names}
    assert len(seeds) == 4 * len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_are_independent_and_seeded_by_their_names() -> None:
    draws = [torch.rand(3, generator=generator(5, "sampling", i)).tolist() for i in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]
    seeded = torch.Generator().manual_seed(derive_seed(5, "sampling", 1))
    assert draws[1] == torch.rand(3, generator=seeded).tolist()
