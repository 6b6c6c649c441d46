"""Examine the machine: the GPUs that torch can use beside those that are installed, processors, memory and disks."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from videor1.doctor.rows import Finding

GIB = 1 << 30
LEAST_CAPABILITY = (8, 0)  # the lowest compute capability that the tests compile the kernels for
LEAST_FREE_GPU = 1 * GIB
LEAST_FREE_DISK = 2 * GIB
LEAST_SHARED = 1 << 20  # enough for the semaphores of the decode workers, which send frames through pipes
LEAST_SHARED_NCCL = 1 * GIB
GET_TORCH = "install a torch built for CUDA: https://pytorch.org/get-started/locally"


def gpus() -> list[Finding]:
    """List every GPU that torch can use, or say why there is none."""
    import torch

    cards = nvidia_smi()
    if not torch.cuda.is_available():
        return _no_gpu(cards)
    rows = []
    if cards:
        rows.append(Finding("driver", f"{cards[0][1]}; torch is built for CUDA {torch.version.cuda}"))
    else:
        rows.append(Finding("driver", f"nvidia-smi does not tell; torch is built for CUDA {torch.version.cuda}"))
    return rows + [_gpu(number) for number in range(torch.cuda.device_count())]


def _gpu(number: int) -> Finding:
    import torch

    card = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    capability = (card.major, card.minor)
    bf16 = "bf16" if capability >= LEAST_CAPABILITY else "no bf16"
    value = (
        f"{card.name}, compute capability {card.major}.{card.minor}, {bf16}, {total / GIB:.1f} GiB of memory, "
        f"{free / GIB:.1f} GiB free"
    )
    name = f"cuda:{number}"
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        fix = f"below {least} the kernels are not tested: --device cpu, or another card"
        return Finding(name, value, "warning", fix)
    if free < LEAST_FREE_GPU:
        fix = "end what else holds its memory (nvidia-smi lists it), or --device cuda:N"
        return Finding(name, value, "warning", fix)
    return Finding(name, value, "ok")


def _no_gpu(cards: list[tuple[str, str]]) -> list[Finding]:
    import torch

    if not cards:
        return [Finding("none", "everything runs on the CPU: the demonstration and small models")]
    present = f"{', '.join(name for name, _ in cards)} (driver {cards[0][1]})"
    if torch.version.cuda is None:
        value = f"{present}, but torch {torch.__version__} is built without CUDA"
        return [Finding("unused", value, "warning", GET_TORCH)]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        value = f"{present}, hidden by CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}"
        return [Finding("unused", value, "warning", "unset CUDA_VISIBLE_DEVICES")]
    fix = f"update the driver, or {GET_TORCH} (an older CUDA)"
    value = f"{present}, but torch built for CUDA {torch.version.cuda} cannot use it"
    return [Finding("unused", value, "warning", fix)]


def nvidia_smi() -> list[tuple[str, str]]:
    """Return (name, driver version) of each NVIDIA card that the driver lists; empty without a driver."""
    if not (command := shutil.which("nvidia-smi")):
        return []
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # nvidia-smi fails on a machine without a card.
        return []
    pairs = (line.rpartition(",") for line in output.splitlines())
    return [(name.strip(), driver.strip()) for name, comma, driver in pairs if comma]


def machine() -> list[Finding]:
    """List the cores, main memory, shared memory, and the disks that a run writes to."""
    import psutil  # type: ignore[import-untyped]

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        Finding("processor", f"{cores} cores for this process, of {os.cpu_count()}"),
        Finding("memory", f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB free"),
    ]
    shared = Path("/dev/shm")
    if shared.is_dir():
        rows.append(_shared(shared))
    elif os.name == "posix" and os.uname().sysname == "Linux":
        fix = "mount it (docker run --shm-size=1g), or --data.workers 0"
        rows.append(Finding("/dev/shm", "missing: decode workers cannot start", "broken", fix))
    from videor1_kernels.extension import cache_folder

    for name, folder in (("run folder", Path.cwd()), ("cache", cache_folder()), ("temporary", _temporary())):
        rows.append(_disk(name, folder))
    return rows


def _shared(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    value = f"{_size(usage.total)} of shared memory, {_size(usage.free)} free"
    if not os.access(folder, os.W_OK) or usage.free < LEAST_SHARED:
        fix = "make it larger and writable (docker run --shm-size=1g), or --data.workers 0"
        return Finding("/dev/shm", f"{value}: decode workers cannot start", "broken", fix)
    if usage.free < LEAST_SHARED_NCCL and _gpu_count() > 1:
        fix = "docker run --shm-size=1g or --ipc=host"
        return Finding("/dev/shm", f"{value}: little for NCCL between several GPUs", "warning", fix)
    return Finding("/dev/shm", value, "ok")


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


def _disk(name: str, folder: Path) -> Finding:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    value = f"{folder}, {_size(free)} free"
    if not os.access(existing, os.W_OK):
        return Finding(name, f"{folder}, not writable", "warning", _other_folder(name))
    if free < LEAST_FREE_DISK:
        return Finding(name, value, "warning", f"free some of its disk, or {_other_folder(name)}")
    return Finding(name, value, "ok")


def _other_folder(name: str) -> str:
    """Return the advice how to use another folder."""
    return {
        "run folder": "write runs elsewhere: --output_dir FOLDER",
        "cache": "keep compiled libraries elsewhere: XDG_CACHE_HOME",
        "temporary": "use another folder: TMPDIR",
    }[name]


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / (1 << 20):.0f} MiB"
