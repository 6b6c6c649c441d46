"""How the cost of a T-GRPO step grows with frames, tokens of an answer, answers and prompts, ours and as the reference
code computes it: ``python -m benchmarks.growth``. Prints a table with the fitted exponents;
``--plot`` draws them."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import bench_step
from benchmarks.cases import OUR_STEP, REFERENCE_STEP, Case
from benchmarks.growth_curves import draw
from benchmarks.record import RESULTS, failures
from benchmarks.report import table
from benchmarks.rollout_skipping import whole_number
from benchmarks.run import default_device, run_part
from benchmarks.whole_inputs import MODELS, Setting

AXES: dict[str, tuple[int, ...]] = {
    "frames": (8, 16, 32, 64),
    "completion": (256, 512, 1024, 2048, 4096),
    "generations": (4, 8, 16, 32),
    "prompts": (1, 2, 4, 8, 16, 32),
}


def point(axis: str, value: int, base: Setting) -> Case:
    """One step of each way. Only what has to get going makes a step before it: ours, with its decode workers."""
    case = bench_step.step(dataclasses.replace(base, **{axis: value}))
    contenders = [c for c in case.contenders if c.name in (OUR_STEP, REFERENCE_STEP)]
    return dataclasses.replace(
        case,
        op="growth",
        title=axis,
        contenders=contenders,
        rounds=3 if value * (base.prompts if axis == "completion" else base.completion) <= 1024 else 1,
        memory=base.bf16,  # on a CPU the profiler would hold millions of events
        cold=frozenset({REFERENCE_STEP}),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES), help="what grows (default: each)")
    parser.add_argument("--most", type=whole_number, help="leave out larger sizes")
    parser.add_argument("--shape", choices=MODELS, help="model, with random weights (default: 7b on a card, else tiny)")
    parser.add_argument("--frames", type=whole_number, default=16, help="where another axis grows")
    parser.add_argument("--completion", type=whole_number, help="likewise (default: 256; tiny: 64)")
    parser.add_argument("--generations", type=whole_number, default=8, help="likewise")
    parser.add_argument("--prompts", type=whole_number, default=1, help="likewise")
    parser.add_argument("--threads", type=whole_number, default=1, help="of torch, on a CPU")
    parser.add_argument("--rounds", type=whole_number, help="times that each is measured (default: by its length)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="leave out the rest after this long")
    parser.add_argument("--device", type=torch.device, default=default_device(), help="cuda where there is one")
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="FOLDER",
        help="write the JSON file (default folder: benchmarks/results)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves")
    options = parser.parse_args(arguments)
    on_card = options.device.type == "cuda"
    if not on_card:
        torch.set_num_threads(options.threads)
    base = dataclasses.replace(
        bench_step.setting_of(options.shape or ("7b" if on_card else "tiny"), options.prompts, options.device),
        frames=options.frames,
        generations=options.generations,
        completion=options.completion or (256 if on_card else 64),
    )
    cases = [
        point(axis, value, base) for axis in options.axis for value in AXES[axis] if value <= (options.most or value)
    ]
    everything = [(case, contender) for case in cases for contender in case.contenders]
    record = run_part(
        "growth",
        options.device,
        out=options.record,
        seconds=options.seconds,
        rounds=options.rounds,
        everything=everything,
    )
    if options.plot:
        draw(record.to_json(), options.plot)
    print()
    print(table(record.to_json()))
    return 1 if failures(record.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
