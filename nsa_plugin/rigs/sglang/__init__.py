"""sglang's real DSA backends without a model runner, and sglang as the conformance kit sees it."""
