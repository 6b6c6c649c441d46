"""The C++ of csrc/: compiled at its first use into a library in the user's cache folder, then loaded from there.

Nothing is compiled at installation, and nothing needs the result: who loads a library has another way to compute the
same, and says so where it is taken. VIDEOR1_NATIVE=0 in the environment turns all of it off.
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
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared")
BUILD_SECONDS = 300

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """Why a library cannot be used here, in words that follow a colon."""


def load(name: str) -> ctypes.CDLL:
    """The library made of csrc/``name``.cpp, compiled if it is not in the cache. Raises Unavailable.

    Its file is named after the source, the compiler's version, the flags and the machine, so a change of any makes
    another one. It ends with the SHA-256 of what precedes it: a damaged file is compiled anew, never loaded.
    """
    if os.environ.get("VIDEOR1_NATIVE", "1").lower() in ("0", "false", "off", "no", "n"):
        raise Unavailable(f"VIDEOR1_NATIVE={os.environ['VIDEOR1_NATIVE']} turns it off")
    if sys.platform != "linux":
        raise Unavailable(f"it is compiled on Linux only, and this is {sys.platform}")
    compiler = _compiler()
    folder = cache_folder()
    try:
        source = _source(name)
        version = _run([*compiler, "--version"])
        key = "\0".join([source.read_text(encoding="utf-8"), version, *FLAGS, platform.machine()])
        path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
        if not _is_whole(path):
            _build(source, compiler, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"no library can be kept in {folder} ({error}); XDG_CACHE_HOME moves the folder") from error


@functools.cache
def torch_parallel_for() -> ctypes.c_void_p | None:
    """torch's own threads, so that no second pool competes with them. None: this torch does not export them."""
    import torch

    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # already loaded
        return ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def cache_folder() -> Path:
    """Where compiled libraries are kept: videor1 in XDG_CACHE_HOME, or in ~/.cache. May be deleted at any time."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return Path(home if os.path.isabs(home) else os.path.expanduser("~/.cache"), "videor1")


def _source(name: str) -> Path:
    package = Path(__file__).parent
    for folder in (package / "csrc", package.parent / "csrc"):  # of an installed package, of a checkout
        if (folder / f"{name}.cpp").is_file():
            return folder / f"{name}.cpp"
    raise Unavailable(f"csrc/{name}.cpp is neither in {package} nor beside it")


def _compiler() -> list[str]:
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise Unavailable(f"CXX={os.environ['CXX']} is not a command ({error})") from error
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise Unavailable(f"CXX={os.environ['CXX']} is not found" if named else "no C++ compiler (c++, g++, clang++, CXX)")


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() == content[-32:]:
        return True
    log.warning("videor1_kernels: %s is damaged: compiling it anew", path)
    return False


def _build(source: Path, compiler: list[str], path: Path) -> None:
    log.warning("videor1_kernels: compiling %s into %s (once)", source.name, path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # other processes may be at it too: the last one wins
        made = Path(folder, path.name)
        _run([*compiler, *FLAGS, str(source), "-o", str(made)])
        with made.open("rb+") as file:
            file.write(hashlib.sha256(file.read()).digest())
        os.replace(made, path)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{shlex.join(command)} failed ({error})") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise Unavailable(f"{shlex.join(command)} failed with exit status {done.returncode} ({said or 'nothing said'})")
    return done.stdout
