"""Frames of every kind for the compiled frames_to_patches, and the CUDA half run on a CPU."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videor1_kernels import extension
from videor1_kernels.frames_to_patches import YuvFrames, native

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


def run(
    operators: Any,
    frames: Tensor | YuvFrames,
    *,
    size: tuple[int, int],
    dtype: torch.dtype = torch.uint8,
    permutation: list[int] | None = None,
    rotation: int = 0,
    mirrored: bool = False,
    both: bool = False,
    align: int = 1,
    device: str = "cpu",
) -> Made:
    """(ordered, permuted) straight from the operator, into outputs full of something else; on the CPU in the end."""
    place = torch.device(device)
    yuv = frames if isinstance(frames, YuvFrames) else None
    planes = [_moved(plane, place) for plane in (yuv.planes if yuv else (frames,))]
    count, height, width = planes[0].shape[:3]
    out_height, out_width = size if rotation % 180 == 0 else size[::-1]
    shape = (math.ceil(count / 2) * size[0] * size[1] // 196, 1176)
    poison = 7 if dtype == torch.uint8 else float("nan")
    ordered, permuted = (
        torch.full(shape, poison, dtype=dtype, device=place) if wanted else None
        for wanted in (permutation is None or both, permutation is not None)
    )
    tables: list[Any] = []
    for sizes in ((height, out_height), (width, out_width)):
        first, weights, taps = operators.resample_table(torch.empty(0), *sizes, align)
        tables += [first.to(place), weights.to(place), taps]
    operators.frames_to_patches(
        planes,
        native.MATRICES[yuv.matrix] if yuv else 0,
        yuv is not None and yuv.range == "full",
        *tables,
        rotation // 90,
        mirrored,
        native._levels(dtype, place),
        None if permutation is None else native._slots(permutation, place),
        ordered,
        permuted,
    )
    return tuple(None if made is None else made.cpu() for made in (ordered, permuted))


def _moved(plane: Tensor, device: torch.device) -> Tensor:
    """On the device, with the strides it has."""
    if device.type == "cpu":
        return plane
    whole = torch.as_strided(plane, (plane.untyped_storage().nbytes() // plane.element_size(),), (1,), 0)
    return torch.as_strided(whole.to(device), plane.shape, plane.stride(), plane.storage_offset())
