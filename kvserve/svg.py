"""The few shapes that plots are made of, as SVG. Pure."""

from collections.abc import Sequence
from html import escape


def document(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """A picture of these parts; `title` is for who cannot see it."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="12" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def text(x: float, y: float, text: str, anchor: str = "start", *, bold: bool = False) -> str:
    """Words that begin, have their middle or end at `x`."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight} fill="#1c2733">'
        f"{escape(text)}</text>"
    )


def rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    """A filled rectangle."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str = "#dfe4ea") -> str:
    """A thin line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
