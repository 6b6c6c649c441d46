"""Shared by the kernel tests."""

from collections.abc import Iterator

import pytest
import torch
from patience import THREADS
from triton_cases import CUDA, quicken_interpreter

if not CUDA:
    quicken_interpreter()


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    """These tensors are tiny: on a shared machine a second thread costs several times what it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)
