"""The conformance kit for adapters, and what tests, demo and benchmarks share: real backends without a model or a server.

`engine` says what a test of an adapter must provide, `conformance` runs the kit, `pytest_conformance` is the kit as pytest
tests; `examples/custom_adapter` walks through it. `sglang_engine` is sglang as the kit sees it.
"""
