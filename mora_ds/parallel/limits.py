"""Settings that cannot be combined with tensor or sequence parallelism: the only
definition, used for flags, plans, engines and models.

Callers pass the settings that they know; the defaults are valid with everything. Limits
by a model's heads and sizes are in `parallel/tp_plan.py` and `parallel/ulysses.py`.
"""

from collections.abc import Iterator, Mapping

from mora_ds.adapters.registry import DEFAULT_ADAPTER, Capability, unsupported
from mora_ds.common.errors import UserError, raise_validation_errors

TENSOR = "--tensor_parallel_size"
SEQUENCE = "--sequence_parallel_size"


def check_world(world: int, tensor: int = 1, sequence: int = 1) -> None:
    """Raise `UserError` unless groups of these sizes divide the `world` ranks."""
    for flag, size in ((TENSOR, tensor), (SEQUENCE, sequence)):
        if size < 1 or world % size:
            divisors = [
                str(number) for number in range(1, world + 1) if world % number == 0
            ]
            raise UserError(
                f"{flag} {size} does not divide the {world} ranks of this run: {', '.join(divisors)} would"
            )


def tensor_parallel_problems(
    degree: int,
    *,
    adapter: str = DEFAULT_ADAPTER,
    dropout: Mapping[str, float] | None = None,
    base_bits: int | None = None,
    domains: bool = False,
    sequence: int = 1,
    experts: bool = False,
    muon: bool = False,
    zero_stage: int = 3,
    streams_base: bool = False,
) -> Iterator[str]:
    """One message for each setting that cannot be combined with tensor parallelism.

    `dropout`: probabilities by name.
    """
    if degree < 2:
        return
    setting = f"{TENSOR} {degree}"
    yield from unsupported(adapter, Capability.TENSOR_PARALLEL, setting)
    dropouts = [
        f"{name} = {value}" for name, value in (dropout or {}).items() if value > 0
    ]
    limits = [
        (domains, " splits one MoRA matrix a layer, not those of research.domain_adapters"),
        (experts, " splits linear layers, and --target_modules names experts: leave it at 1"),
        (sequence > 1, f" and {SEQUENCE} {sequence}: use one of them"),
        (zero_stage != 3, " needs ZeRO stage 3 (zero_optimization.stage in --deepspeed)"),
        (dropouts, f": each rank of a group would draw a different dropout mask; set to 0: {', '.join(dropouts[:3])}"),
        (muon, ": --optimizer muon orthogonalizes unsharded MoRA matrices, which no rank has: use adamw"),
        (base_bits in (8, 4), f": --base_bits {base_bits} has unsplit weights: use one of them"),
        (streams_base, ": --base_device host copies unsplit layers: use one of them"),
    ]  # fmt: skip
    yield from (f"{setting}{limit}" for holds, limit in limits if holds)


def check_tensor_parallel(degree: int, **settings: object) -> None:
    """Raise `UserError` with all of `tensor_parallel_problems`."""
    raise_validation_errors(tensor_parallel_problems(degree, **settings))  # type: ignore[arg-type]


def sequence_parallel_problems(
    size: int,
    seq_len: int,
    attention: str,
) -> Iterator[str]:
    """One message for each setting that cannot be combined with sequence
    parallelism."""
    if size > 1 and seq_len % size:
        yield f"{SEQUENCE} {size} does not divide --seq_len {seq_len}"
    if size > 1 and attention != "auto" and "flash_attention" not in attention:
        yield f"{SEQUENCE}: --attn_implementation {attention} reads masks, which are not split over ranks: leave it out"
