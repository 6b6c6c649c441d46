"""The C++ of csrc/: compiled at its first use into a library in the user's cache folder, then loaded from there.

Nothing is compiled at installation. No caller depends on a library: each can compute the same without it, and logs a
warning when it does so. VIDEOR1_NATIVE=0 in the environment turns the compilation off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared")
NVCC_FLAGS = ("-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-shared")
OPERATORS = ("bindings.cpp", "frames_to_patches.cpp")  # on the stable ABI of torch
CUDA_OPERATORS = ("bindings.cpp", "frames_to_patches.cu")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11's, the oldest supported: newer ones load it too
BUILD_SECONDS = 300
_SHORT = {"torch.float32": "fp32", "torch.bfloat16": "bf16"}

log = logging.getLogger(__name__)
_finding = threading.Lock()  # one thread compiles, the others wait for it


class Unavailable(Exception):
    """Says why a library cannot be used here, in words that can follow a colon."""


def load(name: str) -> ctypes.CDLL:
    """The library of csrc/``name``.cpp, compiled if it is not in the cache. Raises Unavailable."""
    _check_wanted()
    return _loaded(_library(name, (f"{name}.cpp",), _compiler(), FLAGS), ctypes.CDLL)


def function(library: str, name: str, arguments: Sequence[Any], what: str) -> Callable[..., int] | str:
    """A function of csrc/``library``.cpp that returns an int, or why there is none here.

    The log then says that ``what`` runs in plain torch. ``arguments`` are ctypes' types of its parameters.
    """
    try:
        call = getattr(load(library), name)
    except Unavailable as reason:
        log.warning("videor1_kernels: %s on the CPU runs in plain torch, slower: %s", what, reason)
        return str(reason)
    call.argtypes = list(arguments)
    return call


def unavailable_on_cpu(
    device: torch.device,
    dtype: torch.dtype | None,
    dtypes: Collection[torch.dtype],
    find: Callable[[], Callable[..., int] | str],
) -> str | None:
    """Why a function of ``dtypes`` on a CPU cannot run, or None; ``find`` is called where all else allows it."""
    if device.type != "cpu":
        return "it runs on a CPU"
    if dtype is not None and dtype not in dtypes:
        return f"it takes {' and '.join(_SHORT[str(known)] for known in dtypes)}, and an input is {dtype}"
    with _finding:
        found = find()
    return found if isinstance(found, str) else None


def vector_bits() -> int:
    """How wide vectors may be: as those of torch itself, which ATEN_CPU_CAPABILITY bounds."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return 512 if capability.startswith("AVX512") else 256 if capability == "AVX2" else 128


def load_operators(device_type: str) -> None:
    """Make ``torch.ops.videor1_csrc`` run on "cpu" or "cuda", compiling the library if it is not in the cache.

    Raises Unavailable.
    """
    import torch

    _check_wanted()
    if device_type == "cpu":
        name, sources, compiler = "operators", OPERATORS, _compiler()
        flags: tuple[str, ...] = (*FLAGS, STABLE_ABI)
        links: tuple[str, ...] = ("-ltorch_cpu",)
    else:
        numbers = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        targets = (f"-gencode=arch=compute_{a}{b},code=sm_{a}{b}" for a, b in sorted(numbers))
        name, sources, compiler = "operators-cuda", CUDA_OPERATORS, _nvcc()
        flags = (*NVCC_FLAGS, STABLE_ABI, *targets)
        links = ("-ltorch_cpu", "-ltorch_cuda")
    _loaded(_library(name, sources, compiler, flags, links), torch.ops.load_library)


@functools.cache
def torch_parallel_for() -> ctypes.c_void_p | None:
    """torch's own parallel loop, so that no second pool of threads competes; None if this torch does not export it."""
    import torch

    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # already loaded
        return ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def cache_folder() -> Path:
    """The folder of the compiled libraries: videor1 in XDG_CACHE_HOME or in ~/.cache. It may be deleted at any time."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return Path(home if os.path.isabs(home) else os.path.expanduser("~/.cache"), "videor1")


def _check_wanted() -> None:
    if os.environ.get("VIDEOR1_NATIVE", "1").lower() in ("0", "false", "off", "no", "n"):
        raise Unavailable(f"VIDEOR1_NATIVE={os.environ['VIDEOR1_NATIVE']} turns it off")
    if sys.platform != "linux":
        raise Unavailable(f"it is compiled on Linux only, and this is {sys.platform}")


def _library(
    name: str, sources: Sequence[str], compiler: Sequence[str], flags: Sequence[str], torch_links: Sequence[str] = ()
) -> Path:
    """The file of a library, compiled if it is not in the cache.

    With ``torch_links`` it is compiled against torch's headers and these of torch's libraries. The file's name is a
    hash of the sources, the headers, the compiler's version, the flags and the machine, so each combination has its own
    file. It ends with the SHA-256 of its other bytes, so that a damaged file is compiled again and never loaded.
    """
    folder = cache_folder()
    try:
        csrc = _csrc(sources[0])
        files = [csrc / source for source in sources]
        headers = sorted(csrc.rglob("*.h"))
        version = _run([*compiler, "--version"])
        texts = (file.read_text(encoding="utf-8") for file in (*files, *headers))
        key = "\0".join([*texts, version, *flags, platform.machine()])
        path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
        if not _is_whole(path):
            paths = _torch_paths() if torch_links else []
            includes = f"-I{csrc}", f"-I{csrc / 'include'}"
            _build(path, [*compiler, *flags, *includes, *paths, *map(str, files), *torch_links], files)
        return path
    except OSError as error:
        raise Unavailable(f"no library can be kept in {folder} ({error}); XDG_CACHE_HOME moves the folder") from error


def _torch_paths() -> list[str]:
    import torch

    folder = Path(torch.__file__).parent
    return [f"-I{folder / 'include'}", f"-L{folder / 'lib'}"]


def _loaded(path: Path, load: Callable[[str], T]) -> T:
    try:
        return load(str(path))
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded ({error})") from error


def _csrc(source: str) -> Path:
    package = Path(__file__).parent
    for folder in (package / "csrc", package.parent / "csrc"):  # of an installed package, of a checkout
        if (folder / source).is_file():
            return folder
    raise Unavailable(f"csrc/{source} is neither in {package} nor beside it")


def _compiler() -> list[str]:
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise Unavailable(f"CXX={os.environ['CXX']} is not a command ({error})") from error
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise Unavailable(f"CXX={os.environ['CXX']} is not found" if named else "no C++ compiler (c++, g++, clang++, CXX)")


def _nvcc() -> list[str]:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for path in (None, os.path.join(home, "bin")):
        if nvcc := shutil.which("nvcc", path=path):
            return [nvcc]
    raise Unavailable(f"no CUDA compiler (nvcc, in PATH or in {home}/bin; CUDA_HOME moves the latter)")


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() == content[-32:]:
        return True
    log.warning("videor1_kernels: %s is damaged: compiling it anew", path)
    return False


def _build(path: Path, command: Sequence[str], sources: Sequence[Path]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _one_at_a_time(path.parent):
        if path.exists() and _is_whole(path):  # another process has made it meanwhile
            return
        log.warning("videor1_kernels: compiling %s into %s (once)", ", ".join(file.name for file in sources), path)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, path.name)
            _run([*command, "-o", str(made)])
            with made.open("rb+") as file:
                file.write(hashlib.sha256(file.read()).digest())
            os.replace(made, path)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """A lock, since decode workers start together: one compiles while the others wait.

    If the folder cannot be locked, each of them compiles.
    """
    import fcntl  # there is none on Windows, where nothing is compiled

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{shlex.join(command)} failed ({error})") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise Unavailable(f"{shlex.join(command)} failed with exit status {done.returncode} ({said or 'nothing said'})")
    return done.stdout
