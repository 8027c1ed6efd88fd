"""Restores the project's logger, for the tests of this folder."""

import logging

import pytest

from mora_ds.runtime.log_setup import LOGGER


@pytest.fixture
def unchanged_logger():
    logger = logging.getLogger(LOGGER)
    handlers = list(logger.handlers)
    propagate = logger.propagate
    level = logger.level
    yield
    logger.handlers = handlers
    logger.propagate = propagate
    logger.setLevel(level)
