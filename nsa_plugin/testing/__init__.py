"""The conformance kit for adapters: nothing but this package is needed.

`engine` says what a test of an adapter must provide, `conformance` runs the kit, `pytest_conformance` is the kit as pytest
tests; `examples/custom_adapter` walks through it.
"""
