"""Formats numbers, intervals, sizes and durations."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fedsgcg.server.report.intervals import Interval

Summary = Mapping[str, Any]
DASH = "–"
DECIMALS = {"dice": 3, "asd": 2, "assd": 2, "hd95": 2, "hd95_max": 2}
TITLES = {
    "dice": "Dice",
    "asd": "ASD",
    "assd": "ASSD",
    "hd95": "HD95",
    "hd95_max": "HD95, larger side",
}


def show(value: float, decimals: int, *, sign: bool = False) -> str:
    """Format a number with a typographic minus sign; unknown numbers become a dash."""
    if not math.isfinite(value):
        return DASH
    rounded = round(value, decimals) + 0.0  # turns -0.0 into 0.0
    return f"{rounded:{'+' if sign else ''}.{decimals}f}".replace("-", "−")


def show_interval(interval: Interval, decimals: int, *, sign: bool = False) -> str:
    """Format an interval as "low to high", or a dash if it is unknown."""
    if not math.isfinite(interval.low):
        return DASH
    return (
        f"{show(interval.low, decimals, sign=sign)} to {show(interval.high, decimals, sign=sign)}"
    )


def show_p(p: float) -> str:
    """Format a p value with two digits, "< 0.001" for smaller ones, or a dash if it is unknown."""
    if not math.isfinite(p):
        return DASH
    if p < 0.001:
        return "<\u00a00.001"
    return f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def show_ends(interval: Interval, decimals: int) -> str:
    """Format an interval with signs, and one more digit if a nonzero end would look like zero."""
    ends = [interval.low, interval.high]
    hidden = [end for end in ends if end != 0 and abs(end) < 0.5 * 10**-decimals]
    return show_interval(interval, decimals + 1 if hidden else decimals, sign=True)


def show_bytes(size: float) -> str:
    """Format a number of bytes in a suitable unit (1 kB = 1000 B)."""
    if not math.isfinite(size):
        return DASH
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB" if size < 1000 else f"{size:,.0f} GB"


def show_seconds(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def slug(text: str) -> str:
    """Return a text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "table"
