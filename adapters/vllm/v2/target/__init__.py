"""Runs at capture and at every batch: Model Runner V2's verified tokens, whose metadata the target's CUDA graph refreshes."""
