"""Real engine parts without an engine: for tests, demo and benchmarks. One package per engine.

`<engine>/…engine.py` is the engine as the conformance kit sees it: sglang, vLLM's Model Runner V2 and Model Runner V1.
"""
