"""What gain in tokens/s an operator should expect, from the committed measurements."""
