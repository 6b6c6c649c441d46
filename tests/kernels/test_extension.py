"""The compiled product of bf16 matrices, how it is compiled and kept, and what is done and said without it.

On a CPU without AVX-512 BF16 the tests of the product check that fp32 takes its place, and that this is said.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import shlex
import shutil
import types
from collections.abc import Callable, Iterator
from ctypes import CDLL
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from torch import Tensor
from triton_cases import Counter, for_threads

from videor1_kernels import extension, linear_logprob
from videor1_kernels.linear_logprob import native, reference, tiles
from videor1_kernels.linear_logprob.inputs import HeadInputs
from videor1_kernels.testing import rounding

CPU = Path("/proc/cpuinfo")
FAST = (
    CPU.exists()
    and "avx512_bf16" in CPU.read_text()
    and "ATEN_CPU_CAPABILITY" not in os.environ  # torch is to run as on a lesser CPU
    and any(map(shutil.which, ("c++", "g++", "clang++")))
)
EPS = 2.0**-24  # rounding to fp32
FALLBACK = "bf16 logits on the CPU are computed in fp32"
Product = Callable[[Tensor, Tensor], Tensor]
Arrange = Callable[[pytest.MonkeyPatch, Path], object]


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, no wishes, nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("VIDEOR1_NATIVE", "CXX"):
        monkeypatch.delenv(name, raising=False)
    native._bf16_product.cache_clear()
    yield
    native._bf16_product.cache_clear()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == extension.log.name]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("kept"))


@pytest.fixture
def product(kept: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Product:
    """What multiplies bf16 matrices here."""
    monkeypatch.setenv("XDG_CACHE_HOME", kept)  # compiled once for all tests
    made = native.bf16_product()
    if FAST:
        assert made is not None, said(caplog)
        return made
    assert made is None
    assert [FALLBACK in line for line in said(caplog)].count(True) == 1
    return lambda a, b: a.float() @ b.float().T


def assert_same(a: Tensor, b: Tensor) -> None:
    """The same bits from the compiled product; torch's own of fp32 promises none."""
    bound = 0.0 if FAST or not b.numel() else rounding(1500, b.abs().max().item())  # the most terms of any test here
    torch.testing.assert_close(a, b, rtol=0, atol=bound)


def matrices(n: int, m: int, k: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, k).bfloat16(), torch.randn(m, k).bfloat16()


def errors(product: Product, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of a b^T: [n, m] errors, and the bound on those of fp32 sums of k terms, whatever their order.

    A product that is rounded, dropped or counted twice is far beyond it.
    """
    exact = a.double() @ b.double().T
    out = product(a, b)
    assert out.dtype == torch.float32
    assert out.shape == exact.shape
    assert out.is_contiguous()
    return out - exact, (a.shape[1] + 2) * EPS * (a.double().abs() @ b.double().abs().T)


SHAPES = [
    (1, 1, 1), (1, 1, 2), (6, 64, 512), (5, 63, 511), (7, 65, 513), (2, 3, 1025), (3, 200, 33), (130, 1, 64),
    (1, 129, 1024), (4, 130, 31), (12, 16, 2050), (0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_entry_is_within_the_bound_of_fp32_sums(product: Product, shape: tuple[int, int, int]) -> None:
    error, bound = errors(product, *matrices(*shape))
    assert (error.abs() <= bound).all()


@pytest.mark.parametrize("k", [512, 1024, 3584])
def test_as_accurate_as_fp32_tiles(product: Product, k: int) -> None:
    a, b = matrices(48, 256, k)
    ours, plain = (errors(f, a, b)[0].square().mean().sqrt() for f in (product, lambda x, y: x.float() @ y.float().T))
    tiled = errors(lambda x, y: tiles.product(x.float(), y.float()), a, b)[0].square().mean().sqrt()
    assert ours <= 1.25 * max(plain, tiled)


def test_any_strides(product: Product) -> None:
    a, b = matrices(11, 70, 90)
    expected = product(a, b)
    inner = torch.zeros(11, 180, dtype=torch.bfloat16)
    inner[:, ::2] = a
    offset = torch.full((72, 101), float("nan"), dtype=torch.bfloat16)
    offset[1:71, 3:93] = b
    for x in (a, a.T.contiguous().T, inner[:, ::2]):
        for y in (b, b.T.contiguous().T, offset[1:71, 3:93]):
            assert_same(product(x, y), expected)
    same = product(a[:1].expand(5, -1), b)
    assert_same(same, expected[:1].expand(5, -1))
    column = torch.randn(6, 4).bfloat16()[:, 1:2]  # k is 1, and its stride not
    assert torch.equal(product(column, column), column.float() @ column.float().T)


def test_infinities_and_nans_stay_in_their_rows(product: Product) -> None:
    a, b = matrices(8, 66, 65)
    a[2, 64], a[3, 5], b[65, 0] = float("inf"), float("nan"), float("-inf")
    out = product(a, b)
    clean = torch.ones_like(out, dtype=torch.bool)
    clean[2:4], clean[:, 65] = False, False
    assert out[clean].isfinite().all()
    assert torch.equal(out[2, :65], torch.where(b[:65, 64] > 0, torch.inf, -torch.inf))
    assert out[3].isnan().all()


def test_same_bits_for_any_threads_and_every_run(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = matrices(67, 1000, 1500)
    results = for_threads(lambda: product(a, b), 1, 2, 2, 3)
    if FAST:
        monkeypatch.setattr(extension, "torch_parallel_for", lambda: None)  # a torch that does not export it
        native._bf16_product.cache_clear()
        results.append(native.bf16_product()(a, b))
    for result in results[1:]:
        assert_same(result, results[0])


def test_torch_lends_its_threads() -> None:
    assert extension.torch_parallel_for()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 96).bfloat16(), (torch.randn(300, 96) / 10).bfloat16()
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(300, (70,))


def train() -> tuple[Tensor, ...]:
    hidden, weight, labels = inputs()
    logp, entropy = linear_logprob(hidden, weight, labels, backend="reference")
    (logp.sum() + 0.3 * entropy.sum()).backward()
    return logp.detach(), entropy.detach(), hidden.grad, weight.grad


def test_linear_logprob_with_it_and_without(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter(product)
    if FAST:
        monkeypatch.setattr(tiles, "bf16_product", lambda: counter)
    with_it = train()
    assert counter.calls == (2 if FAST else 0)  # the logits, then the logits again: never a gradient
    monkeypatch.setattr(tiles, "bf16_product", lambda: None)
    without = train()
    for ours, plain in zip(with_it[:2], without[:2], strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=rounding(96 + 300, plain.abs().max().item()))
    for ours, plain in zip(with_it[2:], without[2:], strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, plain, rtol=2**-7, atol=1e-6)  # a rounding of bf16 may tip over


def test_other_dtypes_never_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "bf16_product", lambda: pytest.fail("asked"))
    hidden, weight, labels = (x.detach() for x in inputs())
    for x, w, bias in [
        (hidden.half(), weight.half(), None),
        (hidden.float(), weight, None),
        (hidden, weight.double(), None),
        (hidden, weight, torch.zeros(300, dtype=torch.float64)),
    ]:
        reference.forward(HeadInputs(x, w, labels, bias, 1.0))


@pytest.fixture
def fp32_result(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ...]:
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "bf16_product", lambda: None)
        return train()


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def compiler_of(text: str) -> Arrange:
    return lambda patch, folder: patch.setenv("CXX", shlex.quote(script(folder, text)))


FAILING = compiler_of('[ "$1" = --version ] && echo 1 && exit\necho "x.cpp:1: error: no" >&2\nexit 3')


def no_source(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(extension, "__file__", str(folder / "package" / "extension.py"))
    compiler_of("exit 0")(patch, folder)


def no_cache(patch: pytest.MonkeyPatch, folder: Path) -> None:
    compiler_of("exit 0")(patch, folder)
    (folder / "file").touch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "file"))


def no_instructions(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(extension, "load", lambda name: types.SimpleNamespace(bf16_product_supported=lambda: 0))


@pytest.mark.parametrize(
    ("arrange", "reason"),
    [
        (lambda patch, folder: patch.setenv("VIDEOR1_NATIVE", "0"), "VIDEOR1_NATIVE=0 turns it off"),
        (lambda patch, folder: patch.setenv("PATH", str(folder)), "no C++ compiler"),
        (lambda patch, folder: patch.setenv("CXX", "/nowhere/c++ -O1"), "CXX=/nowhere/c++ -O1 is not found"),
        (lambda patch, folder: patch.setenv("CXX", "c++ '"), "is not a command"),
        (FAILING, "failed with exit status 3 (x.cpp:1: error: no)"),
        # One that makes something that is no library, and one that makes nothing.
        (compiler_of('for last; do :; done\n[ "$last" = --version ] || echo nothing > "$last"'), "cannot be loaded"),
        (compiler_of("exit 0"), "XDG_CACHE_HOME"),
        (no_source, "csrc/bf16_product.cpp is neither in"),
        (no_cache, "XDG_CACHE_HOME"),
        (
            lambda patch, folder: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2"),
            "this CPU has no AVX-512",
        ),
        (no_instructions, "this CPU has no AVX-512 BF16 instructions"),
    ],
)
def test_without_it_fp32_takes_its_place_and_says_so_once(
    arrange: Arrange,
    reason: str,
    fp32_result: tuple[Tensor, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    arrange(monkeypatch, tmp_path)
    for _ in range(2):
        for ours, expected in zip(train(), fp32_result, strict=True):
            assert torch.equal(ours, expected)
    [line] = [line for line in said(caplog) if FALLBACK in line]
    assert reason in line
    assert "\n" not in line


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A stand-in that needs no compiler: it "compiles" to a copy of libm, and notes each time."""
    libm = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libm" in line)
    notes = tmp_path / "notes"
    notes.touch()
    text = f"""
[ "$1" = --version ] && echo "${{FAKE_VERSION:-1}}" && exit
echo made >> '{notes}'
sleep 0.05
for last; do :; done
cp '{libm}' "$last"
"""
    monkeypatch.setenv("CXX", shlex.quote(script(tmp_path, text)))
    return lambda: len(notes.read_text().splitlines())


def libraries() -> list[Path]:
    return sorted(extension.cache_folder().iterdir())


def works(library: CDLL) -> bool:
    return library.abs(-3) == 3


def test_compiled_once_and_said(compiler: Callable[[], int], caplog: pytest.LogCaptureFixture) -> None:
    assert works(extension.load("bf16_product"))
    [path] = libraries()
    assert said(caplog) == [f"videor1_kernels: compiling bf16_product.cpp into {path} (once)"]
    assert works(extension.load("bf16_product"))
    assert len(said(caplog)) == compiler() == 1


def test_another_source_compiler_flag_or_machine_makes_another_library(
    compiler: Callable[[], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = [
        lambda: None,
        lambda: monkeypatch.setenv("FAKE_VERSION", "2"),
        lambda: monkeypatch.setattr(extension, "FLAGS", (*extension.FLAGS, "-g")),
        lambda: monkeypatch.setattr(platform, "machine", lambda: "other"),
        lambda: monkeypatch.setattr(extension, "_csrc", lambda source: tmp_path),
    ]
    (tmp_path / "bf16_product.cpp").write_text("int changed;")
    for count, change in enumerate(changes, 1):
        change()
        extension.load("bf16_product")
        assert len(libraries()) == compiler() == count


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-32],
        lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
        lambda content: b"not a library at all",
    ],
)
def test_a_damaged_library_is_compiled_anew(
    damage: Callable[[bytes], bytes], compiler: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    extension.load("bf16_product")
    [path] = libraries()
    whole = path.read_bytes()
    path.unlink()  # it is mapped into this process
    path.write_bytes(damage(whole))
    assert works(extension.load("bf16_product"))
    assert libraries() == [path]
    assert path.read_bytes() == whole
    assert compiler() == 2
    assert said(caplog)[1] == f"videor1_kernels: {path} is damaged: compiling it anew"


def _load_in_another_process(barrier: Any) -> None:
    barrier.wait()
    os._exit(0 if works(extension.load("bf16_product")) else 1)


def test_processes_may_compile_at_once(compiler: Callable[[], int]) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(5)
    processes = [context.Process(target=_load_in_another_process, args=(barrier,)) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert compiler() == 1, "one compiles, the others wait for it"
    assert len(libraries()) == 1
    assert works(extension.load("bf16_product"))


def test_a_failed_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FAILING(monkeypatch, tmp_path)
    with pytest.raises(extension.Unavailable, match="error: no"):
        extension.load("bf16_product")
    assert libraries() == []


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert extension.cache_folder() == tmp_path / "cache" / "videor1"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative/path"):  # the XDG base directory specification has both ignored
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert extension.cache_folder() == tmp_path / "home" / ".cache" / "videor1"
