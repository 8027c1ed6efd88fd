"""What a model bound to sequence parallelism does not change, and errors before the
first step."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mora_ds.common.errors import UserError
from mora_ds.models.attention import prefer_document_attention, use_document_attention
from mora_ds.parallel.ulysses import (
    SequenceParallel,
    bind_sequence_parallel,
    check_config,
    full_sequences,
    sequence_parallel_of,
)
from mora_ds.train.preflight import check_split
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_ranks
from tests.helpers.models import FAMILIES, tiny_model, tokens
from tests.helpers.pool import run_pooled
from tests.helpers.tables import each_row, parsed

LENGTH = 24
"""Tokens a row: twice the sliding window of the tiny models."""

# -- a bound model ---------------------------------------------------------------------


def in_and_out_of_the_way():
    """A bound model, within `full_sequences`, and another model in the same process compute
    what plain ones do.
    """
    ids = tokens(3, LENGTH, seed=5)
    plain, bound_one, unbound = (
        prefer_document_attention(tiny_model("mistral", num_key_value_heads=1))
        for _ in range(3)
    )
    expected = plain(input_ids=ids, use_cache=False).logits
    sequence = bind_sequence_parallel(bound_one, 2)
    assert sequence is sequence_parallel_of(bound_one)
    assert sequence_parallel_of(unbound) is None
    positions = torch.arange(LENGTH).expand(3, -1)
    with torch.no_grad():
        local_batch = sequence.split({"input_ids": ids, "position_ids": positions})
        mine = bound_one(**local_batch, use_cache=False).logits
        wanted = sequence.split({"logits": expected})["logits"]
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-5)
        # twice: what Ulysses leaves behind must not matter
        for _ in range(2):
            with full_sequences(bound_one):
                full = bound_one(input_ids=ids, use_cache=False).logits
            assert torch.equal(full, expected)
            assert torch.equal(bound_one(**local_batch, use_cache=False).logits, mine)
        if dist.get_rank() == 0:  # alone: nobody else takes part
            alone = unbound(input_ids=ids, use_cache=False).logits
            assert torch.equal(alone, expected)


def test_unsplit_rows_and_models_that_are_not_bound():
    run_pooled(2, in_and_out_of_the_way)


def handed_to_flash_attention():
    """Largest difference of a split row's logits, with a stand-in for the kernel that reads
    its arguments.
    """
    batch = {
        "input_ids": tokens(1, LENGTH, seed=5),
        "position_ids": torch.arange(LENGTH).expand(1, -1).clone(),
    }
    batch["position_ids"][0, 7:] -= 7
    model = tiny_model("mistral")
    expected = model(**batch, use_cache=False).logits
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def kernel(module, query, key, value, mask, **options):
        assert mask is None
        assert query.shape[1:3] == (2, LENGTH)
        assert key.shape[1:3] == (1, LENGTH)
        index = torch.arange(LENGTH)
        document = (
            options["position_ids"].diff(prepend=torch.tensor([[-1]])) != 1
        ).cumsum(1)
        distance = index[:, None] - index
        seen = (
            (distance >= 0)
            & (distance < options["sliding_window"])
            & (document == document.T)
        )
        return sdpa(module, query, key, value, seen[None, None], **options)

    ALL_ATTENTION_FUNCTIONS.register("flash_attention_2", kernel)
    model.config._attn_implementation = "flash_attention_2"
    sequence = bind_sequence_parallel(model, 2)
    with torch.no_grad():
        logits = model(**sequence.split(batch), use_cache=False).logits
    return float((logits - sequence.split({"logits": expected})["logits"]).abs().max())


def test_flash_attention_gets_unsplit_rows():
    assert max(run_ranks(2, handed_to_flash_attention)) < 1e-5


# -- one rank's part, without the others -----------------------------------------------

PARTS = 2


def part_of(rank):
    """A rank of a group that is not there."""
    sequence = object.__new__(SequenceParallel)
    group = {"size": PARTS, "rank": rank, "group": "the group"}
    vars(sequence).update(group, splits=True, saw_window=False, _ulysses={})
    return sequence


def test_a_part_is_a_ranks_tokens_and_documents_stay_complete():
    ids = tokens(3, LENGTH, seed=5)
    documents = object()
    batches = [
        part_of(rank).split({"input_ids": ids, "documents": documents})
        for rank in range(PARTS)
    ]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches], dim=1), ids)
    assert all(
        batch["documents"] is documents and batch["input_ids"].is_contiguous()
        for batch in batches
    )


@pytest.mark.parametrize("rank", range(PARTS))
def test_a_layer_is_given_its_ranks_sinks_and_keeps_its_groups(rank, monkeypatch):
    sequence = part_of(rank)
    module = nn.Module()
    received = []
    module.num_key_value_groups = 2

    def split_attention(module, query, key, value, mask, **kwargs):
        module.num_key_value_groups = (
            1  # as Ulysses does where it repeats key-value heads
        )
        received.append(kwargs["s_aux"])
        if kwargs.get("fails"):
            raise ValueError
        return query.transpose(1, 2).flatten(2), None

    monkeypatch.setattr(sequence, "_ulysses_for", lambda query, key: split_attention)
    query = torch.randn(2, 4, 3, 8)
    key = torch.randn(2, 2, 3, 8)
    sinks = torch.arange(4.0)
    layer_options = {"s_aux": sinks, "position_ids": torch.arange(3).expand(2, -1)}
    split_attention.attn = None

    def attend(**more):
        arguments = {**layer_options, **more}
        return sequence.attend(lambda: None, module, query, key, key, **arguments)

    out, _ = attend()
    assert torch.equal(out, query.transpose(1, 2))
    assert torch.equal(received[0], sinks.view(PARTS, 2)[rank])
    assert module.num_key_value_groups == 2
    assert not sequence.saw_window
    with pytest.raises(ValueError):
        attend(fails=True, sliding_window=2)
    assert module.num_key_value_groups == 2
    attend()
    assert sequence.saw_window, "in any layer"
    with user_error("does not pass its attention the position_ids"):
        attend(position_ids=None)
    with user_error("has a position bias"):
        attend(position_bias=sinks)


# -- what cannot be split --------------------------------------------------------------


def config_of(kind, **values):
    return AutoConfig.for_model(kind, **{**FAMILIES.get(kind, {}), **values})


UNSPLIT = """
llama | {} | 3 | --sequence_parallel_size 3
llama | {} | 3 | 4 attention heads
llama | {num_attention_heads: 8, num_key_value_heads: 6} | 4 | 6 key-value heads
bloom | {hidden_size: 32, n_layer: 2, n_head: 4} | 2 | attention of BloomForCausalLM
mamba | {hidden_size: 32, num_hidden_layers: 2} | 2 | no number of attention heads
llama4_text | {} | 2 | layers of the type chunked_attention
gemma3_text | {rope_parameters: {full_attention: {rope_type: dynamic, rope_theta: 1.0e+6, factor: 4.0}, \
sliding_attention: {rope_type: default, rope_theta: 10000.0}}} | 2 | rope_type dynamic depend
llama | {rope_parameters: {rope_type: dynamic, rope_theta: 10000.0, factor: 2.0}} | 2 | rope_type dynamic depend
"""


@each_row("kind, values, size, message", UNSPLIT)
def test_configs_that_cannot_be_split_are_refused(kind, values, size, message):
    config = config_of(kind, **parsed(values))
    with user_error("--sequence_parallel_size") as error:
        check_config(config, int(size), None)
    assert message in str(error.value)
    check_config(config, 1, None)


def test_an_attention_that_reads_masks_is_not_split():
    with user_error(
        r"--sequence_parallel_size.*because --attn_implementation sdpa reads masks"
    ):
        check_config(config_of("llama"), 2, "sdpa")
    check_config(config_of("llama"), 1, "sdpa")


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_that_pass(family):
    for size in (2, 4):
        check_config(config_of(family), size, None)


def split_checked(kinds):
    """The message of `check_split` for each model with documents in its rows."""
    said = {}
    for kind, values in kinds.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**FAMILIES["llama"], **values})
        model = AutoModelForCausalLM.from_config(config)
        use_document_attention(model)
        engine = model
        try:
            sequence = bind_sequence_parallel(model, 2)
            check_split(engine, model, sequence, document_mask=kind != "lfm2")
            said[kind] = ""
        except UserError as error:
            said[kind] = str(error)
    return said


MIXING = parsed("""
llama: {}
lfm2: {layer_types: [conv, full_attention], block_ff_dim: 32}
deepseek_v3:
  {num_key_value_heads: 4, kv_lora_rank: 8, q_lora_rank: 8, qk_rope_head_dim: 4, qk_nope_head_dim: 4,
   v_head_dim: 16, n_routed_experts: 4, n_group: 1, topk_group: 1, num_experts_per_tok: 2,
   moe_intermediate_size: 16, first_k_dense_replace: 2}
""")
"""Kinds of models of Llama's sizes -> other settings of their configs."""


def test_models_that_cannot_be_split_fail_in_forward():
    for said in run_pooled(2, split_checked, MIXING):
        assert said["llama"] == ""
        assert "mixes tokens outside of the attention" in said["lfm2"]
        assert "keys and values have different shapes" in said["deepseek_v3"]
