"""Parts of the pictures that are drawn as SVG: text, bars, lines, and the document around them."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape


def text(x: float, y: float, said: str, font: str, anchor: str = "start") -> str:
    """A line of text. `font` is CSS without the family; `anchor` is start, middle or end."""
    style = f"font: {font} sans-serif; fill: #222"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{escape(said)}</text>'


def bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    """A filled rectangle."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    """A straight line."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width:g}"/>'


def document(parts: Iterable[str], width: float, height: float) -> str:
    """The whole picture, on white."""
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', ground, *parts, "</svg>", ""])
