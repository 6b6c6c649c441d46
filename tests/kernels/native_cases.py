"""Frames of every kind for the compiled frames_to_patches, and the CUDA half run on a CPU."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from videor1_kernels import extension, last_backend
from videor1_kernels.frames_to_patches import YuvFrames, native
from videor1_kernels.frames_to_patches.reference import frames_to_patches_reference
from videor1_kernels.testing import poisoned_memory

CSRC = Path(__file__).parents[2] / "csrc"
KINDS = ("rgb", "yuv420p", "nv12", "p010")
Made = tuple[Tensor | None, Tensor | None]


def made_frames(
    kind: str, frames: int, height: int, width: int, *, matrix: Any = "601", range_: Any = "limited", padding: int = 0
) -> Tensor | YuvFrames:
    """Random frames; ``padding`` samples, which nothing may read, end each row and each plane."""
    random = torch.Generator().manual_seed(0)
    top, dtype = (1024, torch.uint16) if kind == "p010" else (256, torch.uint8)

    def plane(h: int, w: int, *rest: int) -> Tensor:
        whole = torch.randint(0, top, (frames, h + padding, w + padding, *rest), generator=random, dtype=torch.int32)
        return (whole << 6 if kind == "p010" else whole).to(dtype)[:, :h, :w]

    if kind == "rgb":
        return plane(height, width, 3)
    h, w = math.ceil(height / 2), math.ceil(width / 2)
    chroma = (plane(h, w), plane(h, w)) if kind == "yuv420p" else (plane(h, w, 2),)
    return YuvFrames((plane(height, width), *chroma), matrix=matrix, range=range_)


def emulated(folder: Path) -> Any:
    """native.frames_to_patches with the CUDA kernels of csrc/ in place of the C++ ones, run by ``cuda_on_cpu``."""
    bindings = (CSRC / "bindings.cpp").read_text().replace("videor1_csrc", "videor1_emulated")
    (folder / "bindings.cpp").write_text(bindings)
    kernels = (CSRC / "frames_to_patches.cu").read_text()
    launch = re.compile(r"(\w+(?:<[^<>;]*>)?)<<<([^;]*?)>>>\(([^;]*)\);")
    kernels, count = launch.subn(r"emulation::launch([&] { \1(\3); }, \2);", kernels)
    assert count == kernels.count("emulation::launch") == 2, "a launch was not found"
    kernels, count = re.subn(
        r"extern __shared__ float4 memory\[\];",
        "float4* const memory = reinterpret_cast<float4*>(emulation::shared_memory);",
        kernels,
    )
    assert count == 1
    kernels += """
void videor1::frames_to_patches_cpu(const Job& job, int64_t, ParallelFor) {
  if (frames_to_patches_cuda(job, nullptr)) std::abort();
}
"""
    (folder / "kernels.cpp").write_text(kernels)
    includes = (Path(__file__).parent / "cuda_on_cpu", CSRC, CSRC / "include", Path(torch.__file__).parent / "include")
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-w", extension.STABLE_ABI, *(f"-I{path}" for path in includes)]
    sources = [str(folder / "bindings.cpp"), str(folder / "kernels.cpp")]
    links = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
    library = folder / "emulated.so"
    subprocess.run([*extension._compiler(), *flags, *sources, *links, "-o", str(library)], check=True)
    torch.ops.load_library(str(library))
    return torch.ops.videor1_emulated


def runner(name: str, folder: Path) -> Callable[..., Made]:
    """frames_to_patches as one call (frames, size=..., ...) -> (ordered, permuted), in memory that held something else.

    Of torch ("reference"), of the C++ ("cpu"), of the CUDA on threads that a CPU plays ("cuda") or on a card ("card").
    """
    make = frames_to_patches_reference if name == "reference" else native.frames_to_patches
    changes: list[Any] = []
    if name == "cuda":
        operators = emulated(folder)

        def table(size_in: int, size_out: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
            return operators.resample_table(torch.empty(0), size_in, size_out, 4)  # aligned as on a card

        changes = [mock.patch.object(torch.ops, "videor1_csrc", operators), mock.patch.object(native, "_table", table)]
    else:
        for device in ["cpu", *(["cuda"] if name == "card" else [])]:
            assert native.unavailable(torch.device(device), None) is None

    def run(frames: Tensor | YuvFrames, **given: Any) -> Made:
        options = {"dtype": torch.uint8, "permutation": None, "rotation": 0, "mirrored": False, "both": False} | given
        if name == "card":
            yuv = isinstance(frames, YuvFrames)
            frames = replace(frames, planes=tuple(map(_moved, frames.planes))) if yuv else _moved(frames)
        with poisoned_memory(), ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            made = make(frames, **options)
        ordered, permuted = (
            made if options["both"] else (made, None) if options["permutation"] is None else (None, made)
        )
        return tuple(None if x is None else x.cpu() for x in (ordered, permuted))

    return run


def _moved(plane: Tensor) -> Tensor:
    """On the card, with the strides it has."""
    whole = torch.as_strided(plane, (plane.untyped_storage().nbytes() // plane.element_size(),), (1,), 0)
    return torch.as_strided(whole.cuda(), plane.shape, plane.stride(), plane.storage_offset())


def check_turned_off(
    op: str,
    functions: Any,
    call: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """VIDEOR1_NATIVE=0: the reference serves, one line of the log says so, and to ask for the backend is an error.

    ``functions`` is the operation's module of the native backend; ``call`` takes the backend.
    """
    monkeypatch.setenv("VIDEOR1_NATIVE", "0")
    functions._function.cache_clear()
    try:
        for _ in range(2):
            call("auto")
            assert last_backend(op) == "reference"
        with pytest.raises(ValueError, match="backend 'native' cannot run on cpu: VIDEOR1_NATIVE=0"):
            call("native")
    finally:
        functions._function.cache_clear()
    [said] = [r.getMessage() for r in caplog.records if f"{op} on the CPU runs in plain" in r.getMessage()]
    assert "VIDEOR1_NATIVE=0 turns it off" in said
