"""What the package's Triton kernels compile to, for GPUs that need not be there.

python -m benchmarks.compiling            a Markdown table of every launch
python -m benchmarks.compiling --json 90  the kernels for sm_90 as JSON
python -m benchmarks.compiling --cache results/triton 90   and keep them, for a card's first minutes
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.sass import Count, Loops, count_loops

ROOT = Path(__file__).parents[1]
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async\b",
    "tcgen05": r"\btcgen05\.mma\b",
    "mma": r"(?<!w)\bmma\.sync\b",
    "TMA": r"\bcp\.async\.bulk\.tensor\.\dd\.shared",
}


@dataclass(frozen=True)
class Kernel:
    """One kernel as one launch has it, compiled for one compute capability."""

    name: str
    capability: int
    launch: str
    flags: dict[str, Any]  # its constexpr parameters
    integers: dict[str, str]  # its integer arguments as Triton took them: "1", "multiple of 16" or "any"
    num_warps: int
    num_stages: int
    registers: int  # of a thread
    shared: int  # bytes of a program
    stack: int  # bytes of a thread, with what calls and indexed arrays would take
    local: int
    spills: int  # instructions that load from or store to local memory
    matrix: bool  # has a matrix product
    instructions: dict[str, int]  # of the tensor cores and of TMA, in its PTX
    counts: int  # atomics that release what the program stored and acquire what others did
    ordered: bool  # of these, all stand between barriers
    tensor_memory: int = 0  # columns, of Blackwell's
    loops: Loops | None = None  # for sm_90 and the launches of launches.MEASURED

    @property
    def configuration(self) -> str:
        """The constexpr parameters, flags that are off left out, and the launch options."""
        flags = {name: value for name, value in self.flags.items() if value is not False}
        shown = (name if value is True else f"{name}={value}" for name, value in flags.items())
        return " ".join([*shown, f"warps={self.num_warps}", f"stages={self.num_stages}"])


@dataclass(frozen=True)
class Report:
    """Every kernel that was compiled: the package's, and those with known faults."""

    versions: str
    kernels: list[Kernel]
    faults: list[Kernel]

    @staticmethod
    def of(text: str) -> Report:
        """From its JSON."""
        found = json.loads(text)
        for kernel in (*found["kernels"], *found["faults"]):
            if kernel["loops"]:
                own, main, around = kernel["loops"].values()
                kernel["loops"] = Loops(tuple(Count(**x) for x in own), main, Count(**around))
        kernels, faults = ([Kernel(**kernel) for kernel in found[key]] for key in ("kernels", "faults"))
        return Report(found["versions"], kernels, faults)


def report(*capabilities: int, full: bool = True) -> Report:
    """Compile for ``capabilities``, or for all that have a tile, in a process of its own: in this one, Triton may
    already be set to interpret.
    """
    command = [
        sys.executable,
        "-m",
        "benchmarks.compiling",
        "--json",
        *([] if full else ["--default"]),
        *map(str, capabilities),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr}")
    return Report.of(done.stdout)


def sources_key(*folders: Path) -> str:
    """A hash of what a report depends on: Triton's version, torch's, and the Python files in and below ``folders``."""
    found = hashlib.sha256("\0".join(map(version, ("triton", "torch"))).encode())
    for folder in folders:
        for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]:
            found.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return found.hexdigest()


def kept_report(file: Path | None, key: str, make: Callable[[], Report]) -> Report:
    """The report in ``file``, if it is whole and was made for ``key``; else a new one, which ``file`` then holds.

    Without a file, or where none can be written, it is made every time.
    """
    if file is None:
        return make()
    with suppress(OSError, ValueError):
        digest, kept_key, text = file.read_text(encoding="utf-8").split("\n", 2)
        if kept_key == key and digest == _digest(key, text):
            return Report.of(text)
    made = make()
    text = json.dumps(asdict(made))
    with suppress(OSError), tempfile.TemporaryDirectory(dir=file.parent) as folder:
        whole = Path(folder, file.name)
        whole.write_text("\n".join((_digest(key, text), key, text)), encoding="utf-8")
        os.replace(whole, file)
    return made


def _digest(key: str, text: str) -> str:
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()


def kernel_names(folder: Path, package: str) -> list[str]:
    """The functions under ``folder`` that are kernels, as module.function: those that Triton compiles and that are
    launched, or that no other such function uses.
    """
    compiled: list[tuple[str, str]] = []
    used, launched = set(), set()
    for path in sorted(folder.rglob("*.py")):
        module = ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "jit" in _names(*node.decorator_list):
                compiled.append((f"{module}.{node.name}", node.name))
                own = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
                own |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
                used |= _names(*node.body) - own - {node.name}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched |= _names(node.func.value)
    return sorted(path for path, name in compiled if name in launched or name not in used)


def _names(*nodes: ast.AST) -> set[str]:
    found = (n for node in nodes for n in ast.walk(node))
    return {n.id if isinstance(n, ast.Name) else n.attr for n in found if isinstance(n, ast.Name | ast.Attribute)}


def table(kernels: list[Kernel]) -> str:
    """Markdown."""
    lines = [
        "| Kernel | Target | Launch | Configuration | Registers | Shared memory, bytes | Spills | Instructions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for k in kernels:
        counts = ", ".join(f"{count} {name}" for name, count in k.instructions.items() if count)
        spills = f"{k.spills}, {k.stack + k.local} bytes" if k.spills or k.stack or k.local else "0"
        cells = (k.name, f"sm_{k.capability}", k.launch, k.configuration, k.registers, k.shared, spills, counts)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


class _Target:
    """Stands in for Triton's driver: names the device to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(capability: int, full: bool) -> tuple[list[Kernel], list[Kernel]]:
    """Make every launch with Triton's launch replaced by its compilation."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from benchmarks.launches import launch_all, launch_faults

    warnings.simplefilter("ignore")
    run = JITFunction.run
    found: dict[str, Kernel] = {}

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not full and capability not in targets:
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in found:
            found[kernel.hash] = _measure(self, capability, launch, kernel)
        return kernel

    driver.set_active(_Target(capability))
    with mock.patch.object(JITFunction, "run", compile_only):
        for launch, targets in launch_all(capability):  # noqa: B007 (compile_only reads it)
            pass
        ours = len(found)
        for launch, targets in launch_faults(capability):  # noqa: B007
            pass
    return list(found.values())[:ours], list(found.values())[ours:]


def _compile_all(capabilities: list[int], full: bool) -> Report:
    """In a process for each processor, those that take longest first. Forked: Torch and Triton are imported once."""
    import torch
    import triton

    from benchmarks.launches import TILES, twin

    capabilities = capabilities or list(TILES)
    chosen = {c: c if full else twin(c) for c in capabilities}
    order = sorted(set(chosen.values()), key=lambda c: (TILES[c].descriptors, c == 80, c), reverse=True)
    workers = min(len(order), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        parts = dict(zip(order, pool.map(_compile, order, [full] * len(order)), strict=True))
    kernels, faults = ([replace(k, capability=c) for c in capabilities for k in parts[chosen[c]][i]] for i in (0, 1))
    return Report(f"triton {triton.__version__}, torch {torch.__version__}", kernels, faults)


def _inspect(file: Path, *options: str) -> str:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    done = subprocess.run([tool, *options, file], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {' '.join(options)} ended with status {done.returncode}:\n{done.stderr}")
    return done.stdout


def _measure(function: Any, capability: int, launch: str, kernel: Any) -> Kernel:
    from benchmarks.launches import MEASURED

    measured = capability == 90 and launch in MEASURED
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _inspect(cubin, "-res-usage"))
        usage = {name: int(size) for name, size in found}
        # Disassembly takes longer than many compilations: only where it is asked for, or there is local memory.
        code = _inspect(cubin, "-sass") if measured or usage["STACK"] or usage["LOCAL"] else ""
    ptx = kernel.asm["ptx"]
    declared = {parameter.name for parameter in function.params if parameter.is_constexpr}
    constants = {function.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
    integers = {name: "1" for name in constants if name not in declared}
    for i, (name, kind) in enumerate(kernel.src.signature.items()):
        if kind in ("i32", "i64"):
            integers[name] = "multiple of 16" if kernel.src.attrs.get((i,)) else "any"
    counts, ordered = release_order(ptx)
    return Kernel(
        name=f"{function.__module__}.{function.__name__}",
        capability=capability,
        launch=launch,
        flags={name: value for name, value in constants.items() if name in declared},
        integers=integers,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        registers=usage["REG"],
        shared=kernel.metadata.shared,
        stack=usage["STACK"],
        local=usage["LOCAL"],
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        matrix="tt.dot" in kernel.asm["ttir"],
        instructions={name: len(re.findall(text, ptx)) for name, text in INSTRUCTIONS.items()},
        counts=counts,
        ordered=ordered,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        loops=count_loops(code) if measured else None,
    )


def release_order(ptx: str) -> tuple[int, bool]:
    """(atomics that release and acquire for the whole GPU, whether barriers stand around all of them).

    One thread's atomic speaks for its program only so: a barrier between it and the stores before it, and another
    between it and the loads after it.
    """
    found = re.findall(r"\b(bar\.sync|barrier\.sync|st\.global|ld\.global|atom\.global\.gpu\.acq_rel)", ptx)
    marks = ["bar" if mark.startswith("bar") else mark for mark in found]
    counts = [i for i, mark in enumerate(marks) if mark.startswith("atom")]
    before = (next((m for m in reversed(marks[:i]) if m in ("bar", "st.global")), "bar") for i in counts)
    after = (next((m for m in marks[i:] if m in ("bar", "ld.global")), "bar") for i in counts)
    return len(counts), all(mark == "bar" for mark in (*before, *after))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capabilities", nargs="*", type=int, help="80, 90, ...; all that have a tile, unless given")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--default", action="store_true", help="only what the tests compile without --full")
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="keep what is compiled: the Triton cache of a machine with a card"
    )
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as unused:
        # Nothing compiled before is taken from a cache, unless it is to be added to.
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve() if options.cache else unused)
        if options.cache is None:
            os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # it changes no instruction, takes time, and is part of a key
        compiled = _compile_all(options.capabilities, not options.default)
    print(json.dumps(asdict(compiled)) if options.json else f"{compiled.versions}\n\n{table(compiled.kernels)}")


if __name__ == "__main__":
    main()
