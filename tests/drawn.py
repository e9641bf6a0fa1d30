"""How many examples Hypothesis draws.

A few, and the same each time, unless `--hypothesis-profile thorough` asks for thousands of others.
"""

from __future__ import annotations

from typing import Any, Final

from hypothesis import HealthCheck, settings

THOROUGH: Final = "thorough"
MANY: Final = 5_000

settings.register_profile(THOROUGH, max_examples=MANY)


def is_thorough() -> bool:
    """Return whether the profile is the thorough one."""
    return settings().max_examples == MANY


def drawn(examples: int, **options: Any) -> settings:
    """Return the settings of a test that draws so many examples, or thousands."""
    options = {
        "max_examples": MANY if is_thorough() else examples,
        "derandomize": not is_thorough(),
        "database": None,
        "deadline": None,
        "suppress_health_check": list(HealthCheck),
    } | options
    return settings(**options)
