"""Which rows of the global batch a process computes; a resume at another number of processes relies on the order."""

from __future__ import annotations

from types import SimpleNamespace

from mora_ds.train.trainer import Trainer


def rows_of(replica: int, replicas: int, micro_batches: int, size: int) -> list[list[int]]:
    """The global rows of each micro-batch of a replica, at step 5 of a run whose data begin at batch 7."""
    trainer = SimpleNamespace(
        replica=SimpleNamespace(index=replica, count=replicas),
        training=SimpleNamespace(per_device_train_batch_size=size, gradient_accumulation_steps=micro_batches),
        state=SimpleNamespace(step=5),
        first_batch=7,
        rows_per_step=size * micro_batches * replicas,
    )
    found = []
    for index in range(micro_batches):
        batch, rows_per_step, rows = Trainer._position(trainer, index)  # type: ignore[arg-type]
        assert (batch, rows_per_step) == (12, trainer.rows_per_step)
        found.append(list(range(rows.start, rows.stop)))
    return found


def test_micro_batch_m_of_replica_r_holds_the_rows_from_m_times_replicas_plus_r() -> None:
    assert rows_of(0, 2, 3, 2) == [[0, 1], [4, 5], [8, 9]]
    assert rows_of(1, 2, 3, 2) == [[2, 3], [6, 7], [10, 11]]
    assert rows_of(0, 1, 2, 3) == [[0, 1, 2], [3, 4, 5]]
