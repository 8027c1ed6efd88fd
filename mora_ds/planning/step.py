"""Memory of one micro-batch, counted on the meta device.

    config -> model on the meta device, injected, split over t ranks -> forward and backward under a `MemoryMeter`

Nothing is estimated: the run's own code allocates and its storages are counted, without
memory behind them. So the figures hold for any model that trains, and follow every
change of the layers, the loss and checkpointing.
"""

from __future__ import annotations

import copy
import math
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.adapters.config import FLAGS, AdapterConfig
from mora_ds.adapters.domains import domains_of
from mora_ds.adapters.inject import inject, mora_layers, set_cycle
from mora_ds.adapters.ops import index_tables
from mora_ds.adapters.quantized import quantized_layers
from mora_ds.common.errors import UserError, named_as_flags, reason
from mora_ds.data.documents import Batch, Documents
from mora_ds.engine.device import BUFFERS
from mora_ds.models.attention import use_document_attention
from mora_ds.models.decoder_layers import stored_bytes, weights_of_layers
from mora_ds.models.load import make_model
from mora_ds.models.loss import chunk_loss, is_frozen, token_nll
from mora_ds.parallel import windows
from mora_ds.parallel.tensor_parallel import split_model
from mora_ds.parallel.topology import Topology
from mora_ds.planning.memory_meter import MemoryMeter, fused_attention


@dataclass(frozen=True)
class Work:
    """The model and the settings of one micro-batch on one rank."""

    config: Any
    """A config of transformers."""
    adapter: AdapterConfig | None
    """None for full training."""
    seq_len: int
    micro_batch: int = 1
    """Rows of a rank, or of a group of ranks that shares them."""
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = False
    tensor_parallel: int = 1
    sequence_parallel: int = 1
    document_mask: bool = True
    """Whether rows hold several documents, so that attention reads a mask."""
    attn_implementation: str | None = None
    by_documents: bool = False
    """Whether attention is document by document, planned for one document a row."""
    trust_remote_code: bool = False
    base_on_host: bool = False
    """Whether the decoder layers' frozen weights are in host memory."""

    @property
    def tokens(self) -> int:
        """Tokens that a rank computes; with tensor parallelism, a group together."""
        return self.micro_batch * self.seq_len // self.sequence_parallel

    @property
    def layers(self) -> int:
        return self.config.get_text_config().num_hidden_layers


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one micro-batch on one rank, without weights and the engine's state."""

    saved: int
    """Saved activations at the end of forward, logits and loss included."""
    peak: int
    tables: int
    """Index tables of the operators, which stay."""


class _SingleRank(Topology):
    """A rank of a tensor-parallel group alone: collectives return tensors of the
    shapes."""

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, shard: Tensor, size: int) -> Tensor:
        return shard.new_empty(size, *shard.shape[1:])

    def sum_scatter(self, full: Tensor) -> Tensor:
        start, stop = self.shard_range(len(full))
        return full[start:stop].clone()


def step_memory(work: Work) -> StepMemory:
    """The memory of a step of the complete model, from two shallow ones: every figure
    is a constant plus a multiple of the number of layers."""
    layers = work.layers
    period = layer_period(work.config)
    # By a plan of targets every layer may be different.
    is_planned = work.adapter is not None and work.adapter.planned_layers
    if layers <= 3 * period or is_planned:
        return measure_step(planned_model(work), work)
    # Both have as many layers beyond complete periods as the model has.
    short = layers % period + 2 * period
    shallow = with_layers(work, short)
    deeper = with_layers(work, short + period)
    first = measure_step(planned_model(shallow), shallow)
    second = measure_step(planned_model(deeper), deeper)
    times = (layers - short) // period
    figures = zip(astuple(first), astuple(second), strict=True)
    return StepMemory(*(start + times * (end - start) for start, end in figures))


@named_as_flags(**FLAGS)
def planned_model(work: Work) -> Any:
    """The model on the meta device, injected, as rank 0 of its group has it. Raises
    `UserError` as `inject` does."""
    with torch.device("meta"):
        model = make_model(
            work.config,
            "the model",
            dtype=work.dtype,
            attn_implementation=work.attn_implementation,
            trust_remote_code=work.trust_remote_code,
        )
    if work.by_documents:
        use_document_attention(model)
    if work.checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    if work.adapter is not None:
        inject(model, work.adapter)
        domains = domains_of(model)
        if domains.names:
            # From the first merge on a row uses two matrices of other operators.
            set_cycle(model, work.adapter, 1)
            domains.set([domains.names[0]] * work.micro_batch)
        for layer in quantized_layers(model).values():
            # From the first merge on a layer in 4 bits keeps what was merged.
            if layer.is_packed:
                adapter_weight = layer.unshard(layer.adapter_weight.detach())
                layer.set_merged([(layer.spec, adapter_weight)])
    if work.tensor_parallel > 1:
        split_model(model, _SingleRank(work.tensor_parallel, 0, None))
    if is_frozen(model.get_output_embeddings()):
        chunk_loss(model)
    return model.train()


def measure_step(model: nn.Module, work: Work) -> StepMemory:
    """The memory of forward and backward of one micro-batch. Raises `UserError` for a
    model that the meta device cannot run."""
    _clear_tables()
    batch = _batch(work)
    # ZeRO moves each gradient into its bucket at once.
    handles = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
        for parameter in model.parameters()
    ]
    merged = [
        value for layer in mora_layers(model).values() for _, value in layer.merged
    ]
    rows = [tensor for tensor in batch.values() if isinstance(tensor, Tensor)]
    known = (*model.parameters(), *model.buffers(), *merged, *rows)
    try:
        with (
            MemoryMeter(known, answer=not work.document_mask) as meter,
            fused_attention(),
        ):
            # The first pass makes the tables; the peak is that of the second one alone.
            with torch.no_grad():
                token_nll(model, batch)
            lasting = meter.live
            meter.peak = lasting
            loss = token_nll(model, batch)
            saved = meter.live
            loss.backward()
            del loss
    except UserError:
        raise
    # Some kernels torch has for real devices alone.
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"this model cannot be planned (--dry_run, mora-ds plan) in {work.dtype}, --bf16 may help: {reason(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    _clear_tables()
    return StepMemory(saved - lasting, meter.peak - lasting, lasting)


@torch.no_grad()
def measure_merge(model: nn.Module) -> int:
    """Peak bytes while the largest layer is merged, as `ReMoRA.merge` does it."""
    layers = mora_layers(model).values()
    if not layers:
        return 0
    layer = max(layers, key=lambda candidate: math.prod(candidate.shape))
    # It is memory-mapped from a file, and takes no memory of its own.
    original = torch.empty(layer.shape, dtype=layer.dtype, device="meta")
    with MemoryMeter((original, *model.parameters(), *model.buffers())) as meter:
        value = torch.empty(
            layer.spec.adapter_weight_shape, dtype=torch.float32, device="meta"
        )
        layer.merge(original, [(layer.spec, value)], value)
    _clear_tables()
    return meter.peak


def base_bytes(model: nn.Module) -> int:
    """Bytes of the frozen base and of other buffers, such as rotary frequencies."""
    return sum({id(tensor): tensor.nbytes for tensor in model.buffers()}.values())


@dataclass(frozen=True)
class Streamed:
    """The frozen weights in host memory, and what a device has of them
    (`layer_prefetcher`)."""

    layers: tuple[int, ...]
    """Bytes of each decoder layer's."""
    buffers: int
    slot: int
    """Bytes of a buffer."""

    @classmethod
    def of(cls, model: nn.Module) -> Streamed:
        """Raise `UserError` for a model whose decoder layers are not found."""
        sizes = []
        slots = []
        for tensors in weights_of_layers(model).values():
            by_id = {id(tensor): tensor.nbytes for tensor in tensors.values()}
            sizes.append(sum(by_id.values()))
            slots.append(stored_bytes(list(tensors.values())))
        return cls(tuple(sizes), min(BUFFERS, len(sizes)), max(slots))

    @property
    def total(self) -> int:
        return sum(self.layers)

    @property
    def on_device(self) -> int:
        return self.buffers * self.slot

    @property
    def copied(self) -> int:
        """Bytes copied in a micro-batch, forward and backward. The layers with which a
        pass begins are there already, from the end of the other pass."""
        return sum(self.layers[self.buffers :]) + sum(self.layers[: -self.buffers])


NOTHING_STREAMED = Streamed((), 0, 0)


def with_layers(work: Work, layers: int) -> Work:
    """The same work for a model of fewer layers. Lists with an entry a layer are
    cut."""
    config = copy.deepcopy(work.config)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == work.layers:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return replace(work, config=config)


def layer_period(config: Any) -> int:
    """After how many layers the kinds of layers repeat; if they do not, the number of
    all."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or [""] * text.num_hidden_layers
    # By these settings some layers have experts, and others have none.
    names = ("mlp_only_layers", "first_k_dense_replace")
    sparse_step = getattr(text, "decoder_sparse_step", None) or 1
    if sparse_step > 1 or any(getattr(text, name, None) for name in names):
        return len(kinds)
    for size in range(1, len(kinds)):
        if kinds[size:] == kinds[:-size]:
            return size
    return len(kinds)


def _batch(work: Work) -> Batch:
    # Ulysses exchanges tokens for heads: attention keeps as many bytes as that of the
    # rank's tokens with all heads.
    length = work.seq_len // work.sequence_parallel
    ids = torch.empty(work.micro_batch, length, dtype=torch.long, device="meta")
    documents = Documents.one_per_sequence(work.micro_batch, length, ids.device)
    rows = {
        "input_ids": ids,
        "position_ids": torch.empty_like(ids),
        "labels": torch.empty_like(ids),
    }
    return {**rows, "documents": documents}


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _clear_tables() -> None:
    """Drops cached index tables, so that the next measurement makes and counts them."""
    index_tables.clear_tables()
    windows.tables_of_window.cache_clear()
