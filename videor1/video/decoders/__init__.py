"""Video decoders behind one protocol: PyAV, and optional ones that must be installed separately."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from videor1.errors import ConfigError, did_you_mean
from videor1.video.decoders.container import MAX_PIXELS
from videor1.video.decoders.protocol import Decoder, Frames, FramesChangedError, VideoInfo
from videor1.video.opened import MediaFile

__all__ = ["BACKENDS", "Decoder", "Frames", "FramesChangedError", "VideoInfo", "check_backend", "open_decoder"]

# Class of each optional backend. Its module in this package and the extra that installs its library have the backend's
# name.
_OPTIONAL = {"decord": "DecordDecoder", "torchcodec": "TorchcodecDecoder", "pynvvideocodec": "PyNvVideoCodecDecoder"}
BACKENDS = ("auto", "pyav", "pyav-nvdec", *_OPTIONAL)


def open_decoder(
    path: str | Path | MediaFile,
    *,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    threads: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> Decoder:
    """Open a decoder for one file. The caller must close it.

    Args:
        path: the file; one that is already open stays open when the decoder is closed.
        backend: "auto": PyAV, on the GPU's video engine (NVDEC) where ``device`` is a CUDA device and the engine is
            faster, else on the CPU; "pyav": PyAV on the CPU; "pyav-nvdec": PyAV on the video engine; or the name of an
            optional decoder.
        device: the device that the frames are needed on. A decoder may leave them in main memory.
        threads: CPU threads for decoding; 0: as many as there are cores.
        max_pixels: most pixels of a frame.

    Raises:
        SampleError: the file is missing, cut or no video, or its frames are too large.
        ConfigError: the backend is unknown or not installed.
    """
    _check_name(backend)
    if backend in _OPTIONAL:
        return _optional_class(backend)(path, device=device, threads=threads, max_pixels=max_pixels)
    from videor1.video.decoders.pyav import PyAvDecoder

    hardware = {"auto": "auto", "pyav": "none", "pyav-nvdec": "cuda"}[backend]
    return PyAvDecoder(
        path,
        threads=threads,
        hardware=hardware,  # type: ignore[arg-type]
        device=device,
        max_pixels=max_pixels,
    )


def check_backend(backend: str) -> None:
    """Raise a ``ConfigError`` for an unknown backend, or one whose package is not installed or does not load."""
    _check_name(backend)
    if backend in _OPTIONAL:
        from videor1.video.decoders.library import import_library

        import_library(_optional_class(backend).module, backend)


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        hint = did_you_mean(str(backend), BACKENDS)
        raise ConfigError(f"video.backend: {backend!r} is none of {', '.join(BACKENDS)}{hint}")


def _optional_class(backend: str) -> Any:
    return getattr(import_module(f"videor1.video.decoders.{backend}"), _OPTIONAL[backend])
