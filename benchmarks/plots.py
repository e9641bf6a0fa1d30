"""Draws bars for medians with their spread, and lines for changes over time, as plain SVG."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from html import escape
from pathlib import Path

from benchmarks.report import Results, number
from benchmarks.scenario import Scenario

COLOURS = {
    "apoq": "#2563eb",
    "floor": "#6b7280",
    "PgQueuer asyncpg": "#d97706",
    "PgQueuer psycopg": "#f59e0b",
    "Procrastinate": "#7c3aed",
    "Graphile Worker": "#059669",
}
OTHER = "#9ca3af"
LEFT, WIDTH, RIGHT, BAR, HEAD = 190, 420, 130, 24, 40


def draw(results: Results, scenarios: list[Scenario], folder: Path) -> None:
    """Write an SVG file for each scenario that has figures."""
    for scenario in scenarios:
        figures = results.figures.get(scenario.name, {})
        parts = [figure for figure in figures if " part " not in figure]
        if parts:
            picture = _bars(scenario, {figure: figures[figure] for figure in parts})
            (folder / f"{scenario.name}.svg").write_text(picture, encoding="utf-8")
        for share in ("p50", "p99"):
            lines = {
                figure: values for figure, values in figures.items() if figure.startswith(f"{share} part ")
            }
            if lines:
                picture = _lines(f"{scenario.name}, {share} by tenths of the time, {scenario.unit}", lines)
                (folder / f"{scenario.name}_{share}.svg").write_text(picture, encoding="utf-8")


def _bars(scenario: Scenario, figures: dict[str, dict[str, list[float]]]) -> str:
    parts, y = [], HEAD
    for figure, values in figures.items():
        unit = scenario.unit_of(figure)
        parts.append(_text(LEFT, y + 16, figure + (f", {unit}" if unit else ""), bold=True))
        y += BAR
        most = max((max(found) for found in values.values()), default=0) or 1
        for name, found in values.items():
            middle = statistics.median(found)
            low, high = (LEFT + max(0, value) / most * WIDTH for value in (min(found), max(found)))
            length = max(1, middle / most * WIDTH)
            centre = y + BAR / 2 - 2
            parts += [
                _text(LEFT - 8, y + 15, name, anchor="end"),
                _box(LEFT, y + 2, length, BAR - 8, name),
                f'<path d="M{low:.1f} {centre}H{high:.1f}" stroke="#111827" stroke-width="1.5"/>',
                _text(max(high, LEFT + length) + 8, y + 15, number(middle)),
            ]
            y += BAR
        y += 8
    return _svg(f"{scenario.name}: {scenario.title}", parts, y + 8)


def _lines(title: str, figures: dict[str, dict[str, list[float]]]) -> str:
    names = list(dict.fromkeys(name for values in figures.values() for name in values))
    rows = {
        name: [statistics.median(values[name]) for values in figures.values() if name in values]
        for name in names
    }
    height, most = 220, max(value for row in rows.values() for value in row) or 1
    bottom = HEAD + height
    parts = [f'<path d="M{LEFT} {HEAD}V{bottom}H{LEFT + WIDTH}" fill="none" stroke="#9ca3af"/>']
    parts += [
        _text(LEFT - 8, bottom - share * height + 4, number(share * most), anchor="end")
        for share in (0, 0.5, 1)
    ]
    for place, (name, row) in enumerate(rows.items()):
        step = WIDTH / max(1, len(row) - 1)
        points = " ".join(
            f"{LEFT + i * step:.1f},{bottom - value / most * height:.1f}" for i, value in enumerate(row)
        )
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{_colour(name)}" stroke-width="2"/>',
            _box(LEFT + WIDTH + 14, HEAD + place * 20, 10, 10, name),
            _text(LEFT + WIDTH + 30, HEAD + place * 20 + 10, name),
        ]
    return _svg(title, parts, bottom + 24)


def _colour(name: str) -> str:
    return COLOURS.get(name, OTHER)


def _box(x: float, y: float, width: float, height: float, name: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{height}" fill="{_colour(name)}"/>'


def _text(x: float, y: float, words: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'


def _svg(title: str, parts: Iterable[str], height: float) -> str:
    width = LEFT + WIDTH + RIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#111827">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{_text(16, 22, title, bold=True)}\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
