"""What every test runs in."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# A busy machine must not make a property fail: what is tested is what holds, never how long it took.
settings.register_profile("weightspace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("weightspace")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Commands send the log to their standard error, which in a test is a captured one that is closed afterwards."""
    kept = [(logger, list(logger.handlers), logger.level) for logger in map(logging.getLogger, ("", "weightspace"))]
    yield
    for logger, handlers, level in kept:
        logger.handlers[:] = [h for h in logger.handlers if h in handlers or type(h).__module__.startswith("_pytest")]
        logger.setLevel(level)
