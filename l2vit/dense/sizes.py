"""How large a picture becomes."""

from __future__ import annotations


def fitted_size(height: int, width: int, *, short: int, long: int) -> tuple[int, int]:
    """(height, width) of a picture enlarged or shrunk, its shape kept, to fit both limits.

    The longer side is at most ``long`` and the shorter at most ``short``; one of them is met.
    """
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
