"""Real engine parts without an engine: for tests, demo and benchmarks. One package per engine."""
