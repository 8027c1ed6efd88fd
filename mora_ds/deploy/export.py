"""Export: checkpoint -> a merged Hugging Face folder that plain `from_pretrained`
loads.

    checkpoint (manifest checked) -> base, merge ledger, live MoRA matrices, other trained tensors
    every tensor of the base:  replaced | base with all updates, by `merged_weight` | unchanged  -> cast -> shard
    also config, generation config, tokenizer, model card -> (verify the logits) -> renamed into place

With `onto` the model is another one of the base's shapes, such as an instruct model of
it (`onto`):

    every tensor of it:        + (trained - base) | + all deltas | unchanged

One tensor is in memory at a time, whatever the size of the model; neither a GPU nor
DeepSpeed is needed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_ds.adapters import nf4
from mora_ds.adapters.domain_names import SHARED
from mora_ds.adapters.low_rank_embeddings import is_low_rank, with_product
from mora_ds.adapters.new_embeddings import is_new_rows, stands_for, with_new_rows
from mora_ds.adapters.ops.frozen import QuantizedWeight
from mora_ds.adapters.ops.int8 import Int8Weight, quantize
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.adapters.ops.updates import merged_weight
from mora_ds.adapters.registry import Capability, require
from mora_ds.checkpoint.adapter_files import Adapter, chosen_domain, logits_name
from mora_ds.checkpoint.layout import PROBE_FILE, find_adapter, tokenizer_of
from mora_ds.common.errors import UserError
from mora_ds.common.fetched import with_urls
from mora_ds.common.files import as_path, atomic_folder, require_outside, require_place
from mora_ds.common.tensor_files import compute_dtype, dtype_name, tensor_nbytes
from mora_ds.deploy.combine import scaled
from mora_ds.deploy.logits_check import Comparison, compare_logits
from mora_ds.deploy.model_card import write_model_card
from mora_ds.deploy.onto import ONTO, exported_keys, open_target
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.load import folder_config, kept_in_fp32, load_model
from mora_ds.models.save import (
    is_of_model,
    layout_of,
    write_companions,
    write_shards,
)
from mora_ds.models.stored_names import is_stack
from mora_ds.remora.ledger import LayerEntry
from mora_ds.remora.stored_weights import StoredWeight, stored_weights, weight_shape


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    output: Path
    files: tuple[str, ...]
    """Names of the weight files."""
    nbytes: int
    dtype: str
    merged: int
    """Number of layers whose weight contains an update."""
    replaced: int
    """Number of trained embeddings, norms and heads."""
    cycles: int
    """Merged cycles in the ledger; the live MoRA matrices come on top."""
    comparison: Comparison | None
    """Logits compared with the live model's, with `verify`."""

    def __str__(self) -> str:
        text = [
            f"{self.output}: {self.nbytes / 2**30:.3f} GiB in {self.dtype}, in {len(self.files)} file(s)",
            f"merged {self.merged} layers from {self.cycles} ledger cycle(s) and the current MoRA matrices,"
            f" replaced {self.replaced} trained tensor(s)",
        ]
        if self.comparison is not None:
            text.append(f"verification passed: {self.comparison.line()}")
        return "\n".join(text)


@dataclass(frozen=True)
class MergedModelSource(Adapter):
    """An opened adapter with its base. Make one with `open_run`."""

    base: BaseCheckpoint
    domain: str | None
    """The domain whose MoRA matrices come on top of the shared ones, if any."""
    target: BaseCheckpoint
    """The model that gets the update: the base, or another one of its shapes."""

    @property
    def is_onto(self) -> bool:
        """Whether the update goes to another model than its base."""
        return self.target is not self.base

    def updates(self, entry: LayerEntry) -> list[tuple[UpdateSpec, Tensor]]:
        """(operator, adapter weight) of all updates of a layer's base weight, in
        order."""
        updates = list(self.ledger.mora_matrices_of(entry.module))
        updates.append((entry.operator, self.tensors.mora_matrix(entry.module)))
        domains = self.file.domains
        if self.domain is not None and domains is not None:
            mora_matrix = self.tensors.domain_mora_matrix(entry.module, self.domain)
            updates.append((domains.operators[entry.module], mora_matrix))
        return updates

    def trained(self, name: str, dtype: torch.dtype) -> Tensor:
        """What a trained tensor's parameter becomes; trained rows among the frozen
        ones, a product added to them."""
        tensor = self.tensors.trained(name)
        if not (is_new_rows(name) or is_low_rank(name)):
            return tensor.to(dtype)
        table = self.base.read(self.reference.keys[stands_for(name)])
        if is_low_rank(name):
            return with_product(table, tensor).to(dtype)
        return with_new_rows(table.to(dtype), tensor)


def export_merged(
    checkpoint: Path | str,
    output: Path | str,
    base_folder: Path | str | None = None,
    dtype: str = "auto",
    verify: bool = False,
    overwrite: bool = False,
    domain: str | None = None,
    delta_scale: float = 1.0,
    trust_remote_code: bool = False,
    onto: Path | str | None = None,
) -> ExportReport:
    """Write the merged model of `checkpoint` to `output`, completely or not at all.

    `checkpoint`: a step folder, a link to one, or a run's output folder
    (its latest one is taken). `base_folder`: the base, if it was moved. `dtype`: of
    floating tensors but those that transformers keeps in fp32; "auto" is the run's
    compute dtype, and with `onto` that of each tensor there. `verify`: load the result
    and compare its logits with those recorded at save time (`logits_check` has the
    tolerances). `domain`: of a run with domains, the one to merge with the shared MoRA
    matrices; "shared": those alone. `delta_scale`: multiplies the update.
    `trust_remote_code`: code that comes with the base may be run, and with `onto` that
    of tokenizers; `verify` of such a base needs it. `onto`: a model of the
    base's shapes to which the update is added instead. Raises `UserError` naming the
    flag to change, and `RunError` for a damaged checkpoint, logits that differ, or a
    full disk.
    """
    output = as_path(output, "export_merged: `output`")
    checkpoint = as_path(checkpoint, "export_merged: `checkpoint`")
    checkpoint = find_adapter(checkpoint, "`checkpoint`")
    if base_folder is not None:
        base_folder = as_path(base_folder, "export_merged: `base_folder`")
    if onto is not None:
        onto = as_path(onto, "export_merged: `onto`")
    if dtype != "auto":
        compute_dtype(dtype)
    if verify and (onto is not None or delta_scale != 1):
        raise UserError(
            "`verify` compares with what the run recorded: it has no logits of a scaled update, nor of another model "
            "than its base"
        )
    with scaled(checkpoint, delta_scale, base_folder) as source:
        opened = Adapter.open(source)
        adapter = opened.file
        if verify and not (checkpoint / PROBE_FILE).is_file():
            raise UserError(
                f"`verify` needs {PROBE_FILE}, which {checkpoint} does not have"
            )
        run = open_run(opened, base_folder, domain, onto, trust_remote_code)
        if verify:
            folder_config(run.base.folder, trust_remote_code, "`verify`: base")
            if adapter.config.base_bits == 4:
                nf4.check_installed()
        read = (checkpoint, run.base.folder.resolve(), run.target.folder.resolve())
        _check_output(output, overwrite, read)
        if run.is_onto:
            keys: Iterable[str] = run.target.keys()
            tokenizer = None
            measured = None
            facts: dict[str, Any] = {
                "put onto": with_urls(run.target.folder),
                "its fingerprint": run.target.fingerprint(),
                "scale": delta_scale,
            }
        else:
            keys = exported_keys(run.base, run.reference)
            tokenizer = tokenizer_of(run.folder)
            measured = run.folder
            facts = {}
        if adapter.domains is not None:
            facts["domain"] = run.domain or SHARED
        # None: each tensor has the dtype of the model that gets the update.
        written = None
        written_text = "its own dtypes"
        if dtype != "auto" or not run.is_onto:
            written = compute_dtype(adapter.dtype if dtype == "auto" else dtype)
            written_text = dtype_name(written)
        in_fp32 = kept_in_fp32(run.target, written, trust_remote_code)
        layout = layout_of(run.target, keys, written, in_fp32)
        comparison = None
        with atomic_folder(output.absolute()) as folder:
            names = write_shards(folder, layout, updated_tensors(run))
            changes = run.reference.config_changes
            write_companions(run.target, folder, written, tokenizer, changes)
            if verify and written is not None:
                rounding = (
                    _rounding(run) if adapter.config.base_bits in (8, 4) else None
                )
                probe = run.folder / PROBE_FILE
                logits = logits_name(run.domain)
                comparison = compare_logits(
                    folder, probe, written, logits, rounding, trust_remote_code
                )
            described = replace(adapter, facts={**facts, **adapter.facts})
            write_model_card(
                folder, measured, described, run.reference, written_text, comparison
            )
    return ExportReport(
        output=output,
        files=names,
        nbytes=sum(tensor_nbytes(*entry) for entry in layout.values()),
        dtype=written_text,
        merged=len(adapter.layers),
        replaced=len(adapter.trainables),
        cycles=opened.ledger.cycles,
        comparison=comparison,
    )


def open_run(
    adapter: Adapter,
    base_folder: Path | None,
    domain: str | None,
    onto: Path | None = None,
    trust_remote_code: bool = False,
) -> MergedModelSource:
    """Open the base of an adapter, and the model in the folder `onto`, which gets the
    update. Raises `UserError` where anything does not fit."""
    domain = chosen_domain(adapter.file.domains, domain, "`domain`")
    if onto is not None:
        require(adapter.file.config.adapter, Capability.SUM, f"{ONTO} {onto}")
    base = adapter.reference.open_base(
        adapter.folder, base_folder, flag="`base_folder`"
    )
    target = (
        base if onto is None else open_target(onto, adapter, base, trust_remote_code)
    )
    run = MergedModelSource(**vars(adapter), base=base, domain=domain, target=target)
    _check_layers(run)
    return run


def _check_layers(run: MergedModelSource) -> None:
    """Raise `UserError` unless every layer and trained tensor has a tensor of its shape
    in the base, and no tied weight is adapted at one of its places alone."""
    users: dict[str, list[str]] = {}
    for name, key in run.reference.keys.items():
        users.setdefault(key, []).append(name)
    for entry in run.file.layers.values():
        _check_shape(run, entry.weight, weight_shape(entry))
        if sharers := set(users[run.reference.keys[entry.weight]]) - {entry.weight}:
            raise UserError(
                f"{entry.weight} is tied to {', '.join(sorted(sharers))}, but only one of them is adapted: no single"
                " tensor can stand for both"
            )
    for name in run.file.trainables:
        shape: tuple[int | None, ...] = run.tensors.trained_shape(name)
        # (V + d, rank), which `with_product` compares with the base's rows.
        if is_low_rank(name):
            shape = (None, None)
        elif is_new_rows(name):
            shape = (None, *shape[1:])
        _check_shape(run, stands_for(name), shape)


def _check_shape(
    run: MergedModelSource, name: str, shape: tuple[int | None, ...]
) -> None:
    """`shape`: None stands for any length."""
    actual = run.base.shape_dtype(run.original_key(run.base, name))[0]
    fits = len(actual) == len(shape) and all(
        side in (None, real) for side, real in zip(shape, actual, strict=True)
    )
    if not fits:
        raise UserError(
            f"{name} has shape {shape} in the checkpoint, {actual} in the base"
        )


def _check_output(output: Path, overwrite: bool, read: Sequence[Path]) -> None:
    """Refuse to overwrite anything but a model, and the folders that the export reads,
    of which the first is the checkpoint; and to write into the checkpoint."""
    require_place(output)
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"`output` {output} exists and is not a folder")
    require_outside(output, read[0])
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"`output` {output} exists already; give another folder, or `overwrite`"
        )
    if any(output.resolve() in (folder, *folder.parents) for folder in read):
        raise UserError(
            f"`output` {output} holds the base or the checkpoint, or is {ONTO}; give another folder"
        )
    if not (output / "config.json").is_file():
        raise UserError(
            f"`output` {output} holds something other than a model; it is not overwritten"
        )
    if foreign := sorted(
        path.name for path in output.iterdir() if not is_of_model(path)
    ):
        raise UserError(
            f"`output` {output} holds {', '.join(foreign[:3])} besides a model; move that away, or give another folder"
        )


# -- weights ---------------------------------------------------------------------------


def updated_tensors(run: MergedModelSource) -> Callable[[str, torch.dtype], Tensor]:
    """What each tensor of the target becomes, by its key, in a given dtype: replaced,
    merged, or unchanged.

    On another model than the base, a trained tensor is not replaced: the difference
    from the base's is added in fp32. Rows of tokens that only the target has stay as
    they are.
    """
    trained = {
        run.reference.keys[stands_for(name)]: name for name in run.file.trainables
    }
    stored: dict[str, StoredWeight] = {}
    for entry in run.file.layers.values():
        stored.update(stored_weights(entry, run.reference.keys[entry.weight], run.base))

    def tensor_of(key: str, dtype: torch.dtype) -> Tensor:
        # A weight that is tied in the base may be stored twice in the target.
        key_in_base = run.reference.keys.get(key, key)
        if key_in_base not in trained and key_in_base not in stored:
            return run.target.read(key).to(dtype)
        rows = run.base.shape_dtype(key_in_base)[0][0]

        def original(name: str) -> Tensor:
            return run.target.read(name)[:rows]

        if key_in_base in stored:
            # The current cycle is merged too, as the next merge would do it.
            weight = stored[key_in_base]
            updated = weight.merged(original, run.updates(weight.entry), dtype)
        elif run.is_onto:
            new = run.trained(trained[key_in_base], torch.float32)
            change = new - run.base.read(key_in_base).float()
            updated = (original(key).float() + change).to(dtype)
        else:
            updated = run.trained(trained[key_in_base], dtype)
        if run.target.shape_dtype(key)[0][0] == rows:
            return updated
        return torch.cat([updated, run.target.read(key)[rows:].to(dtype)])

    return tensor_of


@torch.no_grad()
def load_onto(
    checkpoint: Path,
    onto: Path,
    base_folder: Path | None,
    dtype: str,
    domain: str | None,
    trust_remote_code: bool,
) -> Any:
    """The model that `export_merged` with `onto` writes of the adapter in the folder
    `checkpoint`, in memory: on the CPU, in evaluation mode. `dtype` "auto": that of the
    folder `onto`. Raises `UserError` as `export_merged` does."""
    run = open_run(
        Adapter.open(checkpoint), base_folder, domain, onto, trust_remote_code
    )
    wanted = "auto" if dtype == "auto" else compute_dtype(dtype)
    changes = run.reference.config_changes
    folder = run.target.folder
    model: Any = load_model(folder, wanted, None, trust_remote_code, ONTO, changes)
    tensor_of = updated_tensors(run)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = name if name in run.target else run.reference.keys.get(name)
        if key is None:  # what the base does not have stays as it was loaded
            continue
        if is_stack(key):
            experts = [
                torch.cat([tensor_of(row, parameter.dtype) for row in rows])
                for rows in run.target.members(key)
            ]
            parameter.copy_(torch.stack(experts))
        else:
            parameter.copy_(tensor_of(key, parameter.dtype))
    return model.eval()


def _rounding(run: MergedModelSource) -> Callable[[Any], None]:
    """A function that gives a loaded export the rounding of --base_bits, with which it
    is the live model up to rounding of sums.

    In 8 bits a run holds the weights with all merged cycles, in 4 bits the original
    ones, and keeps the matrices of merged cycles in addition.
    """
    bits = run.file.config.base_bits

    @torch.no_grad()
    def change(model: Any) -> None:
        for entry in run.file.layers.values():
            original = run.base.read(run.reference.keys[entry.weight])
            merged = run.ledger.mora_matrices_of(entry.module) if bits == 8 else ()
            exact = merged_weight(original, merged, entry.transposed, torch.float32)
            # (d_out, d_in), or a stack of such.
            exact = exact.mT if entry.transposed else exact
            frozen: QuantizedWeight
            if bits == 8:
                frozen = Int8Weight(*quantize(exact))
            else:
                frozen = nf4.NF4Weight(*nf4.quantize(exact), tuple(exact.shape))
            error = frozen.dense(torch.float32) - exact
            weight = model.get_parameter(entry.weight)
            weight.copy_(weight.float().add_(error.mT if entry.transposed else error))

    return change
