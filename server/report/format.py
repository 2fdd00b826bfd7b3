"""How the report writes numbers, intervals, sizes and times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from server.report.intervals import Interval

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
    """Write a number with a real minus sign; a dash for one that is not known."""
    if not math.isfinite(value):
        return DASH
    rounded = round(value, decimals) + 0.0  # no minus before a zero
    return f"{rounded:{'+' if sign else ''}.{decimals}f}".replace("-", "−")


def show_interval(interval: Interval, decimals: int, *, sign: bool = False) -> str:
    """Write "low to high", or a dash when it is not known."""
    if not math.isfinite(interval.low):
        return DASH
    return (
        f"{show(interval.low, decimals, sign=sign)} to {show(interval.high, decimals, sign=sign)}"
    )


def show_p(p: float) -> str:
    """Write a p value: two digits, "under 0.001" for the smallest, a dash for one that is not known."""
    if not math.isfinite(p):
        return DASH
    return "<\u00a00.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def show_ends(interval: Interval, decimals: int) -> str:
    """Write "low to high" with signs, and with more digits where an end would look like zero and is not."""
    ends = [interval.low, interval.high]
    hidden = [end for end in ends if end != 0 and abs(end) < 0.5 * 10**-decimals]
    return show_interval(interval, decimals + 1 if hidden else decimals, sign=True)


def show_bytes(size: float) -> str:
    """Write a number of bytes in the unit that suits it (1 kB = 1000 B)."""
    if not math.isfinite(size):
        return DASH
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB" if size < 1000 else f"{size:,.0f} GB"


def show_seconds(seconds: float) -> str:
    """Write a duration as a person would say it."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
