"""What the layers of a split block save of its input, and how often a process gathers it again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mora_ds.parallel.saved_inputs import AllTokens, BlockInput, InputShard, Saved, TokenShard

INDEX, DEGREE = 1, 2


class Group:
    """The second process of two: what it gathers is the complete input."""

    def __init__(self, x: Tensor) -> None:
        self.tokens, self.gathers = x.flatten(0, -2), 0

    def share(self, size: int) -> tuple[int, int]:
        return size * INDEX // DEGREE, size * (INDEX + 1) // DEGREE

    def gather(self, own: Tensor, size: int) -> Tensor:
        assert size == len(self.tokens) and torch.equal(own, self.tokens[slice(*self.share(size))])
        self.gathers += 1
        return self.tokens.clone()


def test_a_share_of_the_tokens_is_in_memory_of_its_own_and_becomes_the_input_again() -> None:
    x = torch.randn(3, 5, 8)
    group: Any = Group(x)
    shard = TokenShard(group, folds=False)
    kept = shard.save(x)
    assert kept.shape == (8, 8) and kept.untyped_storage().nbytes() == kept.nbytes, "a view would keep all of x"
    assert torch.equal(shard.restore(kept), x)


def test_the_layers_of_a_block_save_and_gather_its_input_once() -> None:
    x = torch.randn(3, 5, 8)
    group: Any = Group(x)
    shard = InputShard(group)
    kept = [shard.save(x) for _ in range(3)]
    assert kept[0] is kept[1] is kept[2]
    for passes in (1, 2):  # a second pass over the same graph, as `retain_graph` has it
        restored = [shard.restore(each) for each in kept]
        assert all(torch.equal(each, x) for each in restored) and group.gathers == passes
        assert shard._restored is None, "it is not kept after the last layer"


def test_only_layers_that_are_given_the_blocks_input_share_it() -> None:
    x = torch.randn(3, 5, 8)
    group: Any = Group(x)
    block = BlockInput(group)
    assert block.saving(Saved.INPUT_SHARD, x) is None, "before the block has begun"
    block.enter(x)
    shared = block.saving(Saved.INPUT_SHARD, x.view_as(x))
    assert isinstance(shared, InputShard) and shared is block.saving(Saved.INPUT_SHARD, x)
    for other in (x.clone(), x[:2], x.transpose(0, 1)):
        assert block.saving(Saved.INPUT_SHARD, other) is None
    folded, rowwise = block.saving(Saved.FOLDED_SHARD, x), block.saving(Saved.INPUT, x[..., :4])
    assert isinstance(folded, TokenShard) and folded.folds and rowwise == AllTokens(folds=False)
    assert block.saving(Saved.SMALLER, x) is None
    shared.save(x)
    block.leave()
    assert shared._saved is None and block._x is None, "autograd alone keeps it, and frees it"
    block.enter(x)
    assert block.saving(Saved.INPUT_SHARD, x) is not shared, "each pass has its own"
