"""Opening and resuming a stream of many rows: seconds and memory, each measured in a process of its own.

``python -m benchmarks.stream [--rows 10000000] [--folder FOLDER]`` writes the rows as one JSONL file and as Parquet
shards (about 130 bytes a row, 1.3 GB of 10 million), measures, and deletes them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARDS, GROUP = 20, 50_000  # Parquet files, rows of a row group


def write_jsonl(path: Path, rows: int) -> None:
    with open(path, "w", buffering=2**20) as file:
        for i in range(rows):
            file.write(
                f'{{"problem_id":{i},"problem":"How many?","data_type":"text","problem_type":"numerical",'
                f'"solution":"<answer>{i % 97}</answer>"}}\n'
            )


def write_parquet(folder: Path, rows: int) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    same = {"problem": "How many?", "data_type": "text", "problem_type": "numerical"}
    each = -(-rows // SHARDS)
    for shard in range(SHARDS):
        numbers = range(shard * each, min((shard + 1) * each, rows))
        columns = {name: [value] * len(numbers) for name, value in same.items()}
        columns |= {"problem_id": [*map(str, numbers)], "solution": [f"<answer>{i % 97}</answer>" for i in numbers]}
        table = pyarrow.table(columns)
        pyarrow.parquet.write_table(table, folder / f"{shard:03d}.parquet", row_group_size=GROUP)


def measure(name: str, draw: int, saved: str) -> None:
    """In a fresh process: open, make the first draw; or go on at ``saved``. Prints JSON."""
    import torch

    from videor1.config import DataConfig
    from videor1.data.stream import Position, StreamOrder, open_dataset

    if not name.endswith("l"):
        import pyarrow.parquet  # noqa: F401 (an import, not a part of opening)
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = memory("VmRSS"), time.perf_counter()
    order = StreamOrder(open_dataset(name, DataConfig(stream=True)), 42, True)
    opened = time.perf_counter() - started
    first = next(order.iterate(order.begin(json.loads(saved))))
    found = {"open_s": opened, "first_row_s": time.perf_counter() - started, "draw": first.number}
    found["memory_mib"] = memory("VmHWM") - before
    if draw:  # the position after that many draws, by the rows of the windows before it
        made = 0
        for window in range(order.windows):
            rows = len(order._window(0, window)[1])
            if made + rows > draw:
                found["position"] = order.save(Position(draw, 0, window, draw - made))
                break
            made += rows
    print(json.dumps(found))


def memory(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, draw, saved = arguments.measure
        return measure(name, int(draw), saved)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        write_jsonl(folder / "rows.jsonl", arguments.rows)
        write_parquet(folder / "parquet", arguments.rows)
        for name in ("rows.jsonl", "parquet"):
            own = [sys.executable, __file__, "--measure", str(folder / name)]
            fresh = json.loads(subprocess.check_output([*own, str(7 * arguments.rows // 10), "0"]))
            position = json.dumps(fresh.pop("position"))
            print(f"{name}: opened {fresh}")
            print(f"{name}: resumed {json.loads(subprocess.check_output([*own, '0', position]))}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
