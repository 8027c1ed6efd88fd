"""The batches of a replica, prepared a step ahead: whose rows they are, when errors come,
where a stream is found meanwhile.
"""

import threading
from types import SimpleNamespace

import pytest
import torch

from mora_ds.common.errors import UserError
from mora_ds.data import IGNORED
from mora_ds.data.mixture import BatchLoader, labels_in
from mora_ds.train import replica as module
from mora_ds.train.replica import Replica
from mora_ds.train.training_setup import TrainingSetup
from tests.helpers.errors import user_error

T = 4


class Data:
    """Rows whose tokens are the numbers of their samples; `fails_at` a batch."""

    names = ("one",)
    global_batch_size = 4
    has_streams = False

    def __init__(self, fails_at=-1):
        self.fails_at = fails_at
        self.threads = []

    def batch(self, step, rows):
        self.threads.append(threading.current_thread().name)
        if step == self.fails_at:
            raise UserError(f"line {step} is damaged")
        size = self.global_batch_size
        samples = torch.arange(step * size, (step + 1) * size)[rows]
        ids = samples[:, None].repeat(1, T)
        return {"input_ids": ids, "labels": torch.where(ids % 2 == 0, ids, IGNORED)}


def replica_of(index, count, sequence=None):
    """Replica `index` of `count`, without processes."""
    replica = Replica.__new__(Replica)
    vars(replica).update(index=index, count=count, sequence=sequence)
    return replica


def loader(data, replica=None, world=1, accumulation=2, size=2):
    replica = replica or replica_of(0, world)
    slices = replica.slices(size, accumulation)
    return BatchLoader(data, slices, replica.local_part, 5, "cpu", world)


def first_rows(replica, replicas, micro_batches, size):
    """The first row of each micro-batch of a replica; each has `size` rows."""
    slices = replica_of(replica, replicas).slices(size, micro_batches)
    assert len(slices) == micro_batches
    assert {rows.stop - rows.start for rows in slices} == {size}
    return [rows.start for rows in slices]


def test_micro_batch_m_of_replica_r_holds_the_rows_from_m_times_replicas_plus_r():
    assert first_rows(0, 2, 3, 2) == [0, 4, 8]
    assert first_rows(1, 2, 3, 2) == [2, 6, 10]
    assert first_rows(0, 1, 2, 3) == [0, 3]


def test_a_step_is_prepared_by_a_thread_and_taken_in_order():
    data = Data()
    batch_loader = loader(data)
    for step in range(3, 5):
        batch = batch_loader.take(step)
        ids = torch.cat([micro.batch["input_ids"][:, 0] for micro in batch])
        assert ids.tolist() == list(range(step * 4, (step + 1) * 4))
        for micro_batch in batch:
            counted = (micro_batch.batch["labels"] != IGNORED).sum(dim=1)
            assert micro_batch.labels == counted.tolist()
            assert sum(micro_batch.labels) == T
        assert batch_loader.next_labels(step + 1) == (2 * T if step < 4 else 0)
    assert data.threads == ["mora_ds batches_0"] * 4, "and nothing beyond the last step"


def test_an_error_is_raised_when_its_batch_is_taken():
    batch_loader = loader(Data(fails_at=2))
    batch_loader.take(0)
    assert batch_loader.next_labels(1) == 2 * T
    batch_loader.take(1)
    assert batch_loader.next_labels(2) == 0, "step 1 is still to be finished and saved"
    for _ in range(2):
        with user_error("line 2 is damaged"):
            batch_loader.take(2)


def test_a_stream_that_processes_share_is_read_while_all_of_them_wait_for_it():
    """After the work of a step is queued; it begins before that where a process reads
    alone.
    """
    for world in (1, 2):
        stream = Data()
        stream.has_streams = True
        stream.global_batch_size = 4 * world
        batch_loader = loader(stream, world=world)
        batch_loader.take(0)
        assert (batch_loader.ahead is None) == (world == 2)
        assert batch_loader.next_labels(1) == 2 * T
        assert len(stream.threads) == 4


def test_counts_are_those_of_the_part_that_a_process_computes():
    """Under sequence parallelism a process has some tokens of each row."""
    first_token = SimpleNamespace(
        split=lambda rows: {name: values[:, :1] for name, values in rows.items()}
    )
    batch_loader = loader(Data(), replica_of(0, 1, first_token))
    (first, second) = batch_loader.take(0)
    assert first.batch["labels"].shape == (2, 1)
    assert labels_in([first, second]) == 2


@pytest.mark.parametrize(
    "replicas, rows, limit", [(1, 5, None), (3, 2, 100), (20, 1, 7)]
)
def test_the_first_losses_are_of_each_sequence_once(monkeypatch, replicas, rows, limit):
    """And as many on every replica."""

    def numbers(model, batch):
        return batch["labels"][batch["labels"] != IGNORED].tolist()

    monkeypatch.setattr(module, "token_nll", numbers)
    monkeypatch.setattr(
        module, "stack", lambda rows: {"labels": torch.tensor(rows)[:, None]}
    )
    data = SimpleNamespace(
        has_streams=False,
        sample=lambda number: number,
        schedule=SimpleNamespace(limit=limit),
    )
    losses = [
        list(
            Replica.first_losses(
                SimpleNamespace(
                    index=index,
                    count=replicas,
                    engine=SimpleNamespace(module=torch.nn.Module()),
                    on_device=lambda batch: batch,
                    local_part=lambda batch: batch,
                ),
                data,
                16,
                rows,
            )
        )
        for index in range(replicas)
    ]
    assert len({len(of_replica) for of_replica in losses}) == 1
    samples = [sample for replica in losses for batch in replica for sample in batch]
    assert sorted(samples) == list(range(min(limit or 16, 16)))


# -- its dropout -----------------------------------------------------------------------


def seed_of_dropout(rank, seed=3):
    """Of a rank of replicas of two."""
    training = SimpleNamespace(seed=seed, ranks_per_replica=2)
    setup = TrainingSetup.__new__(TrainingSetup)
    vars(setup).update(
        arguments=SimpleNamespace(training=training),
        context=SimpleNamespace(ranks=SimpleNamespace(rank=rank)),
    )
    with torch.random.fork_rng():
        setup._seed_dropout()
        return torch.initial_seed()


def test_each_replica_draws_dropout_masks_that_no_other_has():
    first, same, other, _ = map(seed_of_dropout, range(4))
    assert first == same
    assert first != other
    assert seed_of_dropout(0, seed=4) not in (first, other)
