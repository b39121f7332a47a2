"""An estimate in words."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from nsa_plugin.estimate.acceptance import with_exact_lengths
from nsa_plugin.estimate.model import Estimate, Measured, Range, Round


def show(measured: Measured, of: Round, found: Estimate, console: Console) -> None:
    """Print what to expect, and why."""
    host = "unknown" if of.host_ms is None else f"{of.host_ms:g} ms"
    table = Table(
        title=f"{of.engine}, rounds of {of.round_ms:.4g} ms, host busy in it: {host}; {of.steps} steps, "
        f"{of.context:,} tokens of context, batch {of.batch}, page tables of {of.width:,} columns",
        title_justify="left",
    )
    for column in ("part", "ms saved", "gain", "why"):
        table.add_column(column, overflow="fold")
    gpu = Range(*(1 - weight for weight in reversed(found.bound)))
    table.add_row("host", f"{found.host.mid:.2f}", _gain(found.host, found.bound, of), _why_host(measured, of, found))
    if of.engine == "sglang":
        table.add_row("schedule", _ms(found.schedule), _gain(found.schedule, gpu, of), "stale schedules, from times of kernels"
                      if of.steps > 3 else "no schedule is stale up to 3 steps")  # fmt: skip
        table.add_row(
            "page tables",
            _ms(found.tables),
            _gain(found.tables, gpu, of),
            "GPU time of metadata, from times of kernels; of wider tables from times of rounds, without pooled index keys",
        )
    console.print(table)
    low, mid, high = (None if value is None else f"{100 * value:+.1f} %" for value in found.gain)
    if found.nothing:
        said = f"Nothing to gain: {mid} tokens/s expected, {low} to {high}, which is no difference from none."
    elif mid is None:
        said = f"Between {low} and {high} tokens/s. Give --host-ms for an expected value."
    else:
        kind = "95 % interval" if found.bound.low == found.bound.high else "intervals of both cases"
        said = f"Expect {mid} tokens/s, {low} to {high} ({kind})."
    console.print(said, markup=False)
    if of.engine == "sglang":
        said = with_exact_lengths(measured, of.steps)
        console.print(f"Not in it: NSA_PLUGIN_STEP_LENGTHS=exact, {said}.", markup=False)


def _why_host(measured: Measured, of: Round, found: Estimate) -> str:
    most, least = measured.limits
    if of.host_ms is None:
        return "counts only if the host bounds the round; its time is not known"
    ratio = f"the round lasts {of.round_ms / of.host_ms:.1f} times as long as the host is busy"
    if found.bound.low == 1:
        return f"{ratio}: the host bounds it (measured up to {most:.1f})"
    if found.bound.high == 0:
        return f"{ratio}: nothing to gain from host time, the GPU hides it (measured from {least:.1f} on)"
    return f"{ratio}: not known whether the host bounds it (it does up to {most:.1f}, not from {least:.1f} on)"


def _ms(saved: Range) -> str:
    low, mid, high = (f"{round(value, 2) + 0.0:.2f}" for value in saved)  # no -0.00
    return mid if low == high else f"{mid} ({low} to {high})"


def _gain(saved: Range, weight: Range, of: Round) -> str:
    """Gain of one part alone, and its range."""
    gains = (100 * part * ms / (of.round_ms - part * ms) for part, ms in zip(weight, saved, strict=True))
    low, mid, high = (f"{round(value, 1) + 0.0:+.1f}" for value in gains)
    if low == high:
        return "nothing" if mid == "+0.0" else f"{mid} %"
    return f"{low} to {high} %" if of.host_ms is None else f"{mid} % ({low} to {high})"
