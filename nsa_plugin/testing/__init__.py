"""What tests, the demo and benchmarks share: the real engines' backends without a model or a server."""
