"""Which models get the update of a run: those of the base's shapes, such as its
instruct model.

    base's tensors       each is in the target, in the same shape; tables of the vocabulary may have more rows there
    base's tokens        each is in the target's tokenizer, with the same id
    target's own         further tensors, rows and tokens, chat template, generation config: they stay

All of it is compared before anything is written.
"""

from collections.abc import Iterator
from pathlib import Path

from mora_ds.checkpoint.adapter_files import Adapter, BaseReference
from mora_ds.checkpoint.layout import tokenizer_of
from mora_ds.common.errors import UserError
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.load import folder_config
from mora_ds.models.vocabulary import check_same_tokens

ONTO = "`onto`"


def exported_keys(base: BaseCheckpoint, reference: BaseReference) -> Iterator[str]:
    """The base's keys without copies of a tied weight under its other name.

    Some files hold lm_head.weight although it is tied. Once the embedding is trained
    that copy is stale, and transformers unties weights that differ.
    """
    used = set(reference.keys.values())
    for key in base.keys():  # noqa: SIM118  (not a mapping)
        if key in used or key not in reference.keys:
            yield key


def open_target(
    folder: Path,
    adapter: Adapter,
    base: BaseCheckpoint,
    trust_remote_code: bool,
) -> BaseCheckpoint:
    """The model in `folder`, which is to get the update of `adapter`, of the base
    `base`. Raises `UserError` naming what does not fit, and where it is the base
    itself."""
    target = BaseCheckpoint.open(folder, ONTO)
    reference = adapter.reference
    missing = [key for key in exported_keys(base, reference) if key not in target]
    if missing:
        raise UserError(
            f"{ONTO} {folder} lacks {len(missing)} tensor(s) of {base.folder}: {', '.join(missing[:3])}"
        )
    different = list(different_shapes(target, base, reference, trust_remote_code))
    if different:
        raise UserError(
            f"{ONTO} {folder} has {len(different)} tensor(s) of another shape than {base.folder}: "
            + "; ".join(different[:3])
        )
    tokens = tokenizer_of(adapter.folder) or base.folder
    check_same_tokens(tokens, folder, ONTO, trust_remote_code)
    if target.fingerprint() == adapter.reference.fingerprint:
        raise UserError(
            f"{ONTO} {folder} holds the weights of the base itself: leave {ONTO} out"
        )
    return target


def different_shapes(
    target: BaseCheckpoint,
    base: BaseCheckpoint,
    reference: BaseReference,
    trust_remote_code: bool,
) -> Iterator[str]:
    """A line for each tensor of the target whose shape is not that of the base's. A
    table with a row for each token of the base may have one for each token of the
    target."""

    def tokens_of(model: BaseCheckpoint) -> int:
        config = folder_config(model.folder, trust_remote_code, ONTO)
        return config.get_text_config().vocab_size

    base_tokens = tokens_of(base)
    target_tokens = tokens_of(target)
    for key in target.keys():  # noqa: SIM118  (not a mapping)
        key_in_base = reference.keys.get(key, key)
        if key_in_base not in base:
            continue
        shape = target.shape_dtype(key)[0]
        expected = base.shape_dtype(key_in_base)[0]
        # A scalar has no rows
        is_table = expected[:1] == (base_tokens,) and base_tokens <= target_tokens
        if is_table and shape == (target_tokens, *expected[1:]):
            continue
        if shape != expected:
            yield f"{key} {shape}, not {expected}"
