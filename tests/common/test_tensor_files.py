"""Checksums of tensors."""

import pytest
import torch

from mora_ds.common.tensor_files import tensor_checksum


def test_checksum_is_of_bytes_not_of_views():
    tensor = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    checksum = tensor_checksum(tensor)
    transposed = tensor_checksum(tensor.T)
    assert tensor_checksum(tensor.view(torch.int32)) == checksum
    assert tensor_checksum(tensor.T.contiguous()) == transposed != checksum
    assert tensor_checksum(tensor[1:]) == tensor_checksum(tensor[1:].clone())


def test_checksum_never_changes():
    """Ledgers name their base by it. The number was found by its definition in Python's
    whole numbers.
    """
    assert (
        tensor_checksum(torch.arange(100_000, dtype=torch.int32))
        == 12129217317626389513
    )


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 262_143, 262_144, 262_145, 600_001])
def test_checksum_sees_every_kind_of_change(size):
    data = torch.randint(
        0,
        256,
        (size,),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(size),
    )
    original = tensor_checksum(data)
    assert (
        tensor_checksum(torch.cat((data, torch.zeros(1, dtype=torch.uint8))))
        != original
    )
    positions = {0, size // 2, size - 1, min(size, 262_144) - 1} if size else set()
    for position in positions:
        for bit in (0, 7):
            changed = data.clone()
            changed[position] ^= 1 << bit
            assert tensor_checksum(changed) != original
