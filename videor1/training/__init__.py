"""The loop that SFT and T-GRPO share, their passes, checkpoints, and several processes."""
