"""Matplotlib to SVG inside a page: the page's colours, light or dark, a text alternative, and the same bytes each time.

Figures are drawn in colours of no meaning, which are then replaced by the page's CSS variables, so that one picture
serves both themes. Text stays text, in the page's font.
"""

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

INK, MUTED, LINE, CARD, BAD = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
SERIES = ("#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14", "#0a0b15", "#0a0b16")
"""Colours of lines that are compared; the first is that of the page."""
HEAT_RGB = (63, 127, 191)
"""Of pictures made of cells: what stands out before white and before a dark page alike."""

_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", CARD: "card", BAD: "bad"} | {
    colour: f"series-{number}" for number, colour in enumerate(SERIES, 1)
}
_SETTINGS = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    # No mathematical markup in labels: they are read aloud as they stand.
    "axes.formatter.use_mathtext": False,
}
_GROUP_NAME = re.compile(r'<g id="[^"]*"')
_NAME = re.compile(r'(?<= id=")[^"]+')
_MENTION = re.compile(r'(?<=[#"])(?:[a-z]+)(?:[0-9a-f]{10,})(?=[")])')
_STYLE = re.compile(r"<style.*?</style>", re.DOTALL)
_GAP = re.compile(r">\s+<")
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")


def draw(name: str, *, label: str, size: tuple[float, float], paint: Callable[[Any], None]) -> str:
    """An SVG element.

    Args:
        name: of the picture, unique on its page.
        label: what a reader who cannot see it needs to know.
        size: width and height in inches; the page scales it.
        paint: draws on a matplotlib figure.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    nameless = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        figure.savefig(buffer, format="svg", metadata=nameless)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Names of groups repeat from picture to picture, and its style would hold for the whole page.
    text = _renamed(_GROUP_NAME.sub("<g", _STYLE.sub("", text)), name)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return _GAP.sub("><", text).replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _renamed(text: str, name: str) -> str:
    """With names that are unique on the page and the same each time: those of clip paths come from memory addresses."""
    prefix = _NOT_IN_NAMES.sub("-", name.lower())
    found = dict.fromkeys(_NAME.findall(text))
    names = {old: f"{prefix}-{number}" for number, old in enumerate(found)}
    return _MENTION.sub(lambda match: names.get(match[0], match[0]), text)
