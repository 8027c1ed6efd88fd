"""The ports by which ranks of a test find each other: no two tests at a time get the same
one.
"""

import socket

import pytest
from torch.distributed import TCPStore

from tests.helpers.gloo import free_port


def test_a_free_port_is_used_by_one_store():
    port = free_port()
    with socket.socket() as drawn_by_another, pytest.raises(OSError, match="in use"):
        drawn_by_another.bind(("", port))
    assert TCPStore("127.0.0.1", port, 1, is_master=True).port == port
