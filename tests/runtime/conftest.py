"""What the tests of this folder share: the project's logger, put back."""

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
