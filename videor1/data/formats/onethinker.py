"""OneThinker: EasyR1's fields, and in every row ``data_type``, ``problem_type``, ``options`` and ``data_source``.

So its published ``onethinker_rl_train.json`` has them (huggingface.co/datasets/OneThink/OneThinker-train-data); its
trainer reads them in EasyR1/verl/utils/dataset.py (tulerfeng/OneThinker), and adds options to a multiple choice as
here.
"""

from __future__ import annotations

from videor1.data.formats import easyr1
from videor1.data.formats.parts import Entry, Row, needed

FIELDS = easyr1.FIELDS


def read(row: Row, problem_type: str | None = None) -> Entry:
    """Return the entry of a row. Raises SampleError where it cannot be read."""
    for field in ("data_type", "problem_type"):
        needed(row, field)
    return easyr1.read(row, problem_type)
