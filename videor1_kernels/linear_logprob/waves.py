"""How well the tiles of a matrix product fill a GPU, and into how many parts to cut its sum so that they fill it.

A product [rows, inner] x [inner, columns] is computed in tiles of its result, as many at a time as there are
multiprocessors: a wave. In a last wave that is not full the others stand idle. d_hidden has few tiles and by far the
longest sum, over the vocabulary. Cut into p parts of the vocabulary it has p times as many tiles, each p times as
short, so the last wave is shorter too; then the parts have to be added up.

This is arithmetic for tiles of 128 x 256 and one of them a multiprocessor, which cuBLAS takes for large 16-bit products
on Hopper; it has not been measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TILE = (128, 256)  # rows and columns
MOST_PARTS = 16
LEAST_INNER = 4096  # terms of a part: the start of a tile then takes little of its time
# Writing and reading an element of a part, 8 bytes, takes as long as so many terms of its sum: an H200 multiplies and
# adds 395e12 times a second, and copies 4.3e12 bytes.
TERMS_OF_A_PART = 735


@dataclass(frozen=True)
class Waves:
    """The tiles of a product in ``parts`` parts, and how many waves they are."""

    tiles: int
    waves: int
    utilisation: float  # of the multiprocessors' time, the share in which they compute elements that are asked for


def waves(rows: int, columns: int, parts: int, processors: int) -> Waves:
    """Those of a product of ``rows`` x ``columns`` elements, at least 1 of each."""
    tiles = parts * math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
    count = math.ceil(tiles / processors)
    return Waves(tiles, count, parts * rows * columns / (TILE[0] * TILE[1] * count * processors))


def inner_parts(rows: int, columns: int, inner: int, processors: int) -> int:
    """The number of parts of equal length that takes least time, with that of adding them up; 1: do not cut.

    Every part starts at a multiple of 8 elements, 16 bytes, as the tensor cores' loads want it.
    """
    if not rows or not columns:
        return 1

    def time(parts: int) -> float:  # in waves of the product that is not cut
        found = waves(rows, columns, parts, processors)
        added = found.tiles / processors * TERMS_OF_A_PART / inner if parts > 1 else 0.0
        return found.waves / parts + added

    most = min(MOST_PARTS, inner // LEAST_INNER)
    return min((parts for parts in range(1, most + 1) if inner % (8 * parts) == 0), key=time, default=1)
