"""sglang's DeepSeek Sparse Attention backends (0.5.11 and later; its name for it was NSA before 0.5.13)."""
