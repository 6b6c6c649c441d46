"""Kernels for reinforcement learning on video language models, each with a reference in plain torch.

Every function takes ``backend="auto"``, which picks the fastest implementation that can run on the inputs' device. A
backend that is named is the one that runs, or the call is an error. :func:`backends` lists the backends of a function,
:func:`chosen_backend` says which one a call would take, and :func:`last_backend` which one the last call took.
"""

from videor1_kernels.add_rms_norm import add_rms_norm
from videor1_kernels.dispatch import backends, chosen_backend, last_backend
from videor1_kernels.frames_to_patches import YuvFrames, frames_to_patches
from videor1_kernels.group_advantage import Advantages, tgrpo_advantages
from videor1_kernels.grpo_loss import GrpoLoss, grpo_loss, linear_grpo_loss
from videor1_kernels.linear_logprob import linear_logprob, selective_log_softmax
from videor1_kernels.output_gates import gated_rms_norm, sigmoid_mul
from videor1_kernels.prefix_attention import (
    DecodeLayout,
    PrefixLayout,
    RowPart,
    plan_rows,
    prefix_attention,
    prefix_decode_attention,
)
from videor1_kernels.prefix_gated_delta import (
    PrefixStates,
    causal_conv_step,
    gated_delta_step,
    prefix_causal_conv,
    prefix_gated_delta,
)
from videor1_kernels.rotary_append import rotary_append
from videor1_kernels.sampling import sample_tokens
from videor1_kernels.silu_mul import silu_mul

__all__ = [
    "Advantages",
    "DecodeLayout",
    "GrpoLoss",
    "PrefixLayout",
    "PrefixStates",
    "RowPart",
    "YuvFrames",
    "add_rms_norm",
    "backends",
    "causal_conv_step",
    "chosen_backend",
    "frames_to_patches",
    "gated_delta_step",
    "gated_rms_norm",
    "grpo_loss",
    "last_backend",
    "linear_grpo_loss",
    "linear_logprob",
    "plan_rows",
    "prefix_attention",
    "prefix_causal_conv",
    "prefix_decode_attention",
    "prefix_gated_delta",
    "rotary_append",
    "sample_tokens",
    "selective_log_softmax",
    "sigmoid_mul",
    "silu_mul",
    "tgrpo_advantages",
]
