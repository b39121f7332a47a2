"""What exact step lengths gave a trained model: accepted tokens, by number of steps."""

from __future__ import annotations

from nsa_plugin.estimate.model import Measured


def with_exact_lengths(measured: Measured, steps: int) -> str:
    """How many more tokens it accepted with the nearest measured number of steps, and the 95 % interval, in words."""
    nearest, ratio, low, high = min(measured.acceptance, key=lambda row: abs(row[0] - steps))
    change, least, most = (f"{100 * (value - 1):+.1f} %" for value in (ratio, low, high))
    said = "no difference seen" if low <= 1 <= high else f"{change}, {least} to {most}"
    return f"accepted tokens with {nearest} steps: {said} (one small trained model)"
