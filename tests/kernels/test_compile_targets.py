"""Every kernel as shipped, compiled for each GPU that has a configuration: tensor cores, registers, shared memory.

No GPU is needed; with one, it is not used. What was compiled is kept in pytest's cache until a source changes.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import pytest

import videor1_kernels
from benchmarks import compiling, launches, static
from benchmarks.compiling import Kernel, Report, kept_report, kernel_names, release_order, report, sources_key, table
from videor1_kernels.linear_logprob.triton_forward import TILES
from videor1_kernels.prefix_attention import triton_decode
from videor1_kernels.prefix_attention.triton import BLOCKS, WIDE_BLOCKS

ARCHITECTURES = {80, 90, 100}
PACKAGE = Path(videor1_kernels.__file__).parent
TENSOR_CORES = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
# Of a program, bytes: the CUDA C++ Programming Guide's table of technical specifications per compute capability.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
FORWARD = "videor1_kernels.linear_logprob.triton_forward"
DECODE = "videor1_kernels.prefix_attention.triton_decode.prefix_decode"
SPLIT = "videor1_kernels.sampling.triton_split"
DESCRIPTORS, POINTERS = f"{FORWARD}.product_descriptors", f"{FORWARD}.product_pointers"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # with --full 100 s on two processors that are free


@pytest.fixture(scope="module")
def full(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--full")


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, full: bool) -> Report:
    """By default, each launch that asks little of a GPU for one target; with ``--full`` for all that have it."""
    folder = Path(compiling.__file__).parent
    key = sources_key(PACKAGE, *(folder / f"{name}.py" for name in ("launches", "compiling", "sass")))
    file = None
    with suppress(AttributeError, OSError):  # there may be no cache, or none that can be written
        file = request.config.cache.mkdir("compiled-kernels") / f"{'full' if full else 'default'}.json"
    return kept_report(file, key, lambda: report(full=full))


def failing(kernels: list[Kernel], fault: Callable[[Kernel], bool]) -> str:
    """The table of the kernels at fault; nothing where there are none."""
    assert kernels
    found = [kernel for kernel in kernels if fault(kernel)]
    return f"\n{table(found)}" if found else ""


def spills(kernel: Kernel) -> bool:
    return bool(kernel.spills or kernel.stack or kernel.local)


def test_table(compiled: Report) -> None:
    lines = table(compiled.kernels).splitlines()
    print(f"\n{compiled.versions}\n", *lines, sep="\n")
    assert len(lines) == 2 + len(compiled.kernels)
    for kernel, line in zip(compiled.kernels, lines[2:], strict=True):
        for shown in (kernel.name, f"sm_{kernel.capability}", kernel.launch, kernel.registers, kernel.shared):
            assert f"| {shown} |" in line


def test_every_kernel_is_compiled_for_every_architecture(compiled: Report) -> None:
    """A kernel without a launch in benchmarks/launches.py fails here."""
    names = kernel_names(PACKAGE, "videor1_kernels")
    assert {DESCRIPTORS, POINTERS} < set(names)
    missing = [
        f"{name} for sm_{capability}"
        for name in names
        for capability in sorted(ARCHITECTURES)
        if (name != DESCRIPTORS or TILES[capability].descriptors)
        and not any((k.name, k.capability) == (name, capability) for k in compiled.kernels)
    ]
    assert not missing, "nothing in benchmarks/launches.py launches: " + ", ".join(missing)


def test_every_shipped_tile_is_compiled(compiled: Report) -> None:
    blocks = ("BLOCK_N", "BLOCK_V", "BLOCK_H", "HAS_BIAS")
    products = [k for k in compiled.kernels if k.name in (DESCRIPTORS, POINTERS)]
    found = {(k.capability, k.name, *(k.flags[b] for b in blocks), k.num_warps, k.num_stages) for k in products}
    for capability, own in TILES.items():
        for tile in (own, TILES[80]) if own.descriptors else (own,):
            name, options = DESCRIPTORS if tile.descriptors else POINTERS, (tile.num_warps, tile.num_stages)
            for biased in (False, True):
                columns = tile.bias_block_v if biased and tile.bias_block_v else tile.block_v
                expected = (capability, name, tile.block_n, columns, tile.block_h, biased, *options)
                assert expected in found, expected


def test_every_shipped_block_is_compiled(compiled: Report) -> None:
    """At head dims 128 and 256; decoding also at the 7B model's and other numbers of queries a key."""
    kernels = [k for k in compiled.kernels if "REPEAT" in k.flags]
    for size, attention, decoding in (
        (128, BLOCKS, triton_decode.BLOCKS),
        (256, WIDE_BLOCKS, triton_decode.WIDE_BLOCKS),
    ):
        found = {
            (k.capability, k.name.rpartition("_")[2], k.flags["BLOCK_M"], k.flags["BLOCK_N"], k.num_warps, k.num_stages)
            for k in kernels
            if k.flags.get("D") == size
        }
        for capability, blocks in attention.items():
            shipped = {"forward": blocks.forward, "gradient": blocks.query_gradient, "gradients": blocks.key_gradients}
            for name, block in (shipped | {"decode": decoding[capability]}).items():
                assert (capability, name, *astuple(block)) in found, f"sm_{capability}, D {size}: {name}, {block}"
    decoded = {(k.flags["REPEAT"], k.flags["D"]) for k in kernels if k.name == DECODE}
    assert decoded >= {(7, 128), (2, 64), (16, 80), (1, 1), (4, 256), (1, 192)}


def test_decode_programs_share_a_multiprocessor(compiled: Report) -> None:
    """On Hopper, and on Blackwell at D = 128, there is room for as many programs as the splits count on."""
    sizes = {90: (128, 256), 100: (128,)}
    kernels = [k for k in compiled.kernels if k.name == DECODE and k.flags["D"] in sizes.get(k.capability, ())]
    for k in kernels:
        registers = -(-k.registers * 32 // 256) * 256 * k.num_warps
        room = min(65536 // registers, (228 << 10) // (k.shared + 1024))  # of which each program is taken 1 KiB
        assert room >= triton_decode.PROGRAMS, f"\n{table([k])}"
    assert {(k.capability, k.flags["D"]) for k in kernels} == {(90, 128), (90, 256), (100, 128)}


def test_counts_between_programs_stand_between_barriers(compiled: Report) -> None:
    """One in each program of a kernel whose last program to arrive does what is left."""
    counting = [k for k in compiled.kernels if k.name in (DECODE, f"{SPLIT}.list_kernel")]
    counting += [k for k in compiled.kernels if k.name == f"{SPLIT}.weigh_kernel" and not k.flags["TRUNCATED"]]
    assert len({k.name for k in counting}) == 3
    assert not (found := failing(counting, lambda k: k.counts != 1)), found
    assert not (found := failing(compiled.kernels, lambda k: not k.ordered)), found


@pytest.mark.parametrize(
    ("ptx", "expected"),
    [
        ("ld.global st.global bar.sync 0; atom.global.gpu.acq_rel.add bar.sync 0; ld.global.cg", (1, True)),
        ("bar.sync 0; st.global atom.global.gpu.acq_rel.add bar.sync 0; ld.global.cg", (1, False)),
        ("st.global bar.sync 0; atom.global.gpu.acq_rel.add ld.global.cg bar.sync 0;", (1, False)),
        ("st.global bar.sync 0; atom.global.gpu.relaxed.add ld.global.cg", (0, True)),
    ],
)
def test_a_count_outside_of_barriers_is_seen(ptx: str, expected: tuple[int, bool]) -> None:
    assert release_order(ptx) == expected


def targets_together(full: bool) -> list[set[int]]:
    """The targets of which one must have what is asked for: by default of all of them, with ``--full`` of each."""
    return [{capability} for capability in sorted(ARCHITECTURES)] if full else [ARCHITECTURES]


def test_every_flag_is_compiled_on_and_off(compiled: Report, full: bool) -> None:
    """But for the tile's and the blocks': those are what the target's tile and blocks say."""
    for name in {kernel.name for kernel in compiled.kernels}:
        for targets in targets_together(full):
            flags = [k.flags for k in compiled.kernels if k.name == name and k.capability in targets]
            for flag in set().union(*flags) - {"FLATTEN", "EARLY", "OF_KEYS", "OF_VALUES"}:
                values = {constants[flag] for constants in flags if isinstance(constants[flag], bool)}
                assert values in (set(), {False, True}), f"{name} for {targets}: {flag} is never {not values.pop()}"


def test_sizes_are_compiled_as_1_as_multiples_of_16_and_as_others(compiled: Report, full: bool) -> None:
    """Triton makes different kernels of them."""
    for targets in targets_together(full):
        kinds = {k.integers["N"] for k in compiled.kernels if k.name == POINTERS and k.capability in targets}
        assert kinds == {"1", "multiple of 16", "any"}


def test_no_kernel_spills(compiled: Report) -> None:
    assert not (found := failing(compiled.kernels, spills)), found


def test_registers(compiled: Report) -> None:
    assert not (found := failing(compiled.kernels, lambda k: not 0 < k.registers <= 255)), found
    # A block's threads share 65536 registers, given out to a warp in steps of 256.
    taken = {id(k): -(-k.registers * 32 // 256) * 256 * k.num_warps for k in compiled.kernels}
    assert not (found := failing(compiled.kernels, lambda k: taken[id(k)] > 65536)), found


def test_shared_memory(compiled: Report) -> None:
    assert not (found := failing(compiled.kernels, lambda k: k.shared > SHARED_MEMORY[k.capability])), found


def test_tensor_memory(compiled: Report) -> None:
    """A launch that asks for more columns than a Blackwell has is an error there."""
    assert not (found := failing(compiled.kernels, lambda k: k.tensor_memory > 512)), found
    assert {k.capability for k in compiled.kernels if k.tensor_memory} == {100}


def test_products_are_on_the_tensor_cores(compiled: Report) -> None:
    """On sm_90 as wgmma, with descriptors and with the pointers that operands TMA cannot address take."""
    products = [kernel for kernel in compiled.kernels if kernel.matrix]
    assert not (found := failing(products, lambda k: not k.instructions[TENSOR_CORES[k.capability]])), found
    others = ("mma", "wgmma", "tcgen05")
    mixed = [k for k in products if any(k.instructions[o] for o in others if o != TENSOR_CORES[k.capability])]
    assert not mixed, table(mixed)
    for capability, tile in TILES.items():
        names = {kernel.name for kernel in products if kernel.capability == capability}
        assert {POINTERS} | ({DESCRIPTORS} if tile.descriptors else set()) <= names


def test_descriptors_are_read_by_tma(compiled: Report) -> None:
    described = [kernel for kernel in compiled.kernels if kernel.name == DESCRIPTORS]
    assert {kernel.capability for kernel in described} == {90, 100}
    assert not (found := failing(described, lambda k: not k.instructions["TMA"])), found
    pointers = [kernel for kernel in compiled.kernels if kernel.name == POINTERS]
    assert not (found := failing(pointers, lambda k: bool(k.instructions["TMA"]))), found


def test_matrix_instructions_of_the_head_overlap(compiled: Report) -> None:
    """On Hopper one is under way while the next is issued; the loop over tiles, flattened, waits behind each."""
    head = [k for k in compiled.kernels if k.loops and k.name in (DESCRIPTORS, POINTERS)]
    (fault,) = (k for k in compiled.faults if k.launch == launches.FLATTENED and k.name == DESCRIPTORS)
    assert len(head) == 2
    for kernel, drained in [*((k, False) for k in head), (fault, True)]:
        assert kernel.loops is not None
        loop = kernel.loops.own[kernel.loops.main]
        assert loop.matrix == 4
        assert (loop.drains > 0) == drained, f"\n{table([kernel])}"


def test_main_loops_are_no_worse_than_recorded(compiled: Report) -> None:
    assert not static.worse(static.measured(compiled.kernels), static.recorded())


def test_what_is_worse_is_told_with_both_numbers(compiled: Report) -> None:
    kernels = static.measured(compiled.kernels)
    name, kernel = next(iter(kernels.items()))
    now = static.recorded_values(name, kernel)
    assert not static.worse({name: kernel}, {name: {**now, "registers": now["registers"] - 1}})
    for what, before, sentence in (
        ("instructions", now["instructions"] - 1, f"instructions in the main loop: {now['instructions'] - 1} before"),
        ("programs", now["programs"] + 1, f"{now['programs'] + 1} before, {now['programs']} now"),
    ):
        (told,) = static.worse({name: kernel}, {name: {**now, what: before}})
        assert sentence in told
        assert str(now[what]) in told
    # A loop unrolled twice has twice the instructions for twice the products: no worse.
    twice = {what: 2 * now[what] for what in ("instructions", "matrix instructions", "slow instructions")}
    assert not static.worse({name: kernel}, {name: now | twice})
    assert "not recorded" in static.worse({name: kernel}, {})[0]


def test_predictions_keep_to_their_floors(compiled: Report) -> None:
    kernels, card = static.measured(compiled.kernels), static.Card()
    for name, kernel in kernels.items():
        work = static.work_of(name, kernel)
        found = static.predict(kernel, work, card)
        assert found.total >= max(work.flops / (card.tflops * 1e12), work.bytes / (card.bandwidth * 1e12)) > 0
    text = static.table(kernels, card)
    assert "Predictions, not measurements" in text
    assert len(text.splitlines()) == 4 + len(static.WORK)
    # Every kernel stands in one of the two tables.
    shown = text + static.small(compiled.kernels)
    assert not [name for name in kernel_names(PACKAGE, "") if f"`{name.rpartition('.')[2]}`" not in shown]
    with pytest.raises(ValueError, match="expected a kernel with a loop for each"):
        static.measured([])


@pytest.mark.parametrize("capability", sorted(ARCHITECTURES))
def test_a_spill_is_seen(compiled: Report, capability: int) -> None:
    (kernel,) = (k for k in compiled.faults if k.name.endswith(".spilling_kernel") and k.capability == capability)
    assert kernel.spills > 0
    assert kernel.stack + kernel.local >= 4 * 64  # 128 values and 64 registers
    assert 32 < kernel.registers <= 64
    assert f"| {kernel.spills}, {kernel.stack + kernel.local} bytes |" in table([kernel])


@pytest.mark.parametrize("capability", sorted(ARCHITECTURES))
def test_a_product_without_tensor_cores_is_seen(compiled: Report, capability: int) -> None:
    (kernel,) = (k for k in compiled.faults if k.name.endswith(".scalar_product_kernel") and k.capability == capability)
    assert kernel.matrix
    assert not any(kernel.instructions.values())


def test_kernels_are_found_in_sources(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "__init__.py").write_text(
        textwrap.dedent("""
        @triton.autotune([], key=[])
        @triton.jit
        def tuned(x, later):
            later = helper(x)

        @jit(do_not_specialize=["x"])
        def both(x):
            pass

        def launch(grid):
            both[grid](1)
    """)
    )
    (tmp_path / "rest.py").write_text(
        textwrap.dedent("""
        @triton.jit
        def helper(x):
            return combine(x, part.both)

        @triton.jit
        def combine(x, y):
            return x

        @triton.jit
        def later(x):
            pass

        def plain(x):
            pass
    """)
    )
    assert kernel_names(tmp_path, "package") == ["package.part.both", "package.part.tuned", "package.rest.later"]


def test_a_crash_shows_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "compiling.py").write_text("raise SystemExit('no such compiler')")
    monkeypatch.setattr(compiling, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match=r"benchmarks\.compiling --json 90 ended with status 1:\nno such compiler"):
        report(90)


def test_a_kept_report_is_neither_stale_nor_damaged(tmp_path: Path) -> None:
    file, made = tmp_path / "kept.json", []
    kernel = Kernel("name", 90, "launch", {"B": 16}, {"N": "1"}, 4, 2, 32, 0, 0, 0, 0, False, {"mma": 1}, 0, True)

    def make() -> Report:
        made.append(Report(f"version {len(made)}", [kernel], []))
        return made[-1]

    assert kept_report(None, "key", make) == made[0]
    assert kept_report(file, "key", make) == kept_report(file, "key", make) == made[1]
    whole = file.read_bytes()
    for damage in (b"", whole[:-40], whole[:70], whole.replace(b"32", b"33"), b"\xff" + whole, b"{}", whole * 2):
        file.write_bytes(damage)
        count = len(made)
        assert kept_report(file, "key", make) == made[count]
        assert kept_report(file, "key", make) == made[count]
    assert kept_report(file, "other key", make) == made[-1]
    assert len(made) == count + 2
    assert os.listdir(tmp_path) == ["kept.json"]
    nowhere = tmp_path / "kept.json" / "below a file"
    assert kept_report(nowhere, "key", make) == made[-1] != kept_report(nowhere, "key", make)


def test_a_changed_source_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part").mkdir()
    kernel, launches = tmp_path / "part" / "kernel.py", tmp_path / "launches.py"
    kernel.write_text("1")
    launches.write_text("2")
    keys = [sources_key(tmp_path / "part", launches)]
    kernel.write_text("1 ")
    keys.append(sources_key(tmp_path / "part", launches))
    launches.write_text("3")
    keys.append(sources_key(tmp_path / "part", launches))
    kernel.with_name("new.py").touch()
    keys.append(sources_key(tmp_path / "part", launches))
    assert keys[-1] == sources_key(tmp_path / "part", launches)
    monkeypatch.setattr(compiling, "version", lambda package: f"another {package}")
    keys.append(sources_key(tmp_path / "part", launches))
    assert len(set(keys)) == 5
