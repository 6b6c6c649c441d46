"""Examine the compilers, the libraries of csrc/, the video decoders and the backend of each kernel.

Each is found in the same way as the code finds it in a run.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from typing import Any

from videor1.doctor.rows import Finding

GET_CXX = "install a C++ compiler (Debian, Ubuntu: apt install g++), or name one in CXX"
GET_NVCC = "install the CUDA toolkit of torch's CUDA version, or name its folder in CUDA_HOME"
LONG_CLIP, SHORT_CLIP = (1920, 1080, 1800), (640, 360, 300)  # (width, height, frames) of clips to show `auto` with


def compilers() -> list[Finding]:
    """List the compilers that ``videor1_kernels.extension`` finds, and whether csrc/'s libraries build and load."""
    import torch

    from videor1_kernels import extension

    gpu = torch.cuda.is_available()
    rows = [
        _compiler("C++", extension._compiler, GET_CXX, "warning"),
        _compiler("nvcc", extension._nvcc, GET_NVCC if gpu else "", "warning" if gpu else "absent"),
    ]
    if gpu:
        rows.append(_triton_compiler())
    rows.append(Finding("cache", str(extension.cache_folder())))
    rows += [
        _library("bf16_product", "bf16 log-probs"),
        _library("prefix_attention", "attention of packed rows"),
        _library("decode_attention", "decode attention in fp32"),
    ]
    rows.append(_operators("cpu"))
    return rows + ([_operators("cuda")] if gpu else [])


def _compiler(name: str, find: Any, fix: str, missing: Any) -> Finding:
    from videor1_kernels.extension import Unavailable

    try:
        command = find()
    except Unavailable as reason:
        return Finding(name, str(reason), missing, fix)
    try:
        output = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(name, f"{shutil.which(command[0])}, which does not run ({error})", "warning", fix or GET_NVCC)
    lines = output.strip().splitlines() or ["it tells no version"]
    version = next((line for line in lines if "release" in line), lines[0])
    return Finding(name, f"{shutil.which(command[0])}: {version.strip()}", "ok")


def _triton_compiler() -> Finding:
    """Find the C compiler by Triton's rule: CC, else gcc, else clang."""
    named = os.environ.get("CC")
    found = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    if found:
        return Finding("C for Triton", found, "ok")
    what = f"CC={named} is not found" if named else "no gcc, clang or CC: Triton cannot start its kernels"
    return Finding("C for Triton", what, "broken", "install gcc (Debian, Ubuntu: apt install gcc), or name one in CC")


def _library(name: str, purpose: str) -> Finding:
    from videor1_kernels import extension

    if name == "bf16_product" and not _may_have_bf16():
        return Finding(name, f"not for this processor (no AVX-512): {purpose} are computed in fp32")
    try:
        library = extension.load(name)
    except extension.Unavailable as reason:
        return _unavailable(name, purpose, str(reason))
    if name == "bf16_product" and not library.bf16_product_supported():
        return Finding(name, f"compiled; this processor lacks AVX-512 BF16, so {purpose} are computed in fp32")
    return Finding(name, f"compiled, loads: {purpose} on the CPU", "ok")


def _may_have_bf16() -> bool:
    import torch

    return platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _operators(device_type: str) -> Finding:
    from videor1_kernels import extension

    name = "operators" if device_type == "cpu" else f"operators, {device_type}"
    purpose = f"frames to patches on the {'CPU' if device_type == 'cpu' else 'card'}"
    try:
        extension.load_operators(device_type)
    except extension.Unavailable as reason:
        return _unavailable(name, purpose, str(reason), GET_CXX if device_type == "cpu" else GET_NVCC)
    return Finding(name, f"compiled, loads: {purpose}", "ok")


def _unavailable(name: str, purpose: str, reason: str, fix: str = GET_CXX) -> Finding:
    """Report a library that is unavailable: a warning at most, since plain torch computes the same, only slower."""
    value = f"not used, plain torch does it ({purpose}, slower): {reason}"
    if "VIDEOR1_NATIVE" in reason:
        return Finding(name, value, "info")
    return Finding(name, value, "warning", fix)


def decoders() -> list[Finding]:
    """List PyAV, NVDEC and the optional decoders, and what ``video.backend: auto`` chooses."""
    import av
    import torch
    from av.codec.hwaccel import hwdevices_available

    from videor1.errors import ConfigError
    from videor1.video.decoders import BACKENDS, check_backend

    ffmpeg = getattr(av, "ffmpeg_version_info", "of unknown version")
    rows = [Finding("pyav", f"{av.__version__}, FFmpeg {ffmpeg}", "ok")]
    devices = hwdevices_available()
    gpu = torch.cuda.is_available()
    if "cuda" in devices and gpu:
        rows.append(Finding("pyav-nvdec", "built in; video.device cuda uses it where it is faster", "ok"))
    else:
        why = "no GPU" if not gpu else f"this PyAV knows only {', '.join(devices) or 'none'}"
        rows.append(Finding("pyav-nvdec", f"cannot be used: {why}", "absent"))
    for backend in BACKENDS:
        if backend in ("auto", "pyav", "pyav-nvdec"):
            continue
        try:
            check_backend(backend)
            rows.append(Finding(backend, "installed, loads", "ok"))
        except ConfigError as error:
            reason = str(error).removeprefix("video.backend: ")
            missing = isinstance(error.__cause__, ModuleNotFoundError) and "not installed" in reason
            fix = "" if missing else "install what it misses, or leave it: video.backend auto takes pyav"
            rows.append(Finding(backend, reason, "absent" if missing else "warning", fix))
    rows.append(_choice("auto, video.device cpu", LONG_CLIP, "cpu"))
    if gpu:
        rows += [_choice("auto, video.device cuda", clip, "cuda") for clip in (LONG_CLIP, SHORT_CLIP)]
    return rows


def _choice(name: str, clip: tuple[int, int, int], device: str) -> Finding:
    from videor1.video.decoders import VideoInfo
    from videor1.video.decoders.hardware import decide

    width, height, frames = clip
    info = VideoInfo(
        num_frames=frames,
        fps=30.0,
        width=width,
        height=height,
        rotation=0,
        codec="h264",
        pix_fmt="yuv420p",
        seconds=tuple(i / 30 for i in range(frames)),
        key_frames=tuple(range(0, frames, 250)),
    )
    chosen = decide(info, range(0, frames, frames // 16), device, "auto")
    taken = {"cpu": "pyav on the CPU", "nvdec": "pyav on NVDEC"}[chosen.where]
    return Finding(name, f"{taken} ({chosen.reason}), for {frames // 30} s of {width}x{height} H.264")


def kernels() -> list[Finding]:
    """List the backend that ``auto`` chooses for every operation, and why other backends cannot be used."""
    import torch

    import videor1_kernels

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    shown = str(dtype).removeprefix("torch.")
    ops, rows = operations(), []
    reasons: dict[tuple[str, str], list[str]] = {}
    for op in ops:
        found = videor1_kernels.backends(op, device)
        try:
            taken = videor1_kernels.chosen_backend(op, device, dtype=dtype)
        except ValueError as error:  # An optional package is missing.
            rows.append(Finding(op, str(error), "absent"))
            continue
        for backend, reason in found.items():
            if reason is not None:
                reasons.setdefault((backend, reason), []).append(op)
        rows.append(Finding(op, f"{taken} ({shown} on {device})", "ok"))
        if device == "cuda" and taken == "reference":
            why = "; ".join(f"{backend}: {reason}" for backend, reason in found.items() if reason is not None)
            value = f"reference ({shown} on {device}), plain torch and slower: {why}"
            rows[-1] = Finding(op, value, "warning", GET_NVCC)
    return rows + [
        Finding(f"not {backend}", f"for {'all of them' if without == ops else ', '.join(without)}: {reason}")
        for (backend, reason), without in reasons.items()
    ]


def operations() -> list[str]:
    """Return the names of the public functions that have backends."""
    import videor1_kernels

    found = []
    for name in videor1_kernels.__all__:
        try:
            videor1_kernels.backends(name)
        except ValueError:  # The name is a record, or a function about backends.
            continue
        found.append(name)
    return found
