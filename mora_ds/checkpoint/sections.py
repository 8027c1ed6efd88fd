"""The sections of a checkpoint: what each of them saves, and how it is restored.

    adapter_sections    ledger, adapter, engine, random, state, tokenizer
    full_sections       engine, random, state

A section names its files and folders in a checkpoint: `files` it may have, `required` it
must have. The position in the data is a field of the trainer state, which tells
the step. The engine's tensors and the random states of a rank lie in one file, whatever
the number of ranks.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mora_ds.adapters.domains import domain_layers, domains_of
from mora_ds.adapters.inject import set_cycle
from mora_ds.adapters.layer import adapter_parameter_names, mora_layers
from mora_ds.checkpoint.adapter_files import (
    AdapterFile,
    AdapterTensors,
    BaseReference,
    DomainMatrices,
    adapter_tensors,
    read_adapter,
)
from mora_ds.checkpoint.layout import (
    ADAPTER_JSON,
    ADAPTER_TENSORS,
    BASE_JSON,
    ENGINE_TAG,
    LEDGER_FOLDER,
    PROBE_FILE,
    STATE_FILE,
    TOKENIZER_FOLDER,
)
from mora_ds.checkpoint.shard_table import (
    INDEX_FILE,
    RNG,
    EngineShards,
    RankShard,
    rank_tensors,
)
from mora_ds.checkpoint.state import TrainerState
from mora_ds.checkpoint.storage import Storage
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import (
    JsonObject,
    facts_of,
    file_problem,
    malformed,
    write_json,
)
from mora_ds.common.nested import different_keys
from mora_ds.common.tensor_files import Tensors, write_safetensors
from mora_ds.common.untrusted import require_plain
from mora_ds.engine import shards, zero
from mora_ds.remora.ledger import LEDGER_FILE, Ledger
from mora_ds.remora.merge import ReMoRA, layer_entries
from mora_ds.runtime.nodes import write_on_rank0
from mora_ds.runtime.ranks import Ranks


@dataclass
class CheckpointFiles:
    """What this rank writes into a checkpoint, and what the manifest will say of it."""

    storage: Storage
    folder: str
    recorded: dict[str, JsonObject] = field(default_factory=dict)

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A path to write to, which becomes the checkpoint's file of this name."""
        with self.storage.write(f"{self.folder}/{name}") as path:
            yield path
            self.recorded[name] = facts_of(path)

    def put(self, name: str, source: Path, facts: JsonObject) -> None:
        """Store a file that is there already, with its size and sha256."""
        self.storage.put(f"{self.folder}/{name}", source)
        self.recorded[name] = facts

    def json(self, name: str, content: JsonObject) -> None:
        with self.file(name) as path:
            write_json(path, content)

    def tensors(self, name: str, tensors: Tensors, metadata: dict[str, str]) -> None:
        with self.file(name) as path:
            write_safetensors(path, tensors, metadata)


@dataclass
class SavedCheckpoint:
    """A checkpoint that is being restored, on one rank."""

    path: Path
    """What users call it."""
    local: Callable[[str], Path]
    """The file on this machine with the content of one of its files."""
    shards: EngineShards
    ranks: Ranks


@dataclass
class Gathered:
    """What one rank saves of a section. Writing it asks no other rank for anything,
    however training goes on meanwhile."""

    tensors: Tensors = field(default_factory=dict)
    """For this rank's file; copied before training goes on."""
    check: Callable[[], None] = lambda: None
    """What every rank checks before rank 0 writes."""
    write: Callable[[CheckpointFiles], None] = lambda files: None
    """What rank 0 alone writes."""
    facts: Any = None
    """What rank 0 gets from every rank when all have written: of plain types, since a
    class takes as long again to read, once for each rank."""


class Section:
    """A part of a checkpoint, of one run. `gather` and `load` are collective."""

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    """The files and folders of the section, at the top of a checkpoint."""
    required: ClassVar[tuple[str, ...]] = ()
    """Those that every checkpoint with this section has."""

    def gather(self, step: int) -> Gathered:
        """What this rank is to write."""
        raise NotImplementedError

    def finish(self, files: CheckpointFiles, facts: list[Any]) -> None:
        """Rank 0 writes what follows from the `facts` of all ranks, in their order."""

    def load(self, saved: SavedCheckpoint) -> None:
        """Restore what was saved. Raises `UserError`."""


@dataclass
class EngineSection(Section):
    """fp32 master weights, optimizer state and counters, by any number of ranks at any ZeRO stage.

    With the number of ranks that saved them the run continues bit for bit. With another
    one master weights, moments and step counts are the same to the bit, but sums over ranks
    round differently.
    """

    name = "engine"
    files = (ENGINE_TAG,)
    required = (ENGINE_TAG,)

    engine: zero.Engine

    def gather(self, step: int) -> Gathered:
        held = shards.partitions_of(self.engine)
        self._layout = held.layout
        shard = RankShard.of_engine(torch.distributed.get_rank(), held)
        return Gathered(rank_tensors(held), facts=tuple(shard))

    def finish(self, files: CheckpointFiles, facts: list[Any]) -> None:
        of_ranks = [RankShard(*shard) for shard in facts]
        common = of_ranks[0].layout
        different = [shard.rank for shard in of_ranks if shard.layout != common]
        if different:
            raise RunError(
                f"ranks {different} trained other parameters or with other settings than rank 0"
            )
        table = EngineShards.of(Path(ENGINE_TAG), self._layout, of_ranks)
        with files.file(f"{ENGINE_TAG}/{INDEX_FILE}") as path:
            table.write_table(path)

    def load(self, saved: SavedCheckpoint) -> None:
        shards.restore(self.engine, saved.shards)


@dataclass
class RandomSection(Section):
    """The random states of every rank, uint8 (bytes,), in its file."""

    name = "random"

    state: TrainerState

    def gather(self, step: int) -> Gathered:
        states = {f"{RNG}.cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states[f"{RNG}.cuda"] = torch.cuda.get_rng_state()
        return Gathered(states)

    def load(self, saved: SavedCheckpoint) -> None:
        rank = saved.ranks.rank
        if rank >= len(saved.shards.files):
            self._seed(rank)
            return
        with malformed(saved.path):
            states = saved.shards.random_states(rank)
            # Copies: torch reads whole words, which a mapped file does not align
            torch.set_rng_state(states["cpu"].clone())
            if "cuda" in states and torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"].clone())

    def _seed(self, rank: int) -> None:
        """Where fewer ranks saved the checkpoint: dropout draws other masks, the same
        at every resume."""
        text = f"{self.state.identity}/{self.state.step}/{rank}"
        digest = hashlib.sha256(text.encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass
class StateSection(Section):
    """How far the run has come: the step, the position in the data, the learning-rate
    scheduler. Who resumes reads the state first, to compare its identity."""

    name = "state"
    files = (STATE_FILE,)
    required = (STATE_FILE,)

    engine: zero.Engine
    state: TrainerState

    def gather(self, step: int) -> Gathered:
        self.state.step = step
        self.state.scheduler = scheduler_state(self.engine.lr_scheduler)
        # A copy, since training goes on while it is written
        content = asdict(self.state)
        return Gathered(write=lambda files: files.json(STATE_FILE, content))

    def load(self, saved: SavedCheckpoint) -> None:
        self.state.world_size = saved.ranks.world
        scheduler = self.engine.lr_scheduler
        if scheduler is None or self.state.scheduler is None:
            return
        scheduler.load_state_dict(self.state.scheduler)
        # The next step uses these learning rates: the scheduler itself sets others only
        # after it.
        groups = self.engine.optimizer.param_groups
        for group, rate in zip(groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate


@dataclass
class LedgerSection(Section):
    """The merge ledger, a copy of the run's own: hard links where the storage has
    them."""

    name = "ledger"
    files = (LEDGER_FOLDER,)
    required = (LEDGER_FOLDER,)

    remora: ReMoRA

    def gather(self, step: int) -> Gathered:
        ledger = self.remora.ledger.snapshot()
        self.remora.sums.keep = ledger.head
        return Gathered(
            check=lambda: _check_cycles(ledger),
            write=lambda files: _write_ledger(files, ledger),
        )

    def load(self, saved: SavedCheckpoint) -> None:
        """Rank 0 writes the run's ledger: links to the files that the check of the
        checkpoint has hashed, or copies that it hashes."""
        ledger = self.remora.ledger
        folder = ledger.folder
        fingerprint = ledger.base_fingerprint

        def write() -> None:
            there = saved.local(LEDGER_FOLDER)
            Ledger.open(there, fingerprint, hashes=False).copy_to(folder)

        write_on_rank0(saved.ranks, "writing of the merge ledger", folder, write)
        self.remora.ledger = saved.ranks.agree(
            "merge ledger", lambda: Ledger.open(folder, fingerprint, hashes=False)
        )
        self.remora.sums.keep = self.remora.ledger.head


def _check_cycles(ledger: Ledger) -> None:
    """Raises `RunError` where a cycle is damaged, of those that this rank checks. They
    are older than the checkpoint, whose manifest would list damaged files as intact."""
    rank = torch.distributed.get_rank()
    for record in ledger.records[rank :: torch.distributed.get_world_size()]:
        path = ledger.folder / record.file
        if problem := file_problem(path, record.size, record.sha256):
            raise RunError(
                f"the ledger was damaged during the run: {problem}. Resume from an older checkpoint"
            )


def _write_ledger(files: CheckpointFiles, ledger: Ledger) -> None:
    for record in ledger.records:
        facts = {"size": record.size, "sha256": record.sha256}
        source = ledger.folder / record.file
        files.put(f"{LEDGER_FOLDER}/{record.file}", source, facts)
    files.json(f"{LEDGER_FOLDER}/{LEDGER_FILE}", ledger.to_dict())


@dataclass
class AdapterSection(Section):
    """The adapter's matrices and other trained tensors, as an export reads them, what
    its base is, and the logits of a probe."""

    name = "adapter"
    files = (ADAPTER_JSON, ADAPTER_TENSORS, BASE_JSON, PROBE_FILE)
    required = (ADAPTER_JSON, ADAPTER_TENSORS, BASE_JSON)

    remora: ReMoRA
    reference: BaseReference
    facts: JsonObject
    """Further entries of adapter.json."""
    probe: Callable[[], Tensors]
    """The tokens and logits of the probe. Collective."""

    def gather(self, step: int) -> Gathered:
        """Onto rank 0, one matrix at a time."""
        model = self.remora.engine.module
        layers = mora_layers(model)
        domains = domain_layers(model)
        mora_matrices = _collect_on_rank0(
            (name, layer.unshard(zero.full_fp32(layer.adapter_weight)))
            for name, layer in layers.items()
        )
        # Embeddings, norms and head, each tied one by its first name
        adapted = adapter_parameter_names(model)
        trained = _collect_on_rank0(
            (name, zero.full_fp32(value))
            for name, value in model.named_parameters()
            if name not in adapted
        )
        domain_mora_matrices = _collect_on_rank0(
            (name, zero.full_fp32(layer.domain_mora_matrices))
            for name, layer in domains.items()
        )
        probe = self.probe()
        of_domains = None
        if domains:
            operators = {name: layer.own_spec for name, layer in domains.items()}
            of_domains = DomainMatrices(domains_of(model).names, operators)
        adapter = AdapterFile(
            layers=layer_entries(model),
            config=self.remora.config,
            dtype=self.reference.dtype,
            cycle=self.remora.cycle,
            step=step,
            trainables=tuple(trained),
            domains=of_domains,
            facts=self.facts,
        )

        def write(files: CheckpointFiles) -> None:
            tensors = adapter_tensors(
                adapter, mora_matrices, trained, domain_mora_matrices
            )
            files.tensors(ADAPTER_TENSORS, tensors, {"step": str(step)})
            files.json(ADAPTER_JSON, adapter.to_dict())
            files.json(BASE_JSON, self.reference.to_dict())
            files.tensors(PROBE_FILE, probe, {"dtype": self.reference.dtype})

        return Gathered(write=write)

    def load(self, saved: SavedCheckpoint) -> None:
        """Set the operators of the checkpoint's cycle, and what is fixed of its weights.
        What is trained comes from the engine's shards. Raises `UserError` where it has other operators than this
        model."""
        model = self.remora.engine.module
        adapter = read_adapter(saved.local(ADAPTER_JSON).parent)
        set_cycle(model, self.remora.config, adapter.cycle)
        layers = mora_layers(model)
        # With another operator the same matrix is another update
        for name in different_keys(adapter.layers, layer_entries(model)):
            raise UserError(
                f"{saved.path / ADAPTER_JSON}: {name} has another operator there than in this model, or is not adapted "
                "in both"
            )
        if any(layer.fixed is not None for layer in layers.values()):
            tensors = AdapterTensors(saved.local(ADAPTER_TENSORS).parent, adapter)
            for name, layer in layers.items():
                layer.set_fixed(tensors.mora_matrix(name))


@dataclass
class TokenizerSection(Section):
    """The tokenizer's folder. The start of a run takes it, before there is a model."""

    name = "tokenizer"
    files = (TOKENIZER_FOLDER,)

    folder: Path | None
    """None where the run has no tokenizer."""

    def gather(self, step: int) -> Gathered:
        return Gathered(write=self._write)

    def _write(self, files: CheckpointFiles) -> None:
        if self.folder is None:
            return
        require_plain(self.folder)
        for source in sorted(filter(Path.is_file, self.folder.rglob("*"))):
            name = source.relative_to(self.folder).as_posix()
            # Copied, not linked: a file that is damaged would be so in every checkpoint
            with files.file(f"{TOKENIZER_FOLDER}/{name}") as path:
                shutil.copyfile(source, path)
                times = source.stat()
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def adapter_sections(
    adapter: AdapterSection, state: TrainerState, tokenizer: Path | None
) -> list[Section]:
    """What a checkpoint of an adapter's training has, in the order in which it is
    restored."""
    engine = adapter.remora.engine
    return [
        LedgerSection(adapter.remora),
        adapter,
        *full_sections(engine, state),
        TokenizerSection(tokenizer),
    ]


def full_sections(engine: zero.Engine, state: TrainerState) -> list[Section]:
    """What a checkpoint of full training has."""
    return [EngineSection(engine), RandomSection(state), StateSection(engine, state)]


def scheduler_state(scheduler: Any) -> JsonObject | None:
    """The state of an engine's scheduler for trainer_state.json; None without a
    scheduler. Raises `UserError` for a state that JSON does not give back as it was."""
    if scheduler is None:
        return None
    state: JsonObject = scheduler.state_dict()
    try:
        comes_back = json.loads(json.dumps(state, allow_nan=False)) == state
    except (TypeError, ValueError):
        comes_back = False
    if not comes_back:
        raise UserError(
            f"initialize: the state of `lr_scheduler`, a {type(scheduler).__name__}, does not fit in a checkpoint: "
            'take LambdaLR of torch, or set "lr" of engine.optimizer.param_groups in each step'
        )
    return state


def _collect_on_rank0(tensors: Iterable[tuple[str, Tensor]]) -> Tensors:
    """{name: copy in host memory} on rank 0, nothing on other ranks. `tensors` may
    gather each one as it is asked for, so that all ranks go through them."""
    is_rank0 = torch.distributed.get_rank() == 0
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors if is_rank0}
