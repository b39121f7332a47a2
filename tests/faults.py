"""A plugin that fails on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nsa_plugin import BatchDescriptor, hookimpl
from nsa_plugin.core import api


class Planted(RuntimeError):
    """The error that is planted."""


class Faults:
    """Fails at the given calls of the precompute of every plan that is made while it is armed, half-way through.

    Attributes
    ----------
    failing : sequence of int
        Numbers of the calls that fail, of each plan for itself; a capture is call 0. Nothing is planted if empty.
    error : exception type
    """

    def __init__(self) -> None:
        self.failing: Sequence[int] = ()
        self.error: type[Exception] = Planted

    @hookimpl
    def nsa_plugin_bind_precompute(
        self, batch: Any, geometry: Any, out: Any, enabled: Any
    ) -> Callable[[BatchDescriptor], None] | None:
        """A precompute that may fail; None, for the built-in one, if nothing is planted."""
        if not self.failing:
            return None
        compute, failing, error = api.bind_precompute(batch, out, enabled=enabled), self.failing, self.error
        call = -1

        def precompute(live: BatchDescriptor) -> None:
            nonlocal call
            call += 1
            compute(live)
            if call in failing:
                out.steps[0].cache_seqlens.fill_(-5)
                raise error(f"planted at call {call}")

        return precompute
