"""Draws one round of drafting, verifying and extending, as shipped and with the plugin, from end-to-end results.

    python -m benchmarks.timeline SMALL.json LARGE.json OUT.svg

`SMALL.json` is of a model for which the host is the longer lane, `LARGE.json` of one for which the GPU is. Every length
is a median of those files. The order within a lane is sglang's; where the GPU's work lies in it was not measured, so it
is one bar.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import svg

STEPS, PROMPT, BATCH = 4, 1024, 1
"""The cell that is drawn: the one whose GPU time was profiled."""
VARIANTS = {"no plugin": "sglang as shipped", "auto": "with the plugin"}
PHASES = {
    "draft": "draft metadata us",
    "verify": "verify and extend metadata us",
    "extend": "verify and extend metadata us",
}
"""Phase of a round to the time of its metadata."""
COLOURS = {"metadata": "#d95f02", "host": "#9ecae1", "other": "#d9d9d9", "GPU": "#74c476"}
LEFT, WIDTH, BAR, TOP = 215, 700, 22, 62


@dataclass(frozen=True)
class Round:
    """One round, in milliseconds: the host's work in order, by colour and label; the GPU's; from round to round."""

    host: list[tuple[str, str, float]]
    gpu: float
    total: float

    @property
    def metadata(self) -> float:
        """Of the host's work, what goes into metadata."""
        return sum(length for colour, _, length in self.host if colour == "metadata")

    @property
    def busy(self) -> float:
        """The host's work."""
        return sum(length for _, _, length in self.host)


def read(results: dict[str, Any], variant: str) -> Round:
    """The round of a variant. Raises LookupError if the results lack the cell or its profile."""
    key = {"steps": STEPS, "prompt": PROMPT, "batch": BATCH}
    cells = [cell for cell in results["cells"] if key.items() <= cell.items()]
    if not cells:
        raise LookupError(f"expected a cell of {key} among the results, found none")
    seen = cells[0]["variants"][variant]
    took = {name: figures["median"] / 1000 for name, figures in seen.items() if name.endswith(" us")}
    host = []
    for phase, metadata in PHASES.items():
        host += [("metadata", "", took[metadata]), ("host", phase, took[f"{phase} us"] - took[metadata])]
    host.append(("other", "scheduling", took["round us"] - sum(length for _, _, length in host)))
    profile = results["profiles"][f"{STEPS} {variant}"]
    total = seen["round_us_median"] / 1000
    return Round(host, min(profile["gpu_busy_us"] / profile["rounds"] / 1000, total), total)


def changes(results: dict[str, Any]) -> str:
    """The range of the round's change with the plugin over all cells."""
    cells = [cell["variants"] for cell in results["cells"]]
    ratios = [seen["auto"]["round_us_median"] / seen["no plugin"]["round_us_median"] - 1 for seen in cells]
    return f"{min(ratios):+.1%} to {max(ratios):+.1%}"


def panel(rounds: dict[str, Round], title: str, top: float) -> tuple[list[str], float]:
    """The lanes of one model below `top`; returns also where they end."""
    longest = max(one.total for one in rounds.values())
    scale = WIDTH / longest
    lines = [svg.text(20, top, title, "bold 15px")]
    y = top + 14.0
    for variant, one in rounds.items():
        lines.append(svg.text(20, y + BAR, VARIANTS[variant], "13px"))
        for lane, bars in (("host", one.host), ("GPU", [("GPU", f"kernels: at most {one.gpu:.1f} ms", one.gpu)])):
            lines.append(svg.text(LEFT - 8, y + 15, lane, "13px", "end"))
            x = float(LEFT)
            for colour, label, length in bars:
                width = length * scale
                lines.append(svg.bar(x, y, width, BAR, COLOURS[colour]))
                if label and width > 7 * len(label):
                    lines.append(svg.text(x + width / 2, y + 15, label, "11px", "middle"))
                x += width
            if lane == "host":
                said = f"{one.busy:.1f} ms of work, {one.metadata:.2f} of it metadata"
                lines.append(svg.text(LEFT + WIDTH + 12, y + 15, said, "12px"))
            y += BAR + 3
        end = LEFT + one.total * scale
        lines.append(svg.bar(end - 1, y - 2 * BAR - 8, 2, 2 * BAR + 9, "#333333"))
        lines.append(svg.text(LEFT + WIDTH + 12, y - 9, f"{one.total:.1f} ms from round to round", "bold 12px"))
        y += 10
    return lines, y


def draw(small: dict[str, Any], large: dict[str, Any]) -> str:
    """The picture, as SVG."""
    heads = {
        "A small model: the host is the longer lane, and the round gets shorter": small,
        "61 layers: the GPU is the longer lane; only host time is saved, and the round stays as long": large,
    }
    lines, y = [], float(TOP + 30)
    for title, results in heads.items():
        more, y = panel({variant: read(results, variant) for variant in VARIANTS}, title, y)
        lines += more
        y += 26
    where = small["machine"]
    notes = [
        f"{where['machine']}, sglang {where['versions']['sglang']}, {STEPS} draft steps, batch {BATCH}, prompt {PROMPT}. "
        "Medians; each model has its own time scale. White: waiting.",
        "GPU: all kernels of 15 profiled rounds and one prompt, divided by 15, at most the round; drawn in one piece. "
        "The host's other work is the same code in both: it differs by the speed of the host.",
        f"How much longer the round is with the plugin, over all cells: small model {changes(small)}, "
        f"61 layers {changes(large)}. The host's speed changes between runs.",
    ]
    for note in notes:
        lines.append(svg.text(20, y, note, "11px"))
        y += 16
    legend = {"metadata": "attention metadata", "host": "other work of the phase", "other": "scheduling", "GPU": "GPU"}
    x = 20.0
    for colour, label in legend.items():
        lines += [svg.bar(x, 42, 14, 14, COLOURS[colour]), svg.text(x + 20, 54, label, "12px")]
        x += 50 + 7 * len(label)
    head = svg.text(20, 26, "One round of speculative decoding: draft, verify, extend", "bold 17px")
    return svg.document([head, *lines], 1200, y)


def main() -> None:
    """Read two files of results, write the picture."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    small, large = (json.loads(Path(name).read_text()) for name in sys.argv[1:3])
    Path(sys.argv[3]).write_text(draw(small, large))


if __name__ == "__main__":
    main()
