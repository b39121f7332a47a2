"""Triton kernels. Each has a reference in plain torch, which it must equal."""
