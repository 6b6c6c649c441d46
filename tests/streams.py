"""Shards of text samples for tests, and what is drawn from streams of them."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from videor1.config import DataConfig
from videor1.data.order import Draw
from videor1.data.stream import RowStream, StreamOrder, open_dataset
from videor1.types import Sample


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A text sample; a field set to ... is left out."""
    entry = {"problem_id": number, "problem": f"{number}?", "data_type": "text", "problem_type": "numerical"}
    entry |= {"solution": f"<answer>{number}</answer>"} | changes
    return {name: value for name, value in entry.items() if value is not ...}


def lines(numbers: range) -> bytes:
    return b"".join(json.dumps(row(i)).encode() + b"\n" for i in numbers)


def write_shards(folder: Path, count: int = 300, shards: int = 3) -> Path:
    """``count`` rows in JSONL shards of unequal sizes, and an empty one."""
    folder.mkdir(exist_ok=True)
    cuts = [0, *sorted(random.Random(count).sample(range(1, count), shards - 1)), count]
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        (folder / f"{i:03d}.jsonl").write_bytes(lines(range(start, stop)))
    (folder / "empty.jsonl").write_bytes(b"")
    return folder


def stream_of(name: Path | str, **data: Any) -> RowStream:
    stream = open_dataset(str(name), DataConfig(stream=True, **data))
    assert isinstance(stream, RowStream)
    return stream


def ids(draws: Iterator[Draw], count: int) -> list[str]:
    return [d.sample.problem_id for d in itertools.islice(draws, count) if isinstance(d.sample, Sample)]


def order_of(stream: RowStream, **options: Any) -> StreamOrder:
    return StreamOrder(stream, **{"seed": 7, "shuffle": True} | options)


def parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 10) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size, data_page_size=100, compression="snappy")
