"""sglang's real DSA backends without a model runner.

`backends` makes, captures and replays them, `engine` is what the conformance kit sees of them. `original_loop` is older
than both: the release whose code this package starts from, loaded from its wheel.
"""
