"""The stream of records: its order, its position, its skips, with and without decoding ahead."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from runs import entries, write_data

from videor1.config import DataConfig, TrainConfig, VideoConfig
from videor1.data import Dataset, SampleStream, load_samples
from videor1.demo.assets import Assets
from videor1.errors import DataError
from videor1.source import Source
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

    def __init__(self, dataset: Dataset, *, start: int = 0, refuse: frozenset[str] = frozenset(), **data: Any) -> None:
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

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()


def expected_records(dataset: Dataset, shuffle: bool, count: int) -> list[Record]:
    stream = SampleStream(len(dataset), 5, shuffle)
    draws = ((draw, dataset.samples[stream.at(draw)].problem_id) for draw in range(10 * count))
    return [record for record in draws if record[1] != "bad"][:count]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("ahead", [{"workers": 0}, {"workers": 1, "prefetch": 4}], ids=["here", "ahead"])
def test_order_position_and_skips(ahead: dict[str, int], shuffle: bool, dataset: Dataset) -> None:
    expected = expected_records(dataset, shuffle, 12)
    with Reader(dataset, shuffle=shuffle, **ahead) as reader:
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


@pytest.mark.parametrize("taken", range(8))
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


def test_records_carry_their_own_media(dataset: Dataset) -> None:
    with Reader(dataset, shuffle=False) as reader:
        records = reader.source.take(5)
    kinds = [None if (media := reader.media[draw]) is None else media.kind for draw, _ in records]
    assert kinds == ["video", "video", "video", "image", None]


def test_an_error_of_the_build_is_a_skip_with_the_samples_path(dataset: Dataset) -> None:
    refused = dataset.samples[0].problem_id
    with Reader(dataset, shuffle=False, refuse=frozenset({refused})) as reader:
        assert [name for _, name in reader.source.take(3)] == [dataset.samples[i].problem_id for i in (1, 3, 4)]
    assert reader.skips[0] == (0, "too_long", str(dataset.samples[0].path))
    assert reader.source.skipped == {"too_long": 1, "missing_file": 1}


def test_a_whole_pass_without_a_record_stops(dataset: Dataset) -> None:
    everything = frozenset(sample.problem_id for sample in dataset.samples)
    with Reader(dataset, refuse=everything) as reader, pytest.raises(DataError) as caught:
        reader.source.take(1)
    assert len(reader.skips) == len(dataset) == 6
    assert "none of its 6 samples can be used (too_long 5, missing_file 1). The last: " in str(caught.value)


def test_failures_with_a_success_in_between_do_not_stop(dataset: Dataset) -> None:
    allowed = dataset.samples[4].problem_id
    others = frozenset(sample.problem_id for sample in dataset.samples) - {allowed}
    with Reader(dataset, refuse=others) as reader:
        assert [name for _, name in reader.source.take(40)] == [allowed] * 40
        draws = [draw for draw, _, _ in reader.skips]
    # Two epochs' orders put more failures in a row than there are samples.
    taken = [-1, *sorted(set(range(draws[-1] + 2)) - set(draws))]
    assert max(b - a - 1 for a, b in itertools.pairwise(taken)) > len(dataset)


def test_a_data_set_of_one(assets: Assets, tmp_path: Path) -> None:
    one = load_samples(write_data(tmp_path / "one.json", entries(assets.train)[:1]), root="/")
    with Reader(one) as reader:
        assert [draw for draw, _ in reader.source.take(3)] == [0, 1, 2]
    missing = write_data(tmp_path / "gone.json", [entries(assets.train)[0] | {"path": "/gone.mp4"}])
    message = r"none of its 1 samples can be used \(missing_file 1\)"
    with Reader(load_samples(missing, root="/")) as reader, pytest.raises(DataError, match=message):
        reader.source.take(1)
