"""Traffic within a tensor-parallel group, counted by hand. The bytes of real ranks: tests/parallel."""

from mora_ds.planning.costs import Collective, Traffic


def test_what_a_ring_sends():
    traffic = (Traffic(Collective.GATHER, 4, 1_000_000, 2), Traffic(Collective.SUM, 2, 3_000_000))
    assert [collective.wire for collective in traffic] == [1_500_000, 3_000_000]
    assert traffic[0].payload == 2_000_000
