"""Triton's interpreter, without what it computes and does not use."""

from __future__ import annotations

from dataclasses import replace


def spare_overflow_checks() -> None:
    """Leave out the sums in int64 that go with each sum in int32: the interpreter only looks at them in its debug mode.

    They are a quarter of the time of a small kernel. Needs TRITON_INTERPRET=1 in the environment before Triton is imported.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
