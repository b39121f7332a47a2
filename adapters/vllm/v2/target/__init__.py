"""The verified tokens of Model Runner V2: the target's metadata, refreshed inside its CUDA graph, and read by the draft's first pass."""
