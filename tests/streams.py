"""Shards of text samples for tests, and what is drawn from streams of them."""

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from videor1.config import DataConfig
from videor1.data.order import Draw
from videor1.data.stream import Position, RowStream, StreamOrder, open_dataset
from videor1.types import Sample


def row(number: Any, **changes: Any) -> dict[str, Any]:
    """A text sample; a field set to ... is left out."""
    entry = {"problem_id": number, "problem": f"{number}?", "data_type": "text", "problem_type": "numerical"}
    entry |= {"solution": f"<answer>{number}</answer>"} | changes
    return {name: value for name, value in entry.items() if value is not ...}


def json_lines(rows: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in rows)


def lines(numbers: Iterable[int]) -> bytes:
    return json_lines(map(row, numbers))


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


def order_of(stream: RowStream, **options: Any) -> StreamOrder:
    return StreamOrder(stream, **{"seed": 7, "shuffle": True} | options)


def drawn(stream: RowStream, count: int, **options: Any) -> list[Draw]:
    """The first draws of an order; its options are those of ``order_of``."""
    return list(itertools.islice(order_of(stream, **options).iterate(Position()), count))


def samples(stream: RowStream, count: int) -> list[Any]:
    """The first samples and errors in the order of the files."""
    return [draw.sample for draw in drawn(stream, count, shuffle=False)]


def ids(draws: Iterable[Draw]) -> list[str]:
    return [draw.sample.problem_id for draw in draws if isinstance(draw.sample, Sample)]


def parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 10) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size, data_page_size=100, compression="snappy")
