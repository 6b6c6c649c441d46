"""The embedded default: made clips with questions about time order, a small tokenizer and a tiny Qwen2.5-VL."""
