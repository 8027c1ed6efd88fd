"""What a user's mistake ends with."""

import pytest

from mora_ds.common.errors import UserError


def user_error(message):
    """Within it a `UserError` must be raised in whose message the pattern `message` is
    found.
    """
    return pytest.raises(UserError, match=message)
