"""What the tests of the GRPO losses go through, on the references and on Triton: loss types, clips, a correct call."""

import torch

LOSSES = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo", "max_completion_length": 9},
    {"loss_type": "dapo", "num_tokens": 41},
]
CLIPS = [(None, None), (0.2, None), (None, 0.28), (0.2, 0.28)]
GOOD = {  # for linear_grpo_loss
    "hidden": torch.zeros(3, 4),
    "weight": torch.zeros(5, 4),
    "labels": torch.zeros(3).long(),
    "advantages": torch.zeros(2),
    "cu_seqlens": torch.tensor([0, 2, 3]),
    "beta": 0,
}
