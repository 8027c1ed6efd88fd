"""What a user's mistake and a failure of the surroundings end with."""

import pytest

from mora_ds.common.errors import RunError, UserError


def user_error(message):
    """Within it a `UserError` must be raised in whose message the pattern `message` is
    found.
    """
    return pytest.raises(UserError, match=message)


def run_error(message):
    """The same of a `RunError`."""
    return pytest.raises(RunError, match=message)
