"""frames_to_patches against the exact chain in fp64: torch, the C++, and the CUDA on an emulation of threads."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_cases import CSRC, KINDS, Made, made_frames, runner
from test_frames_to_patches import MATRICES, resized
from torch import Tensor
from triton_cases import for_threads

import videor1_kernels
from videor1_kernels import extension, frames_to_patches, last_backend
from videor1_kernels.frames_to_patches import YuvFrames, native, normalize_patches
from videor1_kernels.frames_to_patches.reference import frames_to_patches_reference

Kernel = Callable[..., Made]
Kernels = Callable[[str], Kernel]
Size = tuple[int, int]
KERNELS = ["cpu", "cuda", *(["card"] if torch.cuda.is_available() else [])]
EVERY = ["reference", *KERNELS]
SIZES = [
    ((90, 131), (56, 84)),
    ((30, 21), (56, 84)),  # both grow
    ((61, 40), (28, 112)),  # one shrinks, one grows
    ((56, 200), (56, 84)),  # one stays
    ((28, 56), (28, 56)),
    ((1, 1), (28, 28)),
    ((333, 29), (28, 28)),
    ((3, 2047), (28, 420)),
    ((2, 9000), (28, 28)),  # windows wider than a tile
]
ORDERS = [[0], [1, 0], [2, 0, 1], [3, 1, 0, 2]]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Each made once."""
    return functools.cache(lambda name: runner(name, tmp_path_factory.mktemp(name)))


def chain(
    frames: Tensor | YuvFrames, size: Size, rotation: int = 0, *, mirrored: bool = False, rounded_rgb: bool = False
) -> np.ndarray:
    """RGB in fp64, mirrored, turned, resized, clamped, rounded: levels [F, H, W, 3]. Nothing of ours in it.

    rounded_rgb: as if the resize were given 8-bit RGB.
    """
    if isinstance(frames, YuvFrames):
        planes = [plane.numpy().astype(np.float64) for plane in frames.planes]
        unit = 1.0
        if frames.planes[0].dtype == torch.uint16:
            planes, unit = [np.floor(plane / 64) for plane in planes], 4.0
        Y, U, V = planes if len(planes) == 3 else (planes[0], planes[1][..., 0], planes[1][..., 1])
        H, W = Y.shape[1:]
        U, V = (c.repeat(2, 1).repeat(2, 2)[:, :H, :W] - 128 * unit for c in (U, V))
        top = 255 if unit == 1 else 1023
        y_scale, c_scale = (255 / (219 * unit), 255 / (224 * unit)) if frames.range == "limited" else (255 / top,) * 2
        Y = (Y - 16 * unit if frames.range == "limited" else Y) * y_scale
        kr, kb = MATRICES[frames.matrix]
        R, B = Y + 2 * (1 - kr) * V * c_scale, Y + 2 * (1 - kb) * U * c_scale
        G = Y - (2 * kb * (1 - kb) * U + 2 * kr * (1 - kr) * V) * c_scale / (1 - kr - kb)
        rgb = np.stack([R, G, B], -1).clip(0, 255)
        rgb = np.round(rgb) if rounded_rgb else rgb
    else:
        rgb = frames.numpy().astype(np.float64)
    rgb = rgb[:, :, ::-1] if mirrored else rgb
    return np.round(resized(np.rot90(rgb, rotation // 90, (1, 2)), size))


def levels_of(patches: Tensor, frames: int, size: Size, p: int = 14) -> np.ndarray:
    """uint8 patches back to [F, H, W, 3]."""
    T, h, w = -(-frames // 2), size[0] // (2 * p), size[1] // (2 * p)
    x = patches.view(T, h, w, 2, 2, 3, 2, p, p).permute(0, 6, 1, 3, 7, 2, 4, 8, 5)  # t tp hb hm py wb wm px c
    return x.reshape(2 * T, *size, 3)[:frames].numpy().astype(np.float64)


def assert_within_a_level(
    kernel: Kernel, frames: Tensor | YuvFrames, size: Size, rotation: int = 0, *, mirrored: bool = False, p: int = 14
) -> None:
    patches, _ = kernel(frames, size=size, rotation=rotation, mirrored=mirrored, patch_size=p)
    levels = levels_of(patches, len(frames), size, p)
    error = np.abs(levels - chain(frames, size, rotation, mirrored=mirrored))
    assert error.max() <= 1
    assert error.mean() <= 1e-3, "only sums within fp32's error of a half may go the other way"
    assert np.abs(levels - chain(frames, size, rotation, mirrored=mirrored, rounded_rgb=True)).max() <= 1


@pytest.mark.grid(
    sizes=SIZES, kind=KINDS, rotation=[0, 90, 180, 270], mirrored=[False, True], name=["reference", *KERNELS]
)
def test_within_a_level_of_the_exact_chain(
    kernels: Kernels, sizes: tuple[Size, Size], kind: str, rotation: int, mirrored: bool, name: str
) -> None:
    source, size = sizes
    upright = size if rotation % 180 == 0 else size[::-1]
    frames = made_frames(kind, 3, *source, matrix="709")
    assert_within_a_level(kernels(name), frames, upright, rotation, mirrored=mirrored)


@pytest.mark.grid(
    sizes=[((90, 131), (64, 96)), ((61, 40), (32, 128)), ((32, 64), (32, 64)), ((2, 9000), (32, 32))],
    kind=KINDS, rotation=[0, 90, 180, 270], mirrored=[False, True], name=EVERY,
)  # fmt: skip
def test_patches_of_16_pixels(
    kernels: Kernels, sizes: tuple[Size, Size], kind: str, rotation: int, mirrored: bool, name: str
) -> None:
    source, size = sizes
    upright = size if rotation % 180 == 0 else size[::-1]
    assert_within_a_level(kernels(name), made_frames(kind, 3, *source), upright, rotation, mirrored=mirrored, p=16)


@pytest.mark.grid(kind=KINDS[1:], matrix=list(MATRICES), range_=["limited", "full"], name=EVERY)
def test_every_matrix_and_range(kernels: Kernels, kind: str, matrix: str, range_: str, name: str) -> None:
    frames = made_frames(kind, 2, 63, 85, matrix=matrix, range_=range_)
    assert_within_a_level(kernels(name), frames, (28, 56))


@pytest.mark.grid(kind=KINDS, range_=["limited", "full"], name=KERNELS)
def test_as_good_from_8_bit_rgb(kernels: Kernels, kind: str, range_: str, name: str) -> None:
    """At the scale of 1080p, a chain that rounds RGB before the resize is as near as 0.1 of a level on average."""
    frames = made_frames(kind, 1, 541, 961, range_=range_, matrix="709")
    levels = levels_of(kernels(name)(frames, size=(112, 196))[0], 1, (112, 196))
    error = np.abs(levels - chain(frames, (112, 196), rounded_rgb=True))
    assert error.max() <= 1
    assert error.mean() <= 0.1


@pytest.mark.grid(order=ORDERS, dtype=[torch.uint8, torch.float16, torch.bfloat16, torch.float32], name=KERNELS)
def test_every_output(kernels: Kernels, order: list[int], dtype: torch.dtype, name: str) -> None:
    kernel = kernels(name)
    frames = made_frames("nv12", len(order), 70, 101)
    levels, _ = kernel(frames, size=(56, 84))
    ordered, permuted = kernel(frames, size=(56, 84), permutation=order, dtype=dtype, both=True)
    as_stored = (lambda x: x) if dtype == torch.uint8 else (lambda x: normalize_patches(x, dtype))
    assert torch.equal(ordered, as_stored(levels))
    shuffled = YuvFrames(tuple(plane[order] for plane in frames.planes))
    assert torch.equal(permuted, as_stored(kernel(shuffled, size=(56, 84))[0]))
    assert torch.equal(kernel(frames, size=(56, 84), permutation=order, dtype=dtype)[1], permuted)


@pytest.mark.grid(kind=KINDS, width=[64, 65], name=KERNELS)
def test_rows_of_any_stride(kernels: Kernels, kind: str, width: int, name: str) -> None:
    kernel = kernels(name)
    padded = made_frames(kind, 2, 50, width, padding=3)
    dense = YuvFrames(tuple(p.contiguous() for p in padded.planes)) if kind != "rgb" else padded.contiguous()
    assert torch.equal(kernel(padded, size=(28, 56))[0], kernel(dense, size=(28, 56))[0])


def test_the_bits_do_not_depend_on_the_threads(kernels: Kernels) -> None:
    cpu, frames = kernels("cpu"), made_frames("nv12", 2, 300, 400)
    results = for_threads(lambda: cpu(frames, size=(252, 336), dtype=torch.float32)[0], 1, 2, 7)
    assert all(torch.equal(result, results[0]) for result in results)


def test_auto_takes_it_and_the_api_reaches_all_of_it() -> None:
    frames = made_frames("yuv420p", 3, 70, 101, matrix="709")
    options = {"size": (84, 56), "rotation": -90, "mirrored": True, "dtype": torch.uint8}
    ordered, permuted = frames_to_patches(frames, permutation=[2, 0, 1], both=True, **options)
    assert last_backend("frames_to_patches") == "native"
    expected = frames_to_patches(frames, permutation=[2, 0, 1], both=True, backend="reference", **options)
    assert last_backend("frames_to_patches") == "reference"
    for ours, reference in zip((ordered, permuted), expected, strict=True):
        assert (ours.short() - reference.short()).abs().max() <= 1
    assert torch.equal(frames_to_patches(frames, permutation=[2, 0, 1], **options), permuted)
    assert torch.equal(frames_to_patches(frames, **options), ordered)
    transposed = made_frames("rgb", 2, 60, 80).transpose(1, 2)  # samples of a row apart
    assert torch.equal(
        frames_to_patches(transposed, size=(56, 56), dtype=torch.uint8),
        frames_to_patches(transposed.contiguous(), size=(56, 56), dtype=torch.uint8),
    )
    frames_to_patches(frames, size=(28, 28), dtype=torch.float64)
    assert last_backend("frames_to_patches") == "reference", "fp64 is the oracle's"
    with pytest.raises(ValueError, match="fp64 was asked for"):
        frames_to_patches(frames, size=(28, 28), dtype=torch.float64, backend="native")


def test_no_compiler_is_said_once_and_torch_does_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native._failure.cache_clear()
    frames = made_frames("nv12", 2, 40, 60)
    try:
        expected = frames_to_patches_reference(frames, size=(28, 28), dtype=torch.uint8)
        for _ in range(2):
            assert torch.equal(frames_to_patches(frames, size=(28, 28), dtype=torch.uint8), expected)
        assert last_backend("frames_to_patches") == "reference"
        with pytest.raises(ValueError, match=r"no C\+\+ compiler"):
            frames_to_patches(frames, size=(28, 28), backend="native")
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 1
        assert "plain torch" in lines[0]
        assert "no C++ compiler" in lines[0]
    finally:
        native._failure.cache_clear()


PEAK = """
import torch
from videor1_kernels import frames_to_patches
torch.set_num_threads(2)
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
frames = torch.zeros(16, 1080, 1920, 3, dtype=torch.uint8)
frames_to_patches(frames[:2, :56, :56], size=(224, 420), backend="native")
before = peak()
frames_to_patches(frames, size=(224, 420), backend="native")
print(peak() - before)
"""


def test_less_than_a_tenth_of_the_memory() -> None:
    """Of the chain's, which holds 16 frames of 1080p in fp32."""
    environment = {**os.environ, "PYTHONPATH": str(Path(videor1_kernels.__file__).parents[1])}
    command = [sys.executable, "-c", PEAK]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert taken - 3840 * 1176 * 2 // 1024 < 16 * 1080 * 1920 * 3 * 4 // 1024 / 10  # KiB


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")


def nvcc(*options: str) -> str:
    """What it says, compiling with csrc/ among its headers."""
    command = ["nvcc", "-std=c++17", f"-I{CSRC}", f"-I{CSRC / 'include'}", *options]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return said.stderr


@needs_nvcc
@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(target, marks=pytest.mark.full) for target in ("sm_80", "sm_100"))]
)
def test_cuda_compiles_without_spills(target: str, tmp_path: Path) -> None:
    options = ["-O3", f"-arch={target}", "-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "kernels.cubin")]
    said = nvcc(*options, str(CSRC / "frames_to_patches.cu"))
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) == 4 * 3 * 3, (
        "formats and alignments, output widths; a tiled kernel for each, a direct one per format"
    )
    assert set(spills) == {("0", "0")}
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert max(registers) <= 128, "two blocks of 256 threads on a multiprocessor"


@needs_nvcc
def test_the_bindings_compile_for_cuda(tmp_path: Path) -> None:
    definitions = [extension.STABLE_ABI, "-DVIDEOR1_CUDA", "-DUSE_CUDA"]
    include = Path(torch.__file__).parent / "include"
    nvcc("-c", *definitions, f"-I{include}", str(CSRC / "bindings.cpp"), "-o", str(tmp_path / "bindings.o"))


def test_code_that_fails_at_its_launch_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch that is tried on a card, here on the CPU; and what it makes of a driver that refuses, or lies."""
    extension.load_operators("cpu")
    native._launch(torch.device("cpu"))
    for fault, message in (
        (RuntimeError("CUDA error: the provided PTX was compiled with an unsupported toolchain.\nmore"), "PTX.*newer"),
        (None, "black"),
    ):

        def make(frame: Tensor, fault: Exception | None = fault, **options: Any) -> Tensor:
            if fault is not None:
                raise fault
            return torch.ones(1, dtype=torch.uint8)

        monkeypatch.setattr(native, "frames_to_patches", make)
        with pytest.raises(extension.Unavailable, match=message):
            native._launch(torch.device("cpu"))
