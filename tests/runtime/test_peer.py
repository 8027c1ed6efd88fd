"""What a process that is no rank of the run can do to one: nothing that it sends is run,
and no more memory is taken than a rank's message may have.
"""

import os
import pickle
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from mora_ds.checkpoint.shard_table import MAX_ORIGINS, RankShard
from mora_ds.common.errors import RunError
from mora_ds.runtime.exchange import BYTES_OF_EACH, MAX_BYTES, decode, encode
from mora_ds.runtime.ranks import Ranks
from tests.helpers import gloo
from tests.helpers.errors import run_error
from tests.helpers.gloo import run_alone

TIMEOUT = timedelta(seconds=20)


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mknod, (self.marker,)


def send_objects(marker):
    """The pickles that torch's own exchange of objects sends."""
    dist.send_object_list([[Payload(marker)]], dst=0)


def send_pickle_in_place_of_json(marker):
    message = pickle.dumps(Payload(marker))
    dist.send(torch.tensor([len(message)]), 0)
    dist.send(torch.frombuffer(bytearray(message), dtype=torch.uint8), 0)


def announce_too_much(marker):
    """No more than two ranks may, but for what rank 0 tells itself."""
    dist.send(torch.tensor([MAX_BYTES + 2 * BYTES_OF_EACH]), 0)


ATTACKS = {
    send_objects: "does another program use its port",
    send_pickle_in_place_of_json: "does another program use its port",
    announce_too_much: "announces a message of 285,212,672 bytes",
}


def intrude(port, attack, marker):
    """A process that knows no more than the address: it joins as rank 1, without mora_ds
    or credentials, comes to the first check and attacks.
    """
    store = dist.TCPStore("127.0.0.1", port, world_size=2, timeout=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=TIMEOUT)
    # The check's status, as of a rank whose check has another name
    dist.all_reduce(torch.tensor([0, 1, -1]), op=dist.ReduceOp.MAX)
    attack(marker)
    os._exit(0)


def victim(port):
    store = dist.TCPStore(
        "127.0.0.1", port, world_size=2, is_master=True, timeout=TIMEOUT
    )
    dist.init_process_group("gloo", store=store, rank=0, world_size=2, timeout=TIMEOUT)
    peak = psutil.Process().memory_info().rss
    ranks = Ranks(0, 2, 0, dist.group.WORLD, 20.0)
    try:
        ranks.gather("settings", {"--seed": 1})
    except RunError as error:
        return str(error), psutil.Process().memory_info().rss - peak
    return "no error", 0


def attacked(attack, marker):
    """(error of rank 0, bytes that it took), of real processes over a socket."""
    port = gloo.free_port()
    receiver, sender = gloo.context.Pipe(duplex=False)
    processes = [
        gloo.context.Process(target=_send, args=(sender, port)),
        gloo.context.Process(target=intrude, args=(port, attack, str(marker))),
    ]
    for process in processes:
        process.start()
    sender.close()
    try:
        assert receiver.poll(60), "rank 0 waits without end"
        return receiver.recv()
    finally:
        gloo.end(processes)


def _send(sender, port):
    sender.send(victim(port))
    os._exit(0)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_nothing_that_a_peer_sends_is_run(tmp_path, attack):
    marker = tmp_path / "ran"
    message, nbytes = attacked(attack, marker)
    assert not marker.exists(), "the peer's code has run"
    assert ATTACKS[attack] in message
    assert nbytes < 100e6


def listeners():
    ranks = Ranks.current()
    ranks.barrier("all are here")
    connections = psutil.Process().net_connections("inet")
    return [
        connection.laddr.ip
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
    ]


def test_a_run_of_one_process_is_out_of_reach_of_other_machines():
    """gloo listens even where it has no peer: on the loopback interface."""
    assert set(run_alone(listeners)) <= {"127.0.0.1"}


# -- values ----------------------------------------------------------------------------

VALUES = (
    None,
    [1, -2.5, True, "é\n", float("inf")],
    {"a": [1, [2]], "b": {"c": None}},
    Path("/a/b"),
    [b"", b"\x00\xff"],
)


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_values_arrive_as_they_were(value):
    assert decode(encode(value)) == value


@pytest.mark.parametrize("dtype", ["int64", "float32", "bool", "uint16"])
def test_arrays_arrive_as_they_were(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    there, none, one = decode(encode([array, array[:0], array[1, 0]]))
    assert there.dtype == array.dtype
    assert np.array_equal(there, array)
    assert there.flags.writeable
    assert none.shape == (0, 3)
    assert one == array[1, 0]


def test_tokens_take_no_more_than_a_third_beyond_their_bytes():
    tokens = np.full(10_000, 123_456, np.int32)
    assert len(encode(tokens)) < 1.4 * tokens.nbytes


@pytest.mark.parametrize("value", [{1, 2}, object(), RunError("a"), np.array([{}])])
def test_other_values_are_refused_where_they_are_sent(value):
    with pytest.raises(TypeError, match="ranks do not exchange values of"):
        encode([value])


CRAFTED = (
    b"",
    b'["\xff"]',
    b"{[",
    b"[" * 100_000 + b"]" * 100_000,
    b'{"__array__": "AAAAAAAAAAA=", "dtype": "O", "shape": [1]}',
    b'{"__array__": "AAAA", "dtype": "<zz", "shape": [3]}',
    b'{"__array__": "AAAA", "dtype": "|u1", "shape": [1099511627776]}',
    b'{"__array__": "AAAA", "dtype": "S2000000000", "shape": [1]}',
    b'{"__array__": [1]}',
    b'{"__bytes__": "xy"}',
    b'{"__path__": 3}',
)


@pytest.mark.parametrize(
    "crafted", CRAFTED, ids=lambda crafted: crafted[:20].decode("latin-1")
)
def test_what_no_rank_sends_is_refused(crafted):
    with run_error("does another program use its port"):
        decode(crafted)


def test_the_extents_of_a_rank_are_unpacked_to_a_bound():
    shard = RankShard(0, "a", 1, zlib.compress(bytes(MAX_ORIGINS + 64)), "")
    with run_error("a is said to have more than 1,000,000 extents"):
        shard.run(1)
