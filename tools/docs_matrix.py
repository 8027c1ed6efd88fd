"""The support matrix: which options of a run go together, by the program's own checks.
Used by tools/docs.py."""

from collections.abc import Iterable
from dataclasses import replace

import yaml

from tools.tables import cell, ruler, table_row


def options_in(text: str) -> dict[str, str]:
    """A name and its flags a line."""
    lines = text.strip().splitlines()
    return dict(line.split(" | ") for line in lines)


OPTIONS = options_in("""
ReMoRA (`--merge_every`) | --merge_every 100
`--adapter lora` | --adapter lora
`--adapter subspace` | --adapter subspace
`--adapter full` | --adapter full
`--operator truncate` | --operator truncate
`--operator share` | --operator share
`--operator decouple` | --operator decouple
`--operator rotate` | --operator rotate
`--target_modules experts` | --target_modules all-linear experts
`--train_embeddings`, `--train_head` | --train_embeddings --train_head
`--train_new_embeddings` | --train_new_embeddings
`--train_embedding_rank` | --train_embedding_rank 16
`--optimizer muon` | --optimizer muon
`--mora_dropout` | --mora_dropout 0.1
`--compute weight` | --compute weight
`--chunked_loss` | --chunked_loss
`--gradient_checkpointing` | --gradient_checkpointing
`--base_bits 8` | --base_bits 8
`--base_bits 4` | --base_bits 4
`--base_device host` | --base_device host
`--tensor_parallel_size` | --tensor_parallel_size 2
`--sequence_parallel_size` | --sequence_parallel_size 2
`--rope_scaling` | --rope_scaling {"rope_type":"yarn","factor":4}
`--decay_from` | --decay_from step-000100 --lr_scheduler_type wsd
`--streaming` | --streaming
`--async_save` | --async_save
`targets` | research: {targets: plan.yaml}
`alignment_weight` | research: {alignment_weight: 0.1}
`sides: gradient` | --adapter subspace research: {sides: gradient}
""")
COLUMNS = options_in("""
ReMoRA merges | --merge_every 100
ZeRO 1 | --deepspeed configs/zero1.json
ZeRO 2 | --deepspeed configs/zero2.json
ZeRO-3 | --deepspeed configs/zero3.json
offload | --deepspeed configs/zero3_offload_optimizer.json
Muon | --optimizer muon
LoRA | --adapter lora
tensor parallel | --tensor_parallel_size 2
sequence parallel | --sequence_parallel_size 2
8-bit base | --base_bits 8
4-bit base | --base_bits 4
base on the host | --base_device host
streaming | --streaming
""")


def why_refused(row: str, column: str) -> str | None:
    """What the program says to both options together, or None if it takes them.

    The checks are those that a run makes before it loads a model: `validate`, the
    DeepSpeed config, and what tensor parallelism needs of it.
    """
    from mora_ds.common.errors import UserError
    from mora_ds.config.arguments import parse
    from mora_ds.config.validate import validate
    from mora_ds.engine.ds_config import resolve_ds_config
    from mora_ds.engine.initialize import check_splittable

    run = "--model_name_or_path model --max_steps 1000 --train_files a.txt"
    flags, _, research = row.partition("research:")
    try:
        arguments = parse(f"{flags} {column} {run}".split())
        block = yaml.safe_load(research) or {}
        arguments = replace(arguments, research=block)
        validate(arguments)
        training = arguments.training
        config = resolve_ds_config(training.deepspeed, training.engine_settings(), 2)
        check_splittable(config, training.tensor_parallel_size)
    except UserError as error:
        return str(error)
    return None


def matrix_lines() -> list[str]:
    """The lines of reference/support-matrix.md below its title.

    Options that go with everything are named in a sentence; rows and columns that say
    the same are one.
    """
    reasons: dict[str, int] = {}
    rows = {
        row: [_together(option, column, reasons) for column in COLUMNS.values()]
        for row, option in OPTIONS.items()
    }
    free = [row for row, cells in rows.items() if set(cells) <= {"yes", ""}]
    for row in free:
        del rows[row]
    columns = _alike(COLUMNS, zip(*rows.values(), strict=True))
    grouped = _alike(rows, zip(*columns.values(), strict=True))
    return [
        "What the program's checks say to two options, before a model is loaded. Numbers lead to the messages.", "",
        f"These go with every column: {', '.join(free)}.", "",
        table_row("", *columns), ruler(len(columns) + 1),
        *(table_row(row, *cells) for row, cells in grouped.items()), "",
        "## Messages", "",
        *(f"{number}. {cell(reason)}" for reason, number in reasons.items()), "",
    ]  # fmt: skip


def _together(row: str, column: str, reasons: dict[str, int]) -> str:
    """Whether two options go together: "yes", or "no" with the number of the reason,
    which is added where it is new; nothing for an option with itself, or two values of
    one."""
    if _flags(row) & _flags(column):
        return ""
    reason = why_refused(row, column)
    if reason is None:
        return "yes"
    number = reasons.setdefault(" / ".join(reason.splitlines()), len(reasons) + 1)
    return f"no ({number})"


def _flags(option: str) -> set[str]:
    return {word for word in option.split() if word.startswith("--")}


def _alike(
    names: Iterable[str], lines: Iterable[tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Lines of the same cells as one, under their names together."""
    names_of: dict[tuple[str, ...], list[str]] = {}
    for name, cells in zip(names, lines, strict=True):
        names_of.setdefault(cells, []).append(name)
    return {", ".join(alike): cells for cells, alike in names_of.items()}
