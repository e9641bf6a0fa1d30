"""Small plots, drawn on the server as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from markupsafe import Markup

_STEP: Final = 10
_GAP: Final = 2
_LEAST: Final = 1.5
"""The height of a bar that is not zero."""


def bars(rates: Sequence[float], label: str, height: int = 28) -> Markup:
    """Draw numbers as bars, from the oldest to the newest, with a label for people who can't see them."""
    highest = max(rates, default=0.0)
    width = max(1, len(rates)) * _STEP
    drawn = []
    for index, rate in enumerate(rates):
        tall = max(_LEAST, rate / highest * (height - 2)) if highest > 0 and rate > 0 else 0.0
        drawn.append(
            f'<rect x="{index * _STEP}" y="{height - 1 - tall:.1f}" width="{_STEP - _GAP}" '
            f'height="{tall:.1f}"/>'
        )
    line = f'<path class="base" d="M0 {height - 0.5}H{width - _GAP}"/>'
    return Markup(
        '<svg class="plot" viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        'aria-label="{label}">{line}{bars}</svg>'
    ).format(width=width, height=height, label=label, line=Markup(line), bars=Markup("".join(drawn)))  # noqa: S704 - numbers only
