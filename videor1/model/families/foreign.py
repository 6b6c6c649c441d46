"""How a family tells another's tokenizer and chat template from its own."""

from __future__ import annotations

# The last tokens of Qwen3's tokenizers, in their order; Qwen2.5's end before them. Models that were trained on with
# tags of reasoning or of tools have some of them too, behind each other in orders of their own.
QWEN3_TOKENS = ("<tool_response>", "</tool_response>", "<think>", "</think>")

_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>"


def qwen2_template(user: str, tool: str) -> str | None:
    """Say why a chat template is that of Qwen2-VL or Qwen2.5-VL: it adds a system turn where none was given.

    Args:
        user: a user's turn and the beginning of an answer, as it renders them.
        tool: a conversation in which the tool of that name answers, as it renders it; "" where it cannot.

    Returns:
        The reason; None where it is none of theirs.
    """
    return f"Qwen2.5-VL: it adds {_SYSTEM!r}" if _SYSTEM in user else None


def qwen3_template(user: str, tool: str) -> str | None:
    """Say why a chat template is that of Qwen3-VL; arguments and result as above.

    Without a system turn alone it is not: models of Qwen2.5-VL's family are trained and published without one as well.
    Its own template has tools besides, which those of Qwen2.5-VL's family leave out.
    """
    if user.startswith("<|im_start|>user\n") and "<|im_start|>user\n<tool_response>\n" in tool:
        return (
            "Qwen3-VL: it adds no system turn, and puts what a tool answers between <tool_response> tags (a model that "
            "was trained with it is let through without its part for tools, which no prompt here has)"
        )
    return None
