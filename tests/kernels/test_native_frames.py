"""The compiled frames_to_patches against the exact chain in fp64: the C++, and the CUDA on an emulation of threads."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from native_cases import CSRC, KINDS, emulated, made_frames, run
from test_frames_to_patches import MATRICES, resized

import videor1_kernels
from videor1_kernels import extension, frames_to_patches, last_backend
from videor1_kernels.frames_to_patches import YuvFrames, native, normalize_patches
from videor1_kernels.frames_to_patches.reference import frames_to_patches_reference

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
def cuda(tmp_path_factory):
    return functools.partial(run, emulated(tmp_path_factory.mktemp("emulated")), align=4)


@pytest.fixture(scope="module")
def cpu():
    assert native.unavailable(torch.device("cpu"), None) is None
    return functools.partial(run, torch.ops.videor1_csrc)


@pytest.fixture(scope="module")
def card(cpu):
    assert native.unavailable(torch.device("cuda"), None) is None
    return functools.partial(run, torch.ops.videor1_csrc, align=4, device="cuda")


@pytest.fixture(params=["cpu", "cuda", *(["card"] if torch.cuda.is_available() else [])])
def kernel(request):
    return request.getfixturevalue(request.param)


def chain(frames, size, rotation, *, mirrored=False, rounded_rgb=False):
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


def levels_of(patches, frames, size):
    """uint8 patches back to [F, H, W, 3]."""
    T, h, w = -(-frames // 2), size[0] // 28, size[1] // 28
    x = patches.view(T, h, w, 2, 2, 3, 2, 14, 14).permute(0, 6, 1, 3, 7, 2, 4, 8, 5)  # t tp hb hm py wb wm px c
    return x.reshape(2 * T, *size, 3)[:frames].numpy().astype(np.float64)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source", "size"), SIZES)
def test_within_a_level_of_the_exact_chain(kernel, kind, source, size, rotation, mirrored):
    frames = made_frames(kind, 3, *source, matrix="709")
    upright = size if rotation % 180 == 0 else size[::-1]
    got, _ = kernel(frames, size=upright, rotation=rotation, mirrored=mirrored)
    assert_within_a_level(got, frames, upright, rotation, mirrored)


@pytest.mark.parametrize("range_", ["limited", "full"])
@pytest.mark.parametrize("matrix", list(MATRICES))
@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_matrix_and_range(kernel, kind, matrix, range_):
    frames = made_frames(kind, 2, 63, 85, matrix=matrix, range_=range_)
    assert_within_a_level(kernel(frames, size=(28, 56))[0], frames, (28, 56), 0)


def assert_within_a_level(patches, frames, size, rotation, mirrored=False):
    levels = levels_of(patches, len(frames), size)
    error = np.abs(levels - chain(frames, size, rotation, mirrored=mirrored))
    assert error.max() <= 1
    assert error.mean() <= 1e-3, "only sums within fp32's error of a half may go the other way"
    assert np.abs(levels - chain(frames, size, rotation, mirrored=mirrored, rounded_rgb=True)).max() <= 1


@pytest.mark.parametrize("range_", ["limited", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_good_from_8_bit_rgb(kernel, kind, range_):
    """At the scale of 1080p, a chain that rounds RGB before the resize is as near as 0.1 of a level on average."""
    frames = made_frames(kind, 1, 541, 961, range_=range_, matrix="709")
    levels = levels_of(kernel(frames, size=(112, 196))[0], 1, (112, 196))
    error = np.abs(levels - chain(frames, (112, 196), 0, rounded_rgb=True))
    assert error.max() <= 1
    assert error.mean() <= 0.1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", ORDERS)
def test_every_output(kernel, order, dtype):
    frames = made_frames("nv12", len(order), 70, 101)
    levels, _ = kernel(frames, size=(56, 84))
    ordered, permuted = kernel(frames, size=(56, 84), permutation=order, dtype=dtype, both=True)
    as_stored = (lambda x: x) if dtype == torch.uint8 else (lambda x: normalize_patches(x, dtype))
    assert torch.equal(ordered, as_stored(levels))
    shuffled = YuvFrames(tuple(plane[order] for plane in frames.planes))
    assert torch.equal(permuted, as_stored(kernel(shuffled, size=(56, 84))[0]))
    assert torch.equal(kernel(frames, size=(56, 84), permutation=order, dtype=dtype)[1], permuted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [64, 65])
def test_rows_of_any_stride(kernel, kind, width):
    padded = made_frames(kind, 2, 50, width, padding=3)
    dense = YuvFrames(tuple(p.contiguous() for p in padded.planes)) if kind != "rgb" else padded.contiguous()
    assert torch.equal(kernel(padded, size=(28, 56))[0], kernel(dense, size=(28, 56))[0])


def test_the_two_kernels_agree(cpu, cuda):
    frames = made_frames("p010", 5, 120, 1500, matrix="2020")
    ours, theirs = (kernel(frames, size=(84, 700))[0].short() for kernel in (cpu, cuda))
    assert (ours - theirs).abs().max() <= 1
    assert (ours != theirs).double().mean() <= 1e-4


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_bits_do_not_depend_on_the_threads(cpu, threads):
    frames = made_frames("nv12", 2, 300, 400)
    expected, _ = cpu(frames, size=(252, 336), dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(cpu(frames, size=(252, 336), dtype=torch.float32)[0], expected)
    finally:
        torch.set_num_threads(before)


def test_auto_takes_it_and_the_api_reaches_all_of_it():
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
    with pytest.raises(ValueError, match="multiple of 90"):
        frames_to_patches(frames, size=(28, 28), rotation=45)
    with pytest.raises(ValueError, match="both=True"):
        frames_to_patches(frames, size=(28, 28), both=True)


def test_no_compiler_is_said_once_and_torch_does_it(monkeypatch, tmp_path, caplog):
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
import sys, torch
import torch.nn.functional as F
from videor1_kernels import frames_to_patches
torch.set_num_threads(2)
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
frames = torch.zeros(16, 1080, 1920, 3, dtype=torch.uint8)
if sys.argv[1] == "native":
    def call(x): frames_to_patches(x, size=(224, 420), backend="native")
else:
    def call(x): F.interpolate(x.permute(0, 3, 1, 2).float(), size=(224, 420), mode="bicubic", antialias=True)
call(frames[:2, :56, :56])
before = peak()
call(frames)
print(peak() - before)
"""


def test_less_than_a_tenth_of_the_memory():
    root = Path(videor1_kernels.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    ours, chain = (
        int(
            subprocess.run(
                [sys.executable, "-c", PEAK, which], check=True, capture_output=True, text=True, env=environment
            ).stdout
        )
        for which in ("native", "chain")
    )
    out = 3840 * 1176 * 2 // 1024
    assert chain > 350_000, "KiB; 16 frames of 1080p in fp32 are 398 MB"
    assert ours - out < chain / 10


TARGETS = ("sm_80", "sm_90", "sm_100")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")
@pytest.mark.parametrize("target", TARGETS)
def test_cuda_compiles_without_spills(target, tmp_path):
    command = [
        "nvcc",
        "-O3",
        "-std=c++17",
        f"-arch={target}",
        "-Xptxas",
        "-v",
        f"-I{CSRC}",
        f"-I{CSRC / 'include'}",
        "-c",
        str(CSRC / "frames_to_patches.cu"),
        "-o",
        str(tmp_path / "kernels.o"),
    ]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said.stderr)
    assert len(spills) == 4 * 3 * 3, (
        "formats and alignments, output widths; a tiled kernel for each, a direct one per format"
    )
    assert set(spills) == {("0", "0")}
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said.stderr)]
    assert max(registers) <= 128, "two blocks of 256 threads on a multiprocessor"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")
def test_the_bindings_compile_for_cuda(tmp_path):
    include = Path(torch.__file__).parent / "include"
    command = [
        "nvcc",
        "-std=c++17",
        extension.STABLE_ABI,
        "-DVIDEOR1_CUDA",
        "-DUSE_CUDA",
        f"-I{CSRC}",
        f"-I{CSRC / 'include'}",
        f"-I{include}",
        "-c",
        str(CSRC / "bindings.cpp"),
        "-o",
        str(tmp_path / "bindings.o"),
    ]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
