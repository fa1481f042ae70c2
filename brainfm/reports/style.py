"""House style of pictures and charts: colours, sizes, and how a figure becomes a PNG."""

from __future__ import annotations

import io
from typing import Any

INK, SOFT, LINE = "#1c2430", "#667085", "#e4e7ec"
COLOURS = ("#0f766e", "#d9480f", "#4c51bf", "#b7791f", "#a6266e", "#2b6cb0", "#4d7c0f", "#57534e")
TEXT_POINTS = 10.5
WIDTH_INCH, DOTS_PER_INCH = 10.4, 160  # the text column of the page is as wide; the pictures stay sharp when enlarged


def plain(text: str) -> str:
    """Text that matplotlib shows as it stands: dollar signs in a name begin no formula."""
    return text.replace("$", r"\$")


def png(figure: Any) -> bytes:
    """The figure as a PNG on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    return buffer.getvalue()
