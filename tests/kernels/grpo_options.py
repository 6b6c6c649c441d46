"""Loss types and clips that the tests of the GRPO losses go through, on the references and on Triton."""

LOSSES = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo", "max_completion_length": 9},
    {"loss_type": "dapo", "num_tokens": 41},
]
CLIPS = [(None, None), (0.2, None), (None, 0.28), (0.2, 0.28)]
