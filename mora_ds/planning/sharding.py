"""Which ZeRO stage and which shard group suit a run: what DeepSpeed does in Python grows with the number of ranks.

Under ZeRO-3 DeepSpeed 0.19.8 goes through every trained parameter times every rank at each reduction
(runtime/comm/coalesced_collectives.py, `reduce_scatter_coalesced`) and at the gathers of several parameters
(runtime/zero/partition_parameters.py, `AllGatherCoalescedHandle.wait`). `tools/bench/scale.py` counts the host's
seconds of both; ZeRO-1 has one flat tensor in their place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mora_ds.planning.plan import Plan, Planner

FEW_SLICES = 1 << 15
"""Parameters times ranks up to which ZeRO-3's loops are short against a step: 224 matrices at 146 ranks."""


@dataclass(frozen=True)
class Sharding:
    """A recommendation."""

    stage: int
    """Of ZeRO."""
    group: int
    """Ranks among which forward and backward gather the matrices; below the number of ranks it is the value of
    zero_hpz_partition_size."""
    reason: str

    def __str__(self) -> str:
        where = f", zero_hpz_partition_size {self.group}" if self.stage == 3 and self.group > 1 else ""
        return f"ZeRO-{self.stage}{where}: {self.reason}"


def recommend_sharding(planner: Planner, plan: Plan) -> Sharding:
    """The stage and shard group for the plan's model and cluster, whatever the planner's DeepSpeed config says."""
    trained, cluster = plan.trained, plan.cluster
    parameters, ranks = len(trained.numels), trained.ranks
    slices = f"{parameters:,} parameters x {ranks:,} ranks = {parameters * ranks:,} slices"
    if parameters * ranks <= FEW_SLICES:
        return Sharding(3, 1, f"DeepSpeed goes through {slices} in Python at each reduction, which is short")
    config = dict(planner.ds_config)
    zero = {**config["zero_optimization"], "stage": 1}
    zero.pop("zero_hpz_partition_size", None)
    work = plan.work
    unsharded = replace(planner, ds_config={**config, "zero_optimization": zero}).plan(
        micro_batch=work.micro_batch, checkpointing=work.checkpointing, tensor_parallel=work.tensor_parallel,
        sequence_parallel=work.sequence_parallel,
    )  # fmt: skip
    reason = f"ZeRO-3 would go through {slices} in Python at each reduction"
    if unsharded.fits:
        size = trained.total * trained.bytes_each
        return Sharding(1, 1, f"{reason}; all matrices are {size / 1e9:,.2f} GB, which fit on every GPU")
    group = cluster.per_node if ranks > cluster.per_node and work.tensor_parallel == 1 else 1
    return Sharding(
        3, group, f"the matrices do not fit unsharded on every GPU; a node gathers among its own ranks. {reason}"
    )
