"""sglang's DeepSeek Sparse Attention backends (0.5.13 and later)."""
