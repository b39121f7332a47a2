"""sglang's real backends without a model runner.

`backends` makes, captures and replays those of DSA, `engine` is what the conformance kit sees of them. `dense` and
`flash_attention` make dense ones, for `dense_engine` and `recorded_engine`. `original_loop` is older than all: the release
whose code this package starts from, loaded from its wheel.
"""
