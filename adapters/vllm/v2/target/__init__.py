"""Runs at capture and at every replay of the target: the tokens that Model Runner V2 verifies, in the target's graph."""
