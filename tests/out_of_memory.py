"""``python -m videor1.train`` in which rank 1 runs out of memory at its second rollout."""

import os
import sys

import torch

from videor1 import train
from videor1.rollout import LocalEngine

calls = 0
generate = LocalEngine.generate


def failing(self, requests):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
    return generate(self, requests)


if __name__ == "__main__":
    LocalEngine.generate = failing
    sys.exit(train.main(sys.argv[1:]))
