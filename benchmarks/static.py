"""Floors and predictions without a GPU: ``python -m benchmarks.static`` compiles every shipped kernel for sm_90.

For each it prints what the compiler made of it (registers, shared memory, programs that a multiprocessor has room for,
instructions of the main loop) and, at a 7B model's shapes, what must be moved and multiplied. From these follow three
times of which none can be beaten: that of the tensor cores, of the memory, and of the issue slots. The longest is the
bound, and with what the kernel does outside of its main loop the prediction. **Predictions are not measurements**: they
leave out latency, synchronisation and the launch.

``static.json`` beside this file holds what the main loops were for each version of Triton; a test compares. After a
change for the better, or one that is worth its cost: ``python -m benchmarks.static --record``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import launches
from benchmarks.compiling import Kernel, report
from benchmarks.sass import Count
from videor1.atomic import write_atomic
from videor1_kernels.linear_logprob.triton_forward import MERGE_ROWS, MERGE_TILES
from videor1_kernels.prefix_attention import PrefixLayout
from videor1_kernels.prefix_attention.work import key_items, query_tiles

RECORDED = Path(__file__).with_suffix(".json")
SHARED, REGISTERS, THREADS = 228 << 10, 65536, 2048  # of a Hopper's multiprocessor: bytes, registers, threads
SHARED_OF_PROGRAM = 1024  # bytes that the system takes of each
SHORT = 3e-6  # seconds, below which a launch takes as long as the kernel


@dataclass(frozen=True)
class Card:
    """What a kernel may use. The defaults are an H200 as other people's kernels have found it."""

    tflops: float = 790.0  # of dense bf16 products
    bandwidth: float = 4.3  # TB/s of a copy
    clock: float = 1.755  # GHz
    processors: int = 132


@dataclass(frozen=True)
class Work:
    """What one launch does."""

    shape: str
    flops: float  # on the tensor cores
    bytes: float  # from and to memory, at least
    iterations: float  # of the main loop, in all programs together
    passes: float  # through what is around the main loop
    programs: int  # of the grid
    loops: tuple[int, ...] = ()  # those of which an iteration is made, in the order of addresses; none: the main one


@dataclass(frozen=True)
class Prediction:
    """Seconds."""

    tensor: float
    memory: float
    issue: float
    around: float

    @property
    def bound(self) -> str:
        names = {"tensor cores": self.tensor, "memory": self.memory, "issue slots": self.issue}
        return max(names, key=lambda name: names[name]) if self.total > SHORT else "launch"

    @property
    def total(self) -> float:
        return max(self.tensor, self.memory, self.issue) + self.around


def room(kernel: Kernel) -> int:
    """Programs that a multiprocessor has room for at a time."""
    registers = -(-kernel.registers * 32 // 256) * 256 * kernel.num_warps
    return min(
        REGISTERS // registers, SHARED // (kernel.shared + SHARED_OF_PROGRAM), THREADS // (32 * kernel.num_warps)
    )


def iteration(kernel: Kernel, work: Work) -> Count:
    """What one iteration takes."""
    assert kernel.loops is not None
    first, *others = (kernel.loops.own[i] for i in work.loops or (kernel.loops.main,))
    return sum(others, first)


def predict(kernel: Kernel, work: Work, card: Card) -> Prediction:
    assert kernel.loops is not None
    used = min(card.processors, work.programs)
    second = used * card.clock * 1e9  # cycles of all multiprocessors that have something to do
    return Prediction(
        work.flops / (card.tflops * 1e12 * used / card.processors),
        work.bytes / (card.bandwidth * 1e12),
        work.iterations * iteration(kernel, work).cycles(kernel.num_warps) / second,
        work.passes * kernel.loops.around.cycles(kernel.num_warps) / second,
    )


# The work of each kernel in the launch of launches.py that is named beside it.


def _product(kernel: Kernel) -> Work:
    (rows, vocabulary, size), flags = launches.MODEL, kernel.flags
    tiles = _up(rows, flags["BLOCK_N"]) * _up(vocabulary, flags["BLOCK_V"])
    moved = 2 * (rows + vocabulary) * size + 3 * 4 * rows * _up(vocabulary, flags["BLOCK_V"])
    return Work(
        "N 16,384, H 3,584, V 152,064",
        2.0 * rows * size * vocabulary,
        moved,
        tiles * _up(size, flags["BLOCK_H"]),
        tiles,
        tiles,
    )


def _merge(kernel: Kernel) -> Work:
    rows, vocabulary, _ = launches.MODEL
    programs, tiles = _up(rows, MERGE_ROWS), _up(vocabulary, 256)
    return Work("N 16,384, 594 tiles", 0, 3 * 4 * rows * tiles, programs * _up(tiles, MERGE_TILES), programs, programs)


def _rows(per_logit: int) -> Callable[[Kernel], Work]:
    def work(kernel: Kernel) -> Work:
        rows, vocabulary = 4096, launches.MODEL[1]
        return Work(
            "4,096 rows, V 152,064",
            0,
            per_logit * rows * vocabulary,
            rows * _up(vocabulary, kernel.flags["BLOCK"]),
            rows,
            rows,
        )

    return work


def _sample(*loops: int, rows: int = 132, splits: int = 1) -> Callable[[Kernel], Work]:
    """A pass over the row for each of ``loops``, by ``splits`` programs."""

    def work(kernel: Kernel) -> Work:
        vocabulary = launches.MODEL[1]
        tiles, programs = _up(vocabulary, kernel.flags["S"] * kernel.flags["C"]), rows * splits
        iterations = programs * _up(tiles, splits)  # each launch takes as long as the longest share
        return Work(f"{rows} rows, V 152,064", 0, 2 * rows * vocabulary, iterations, programs, programs, loops)

    return work


_shared = partial(_sample, rows=12, splits=11)


GROUP, KEY_HEADS = PrefixLayout([1224], [[768] * 8]), 4
HEADS = {128: 28, 256: 16}  # by head dim: of a 7B model, and of a Qwen3.5 9B
GROUP_SHAPE = "P 1,224, 8 completions of 768"


def _seen() -> int:
    """Pairs of a query and a key that it sees."""
    prompt, completion = 1224, 768
    return prompt * (prompt + 1) // 2 + 8 * (completion * prompt + completion * (completion + 1) // 2)


def _attention(products: int, tensors: int) -> Callable[[Kernel], Work]:
    """``products`` of queries with keys or of scores with values, ``tensors`` [tokens, heads, D] read or written."""

    def work(kernel: Kernel) -> Work:
        m, n, size = (kernel.flags[name] for name in ("BLOCK_M", "BLOCK_N", "D"))
        heads = HEADS[size]
        if "key_gradients" in kernel.name:
            items = key_items(GROUP, n)[0].tolist()
            steps = heads * sum(_up(last - first, m) for _, _, first, last, _ in items)
            programs = len(items) * KEY_HEADS
        else:
            tiles = query_tiles(GROUP, m).tolist()
            steps = heads * sum(
                _up(prompt_stop - prompt, n) + _up(min(first + m, stop) - start, n)
                for first, stop, prompt, prompt_stop, start in tiles
            )
            programs = len(tiles) * heads
        flops, moved = (2.0 * size * heads * count for count in (products * _seen(), tensors * GROUP.total_tokens))
        return Work(f"{GROUP_SHAPE}, D {size}", flops, moved, steps, programs, programs)

    return work


def _sums(kernel: Kernel) -> Work:
    _, sums, slots = key_items(GROUP, kernel.flags["BLOCK_N"])
    programs = len(sums) * KEY_HEADS * kernel.flags["BLOCK_N"] // kernel.flags["BLOCK"]
    size = kernel.flags["D"]
    parts, passes = slots * 2 * KEY_HEADS * kernel.flags["BLOCK_N"] * size * 4, programs * slots / max(1, len(sums))
    return Work(f"{GROUP_SHAPE}, D {size}", 0, parts, passes, programs, programs)


def _decode(kernel: Kernel) -> Work:
    block, size = kernel.flags["BLOCK_N"], kernel.flags["D"]
    keys = 2 * 1224 + 12 * 768
    steps = KEY_HEADS * (2 * _up(1224, block) + 12 * _up(768, block))
    flops = 4.0 * kernel.flags["BLOCK_M"] * size * steps * block
    shape = f"12 rows, P 1,224, 768 own tokens, D {size}"
    return Work(shape, flops, 2.0 * 2 * keys * KEY_HEADS * size, steps, 264, 264)


def _up(count: int, step: int) -> int:
    return -(-count // step)


WORK: dict[tuple[str, str], Callable[[Kernel], Work]] = {
    ("product_descriptors", launches.HEAD): _product,
    ("product_pointers", launches.HEAD): _product,
    ("merge_tiles", launches.HEAD): _merge,
    ("row_statistics_kernel", launches.STATISTICS): _rows(4),
    ("row_gradient_kernel", launches.GRADIENT): _rows(4 + 2),
    ("sample_kernel", launches.SAMPLE): _sample(0, 1),
    ("sample_kernel", launches.SAMPLE_TOP_P): _sample(0, 1, 3),
    ("peak_kernel", launches.SAMPLE): _shared(0),
    ("weigh_kernel", launches.SAMPLE): _shared(0),
    ("peak_kernel", launches.SAMPLE_TOP_P): _shared(0),
    ("weigh_kernel", launches.SAMPLE_TOP_P): _shared(0),
    ("list_kernel", launches.SAMPLE_TOP_P): _shared(3),
    ("prefix_forward", launches.ATTENTION): _attention(2, 4),
    ("prefix_query_gradient", launches.ATTENTION): _attention(3, 6),
    ("prefix_key_gradients", launches.ATTENTION): _attention(4, 6),
    ("prefix_sum_parts", launches.ATTENTION): _sums,
    ("prefix_forward", launches.WIDE_ATTENTION): _attention(2, 4),
    ("prefix_query_gradient", launches.WIDE_ATTENTION): _attention(3, 6),
    ("prefix_key_gradients of keys", launches.WIDE_ATTENTION): _attention(3, 5),
    ("prefix_key_gradients of values", launches.WIDE_ATTENTION): _attention(2, 4),
    ("prefix_sum_parts", launches.WIDE_ATTENTION): _sums,
    ("prefix_decode", launches.DECODE): _decode,
    ("prefix_decode", launches.WIDE_DECODE): _decode,
}


def work_of(name: str, kernel: Kernel) -> Work:
    """The work of a kernel by its name in :func:`measured`."""
    short, _, launch = name.partition(": ")
    return WORK[short, launch](kernel)


def measured(kernels: Sequence[Kernel]) -> dict[str, Kernel]:
    """The kernels of sm_90 whose work is known, by kernel and launch.

    Raises:
        ValueError: one of :data:`WORK` was not compiled, or has no loop.
    """
    known = {(_short_name(k), k.launch): k for k in kernels if k.capability == 90}
    if missing := [key for key in WORK if key not in known or known[key].loops is None]:
        raise ValueError(f"expected a kernel with a loop for each of WORK, got none for {missing}")
    return {f"{name}: {launch}": known[name, launch] for name, launch in WORK}


def _short_name(kernel: Kernel) -> str:
    """Without its module, and with which of two gradients it computes where they are of two launches."""
    of_one = {(True, False): " of keys", (False, True): " of values"}
    return kernel.name.rpartition(".")[2] + of_one.get((kernel.flags.get("OF_KEYS"), kernel.flags.get("OF_VALUES")), "")


def recorded_values(name: str, kernel: Kernel) -> dict[str, int]:
    """What may not get worse; each is the worse the larger, but for the programs."""
    loop = iteration(kernel, work_of(name, kernel))
    return {
        "instructions": loop.instructions,
        "matrix instructions": loop.matrix,
        "slow instructions": loop.slow,
        "drains": loop.drains,
        "programs": room(kernel),
        "registers": kernel.registers,
        "shared memory": kernel.shared,
    }


def worse(kernels: dict[str, Kernel], recorded: dict[str, dict[str, int]]) -> list[str]:
    """What has become worse than recorded: a sentence with both numbers for each."""
    found = [f"{name}: not recorded; python -m benchmarks.static --record" for name in kernels if name not in recorded]
    for name, kernel in kernels.items():
        if name not in recorded:
            continue
        now, before = recorded_values(name, kernel), recorded[name]
        # Instructions for one of the tensor cores, so that a loop unrolled further is not taken for a slower one.
        size_now, size_before = (max(1, x["matrix instructions"]) for x in (now, before))
        for what in ("instructions", "slow instructions", "drains"):
            if now[what] * size_before > before[what] * size_now:
                found.append(f"{name}: {what} in the main loop: {before[what]} before, {now[what]} now")
        if now["matrix instructions"] == 0 < before["matrix instructions"]:
            found.append(f"{name}: matrix instructions: {before['matrix instructions']} before, 0 now")
        if now["programs"] < before["programs"]:
            found.append(f"{name}: programs a multiprocessor: {before['programs']} before, {now['programs']} now")
    return found


def small(kernels: Sequence[Kernel]) -> str:
    """Markdown: the kernels of sm_90 that are none of :data:`WORK`'s, each of which takes as long as its launch."""
    known = {name for name, _ in WORK}
    first: dict[str, Kernel] = {}
    for kernel in kernels:
        name = kernel.name.rpartition(".")[2]
        if kernel.capability == 90 and name not in known:
            first.setdefault(name, kernel)
    lines = [
        "Bound by their launch at these sizes, and not predicted:",
        "",
        "| kernel | at | registers | shared, KiB | programs |",
        "|---|---|---:|---:|---:|",
    ]
    for name, kernel in sorted(first.items()):
        cells = (f"`{name}`", kernel.launch, kernel.registers, f"{kernel.shared / 1024:.0f}", room(kernel))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def triton_version() -> str:
    """As :data:`RECORDED` names it: 3.9 of 3.9.0."""
    return ".".join(version("triton").split(".")[:2])


def recorded() -> dict[str, dict[str, int]]:
    """The record of the installed Triton. Raises ValueError where there is none."""
    known = json.loads(RECORDED.read_text(encoding="utf-8"))
    if triton_version() not in known:
        raise ValueError(
            f"{RECORDED.name} has records for Triton {', '.join(known)}, not for {triton_version()}: "
            "python -m benchmarks.static --record"
        )
    return known[triton_version()]


def table(kernels: dict[str, Kernel], card: Card) -> str:
    """Markdown."""
    lines = [
        f"Predictions, not measurements, for {card.tflops:g} TFLOP/s of bf16 products, {card.bandwidth:g} TB/s, "
        f"{card.processors} multiprocessors at {card.clock:g} GHz. A loop's instructions are those of one warp.",
        "",
        "| kernel | at | registers | shared, KiB | programs | loop: instructions (matrix, slow) | around | GFLOP | GB "
        "| tensor cores, ms | memory, ms | issue, ms | around, ms | bound | predicted, ms |",
        f"|---|---|{'---:|' * 11}---|---:|",
    ]
    for name, kernel in kernels.items():
        work, loops = work_of(name, kernel), kernel.loops
        times, loop = predict(kernel, work, card), iteration(kernel, work)
        assert loops is not None
        ms = (f"{1e3 * t:.3f}" for t in (times.tensor, times.memory, times.issue, times.around))
        cells = [
            f"`{name.partition(':')[0]}`",
            work.shape,
            kernel.registers,
            f"{kernel.shared / 1024:.0f}",
            room(kernel),
            f"{loop.instructions} ({loop.matrix}, {loop.slow})",
            loops.around.instructions,
            f"{work.flops / 1e9:,.0f}",
            f"{work.bytes / 1e9:.2f}",
            *ms,
            times.bound,
            f"{1e3 * times.total:.3f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, what in (
        ("tflops", "TFLOP/s of dense bf16 products"),
        ("bandwidth", "TB/s of a copy"),
        ("clock", "GHz"),
        ("processors", "multiprocessors"),
    ):
        default = getattr(Card, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{what} (default: {default})")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.name} for the installed Triton")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, and the card's, into a file too")
    options = parser.parse_args(arguments)
    card = Card(options.tflops, options.bandwidth, options.clock, options.processors)
    made = report(90, full=False)
    kernels = measured(made.kernels)
    print(f"{made.versions}\n\n{table(kernels, card)}\n\n{small(made.kernels)}")
    if options.record:
        known: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
        known[triton_version()] = {name: recorded_values(name, kernel) for name, kernel in kernels.items()}
        write_atomic(RECORDED, json.dumps(known, indent=1, sort_keys=True) + "\n")
    if options.json:
        works = {name: work_of(name, kernel) for name, kernel in kernels.items()}
        found = {
            name: {
                "compiled": recorded_values(name, kernel),
                "work": asdict(works[name]),
                "predicted seconds": asdict(predict(kernel, works[name], card)),
            }
            for name, kernel in kernels.items()
        }
        write_atomic(options.json, json.dumps({"versions": made.versions, "card": asdict(card), "kernels": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
