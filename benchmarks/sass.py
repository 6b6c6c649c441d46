"""Loops in the machine code of a compiled kernel, as ``cuobjdump -sass`` prints it: how many instructions of which kind
one passage takes.

    /*1b80*/   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24 ;
    /*1e80*/  @!P3 BRA 0x19b0 ;

A loop is what textbooks call a natural one: a branch back to a block through which every way to the branch leads.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import astuple, dataclass
from typing import NamedTuple

MATRIX = ("HGMMA", "HMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "IMMA")
# These run on a unit that takes a warp's instruction in 8 cycles of a scheduler, where fp32 takes 1: 16 lanes against
# 128 of a multiprocessor (CUDA C++ Programming Guide, throughput of native arithmetic instructions, 9.0).
SLOW = ("MUFU", "I2F", "F2I", "F2F", "POPC", "FLO")
SLOW_CYCLES = 8

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


class Instruction(NamedTuple):
    at: int  # its address
    conditional: bool
    name: str  # without modifiers
    text: str

    @property
    def target(self) -> int | None:
        """Where a branch leads."""
        found = re.search(r"\b0x([0-9a-f]+)\s*$", self.text) if self.name == "BRA" else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Count:
    """One passage through some instructions, for one warp."""

    instructions: int
    matrix: int  # on the tensor cores
    slow: int  # at an eighth of the rate of fp32
    drains: int  # waits for all matrix instructions that are under way, which puts them one after the other

    def __add__(self, other: Count) -> Count:
        return Count(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def cycles(self, warps: int, schedulers: int = 4) -> float:
        """Cycles in which a multiprocessor can issue it, for a program of so many warps."""
        return max(self.instructions, self.slow * SLOW_CYCLES) * warps / schedulers


def count(code: list[Instruction]) -> Count:
    names = [x.name for x in code]
    drains = sum(bool(re.search(r"WARPGROUP\.DEPBAR.*gsb0, 0x0\s*$", x.text)) for x in code)
    return Count(len(code), sum(n in MATRIX for n in names), sum(n in SLOW for n in names), drains)


def instructions(sass: str) -> list[Instruction]:
    found = (
        Instruction(int(at, 16), bool(predicate), name.split(".")[0], f"{name}{rest}")
        for at, predicate, name, rest in _LINE.findall(sass)
    )
    return [x for x in found if x.name != "NOP"]


@dataclass(frozen=True)
class Loops:
    """What the loops of a kernel are made of."""

    own: tuple[Count, ...]  # of each, without those inside it, in the order of their addresses
    main: int  # which of these is the main one
    around: Count  # the rest of the loop that holds the main one, or of the kernel


def count_loops(sass: str) -> Loops | None:
    """The loops of a kernel; the main one has the most matrix instructions, or without any the most of all.

    Blocks behind a loop's last branch back are left out: that is where a wait is tried again. None: there is no loop.
    """
    code = instructions(sass)
    known = loops(code)
    if not known:
        return None
    own, counts = {}, {}
    for header, body in known.items():
        inner: set[int] = set().union(*(known[other] for other in known if known[other] < body))
        last = max((x.at for x in code if x.at in body and x.target == header), default=max(body))
        own[header] = [x for x in code if x.at in body and x.at <= last and x.at not in inner]
        counts[header] = count(own[header])
    most = max(x.matrix for x in counts.values())
    # Of two with as many, one has the masks that the other does without most of the time.
    header = max(
        (h for h in sorted(known) if counts[h].matrix == most),
        key=lambda h: -counts[h].instructions if most else counts[h].instructions,
    )
    wider = [body for body in known.values() if known[header] < body]
    around = min(wider, key=len) if wider else {x.at for x in code}
    rest = count([x for x in code if x.at in around and x.at not in known[header]])
    return Loops(tuple(counts[h] for h in sorted(known)), sorted(known).index(header), rest)


def loops(code: list[Instruction]) -> dict[int, frozenset[int]]:
    """The addresses of the instructions of each loop, by that of the first instruction of its header."""
    blocks = _blocks(code)
    after = {first: _successors(code, blocks, first) for first in blocks}
    before: dict[int, list[int]] = {first: [] for first in blocks}
    for first, targets in after.items():
        for target in targets:
            before[target].append(first)
    dominators = _dominators(list(blocks), before)
    found: dict[int, set[int]] = {}
    for first, targets in after.items():
        for header in targets:
            if header not in dominators[first]:
                continue
            body, waiting = {header}, [first]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += before[block]
            found.setdefault(header, set()).update(body)
    return {header: frozenset(x.at for block in body for x in blocks[block]) for header, body in found.items()}


def _blocks(code: list[Instruction]) -> dict[int, list[Instruction]]:
    """Runs of instructions with one way in and one way out, by the address of the first."""
    starts = {code[0].at} | {x.target for x in code if x.target is not None}
    starts |= {y.at for x, y in itertools.pairwise(code) if x.name in ("BRA", "EXIT")}
    blocks: dict[int, list[Instruction]] = {}
    for x in code:
        if x.at in starts:
            current = blocks.setdefault(x.at, [])
        current.append(x)
    return blocks


def _successors(code: list[Instruction], blocks: dict[int, list[Instruction]], first: int) -> list[int]:
    last = blocks[first][-1]
    following = next((start for start in sorted(blocks) if start > last.at), None)
    targets = [last.target] if last.target in blocks else []
    if following is not None and (last.conditional or last.name not in ("BRA", "EXIT")):
        targets.append(following)
    return [x for x in targets if x is not None]


def _dominators(blocks: list[int], before: dict[int, list[int]]) -> dict[int, set[int]]:
    """The blocks through which every way to a block leads, itself among them."""
    entry = blocks[0]
    found = {block: {entry} if block == entry else set(blocks) for block in blocks}
    changed = True
    while changed:
        changed = False
        for block in blocks[1:]:
            ways = [found[x] for x in before[block]]
            new = {block} | (set.intersection(*ways) if ways else set())
            if new != found[block]:
                found[block], changed = new, True
    return found
