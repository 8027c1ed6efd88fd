"""The computed order of an epoch: a permutation without a pattern, the same for ever, in
constant memory.
"""

import tracemalloc

import numpy as np
import pytest

from mora_ds.data.order import shuffled

HUGE = 2_000_000_000


def order(size, epoch=0):
    return shuffled(42, epoch, size, np.arange(size))


@pytest.mark.parametrize("size", [*range(1, 40), 64, 65, 1000, 65_537, 200_003])
def test_every_block_has_one_position(size):
    assert np.array_equal(np.sort(order(size)), np.arange(size))


def test_the_order_never_changes():
    """Recorded: a run of today must resume tomorrow, on any machine."""
    assert order(12).tolist() == RECORDED
    far = shuffled(42, 0, HUGE, np.array([0, 1, HUGE - 1]))
    assert far.tolist() == RECORDED_FAR


RECORDED = [4, 3, 2, 8, 6, 11, 5, 0, 7, 9, 1, 10]
RECORDED_FAR = [1322533561, 1860809771, 1151411130]


def test_positions_are_looked_up_in_any_batch():
    full = order(5000)
    positions = np.array([4999, 0, 17, 17, 2048])
    assert np.array_equal(shuffled(42, 0, 5000, positions), full[positions])
    assert shuffled(42, 0, 5000, positions[:0]).size == 0


@pytest.mark.parametrize("size", [2, 3, 5, 12])
def test_each_block_is_as_often_at_each_position(size):
    orders = np.array([order(size, epoch) for epoch in range(6000)])
    for column in orders.T:
        assert unevenness(column, size) < limit(size)


@pytest.mark.parametrize("size", [1000, 1 << 20, HUGE])
def test_a_part_of_an_epoch_is_spread_over_all_blocks(size):
    """Its blocks, the steps between them, and those between two epochs, as random
    numbers would be."""
    positions = np.arange(min(size, 1 << 16))
    blocks = shuffled("7/web", 3, size, positions)
    another = shuffled("7/web", 4, size, positions)
    for numbers in (blocks, np.diff(blocks) % size, (another - blocks) % size):
        assert unevenness(numbers * 100 // size, 100) < limit(100)


def unevenness(numbers, cells):
    counts = np.bincount(numbers, minlength=cells)
    return ((counts - counts.mean()) ** 2).sum() / counts.mean()


def limit(cells):
    """6 standard deviations above the mean of random numbers."""
    return cells + 6 * np.sqrt(2 * cells)


def test_memory_does_not_grow_with_the_number_of_blocks():
    positions = np.arange(1024)
    peaks = []
    for size in (10**6, HUGE):
        tracemalloc.start()
        shuffled(1, 0, size, positions)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 20 * positions.nbytes
