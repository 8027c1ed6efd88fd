"""Names of tensors in a model's files and in the model in memory, which differ if
transformers converts tensors at load.

    renamed_keys      tensors that are only renamed
    stacked_files     experts of a mixture, stored as a tensor each, that are stacked to one tensor

The key of a stack has * in place of the expert's number. Tensors whose rows are
concatenated are joined by +: "layers.0.experts.*.w1.weight + layers.0.experts.*.w3.weight".
"""

import re
from collections.abc import Container, Iterable, Iterator
from typing import Any

_JOIN = " + "
_EXPERT = re.compile(r"(.*\.experts\.)\d+(\..*)")


def is_stack(key: str) -> bool:
    """Whether this is the key of a stack of experts."""
    return "*" in key


def members_of(key: str, known: Container[str]) -> list[list[str]]:
    """The keys of a stack's tensors among `known` keys: for each expert, from 0 on,
    those that are concatenated along their rows. Empty if there are none."""
    sides = [pattern.partition("*") for pattern in key.split(_JOIN)]
    members: list[list[str]] = []
    while True:
        names = [f"{before}{len(members)}{after}" for before, _, after in sides]
        if not all(name in known for name in names):
            return members
        members.append(names)


def renamed_keys(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Name in the model -> key, for tensors that are only renamed at load, not fused or
    split. For example GPT-NeoX: {"lm_head.weight": "embed_out.weight"}."""
    return {
        name: key
        for key, name, converter, _ in _as_loaded(model, keys)
        if converter is None and name != key
    }


def stacked_files(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Name in the model -> key of the stack, for experts that transformers stacks to one
    tensor when it loads `model`, with the rows of an expert's gate and up concatenated.

    Excludes tensors that are transposed or interleaved. `verify_against_model` checks
    that the values are unchanged.
    """
    by_pattern: dict[str, dict[str, str]] = {}
    orders: dict[str, list[str]] = {}
    for key, name, converter, pattern in _as_loaded(model, keys):
        expert = _EXPERT.fullmatch(key)
        if converter is not None and expert is not None and _only_stacks(converter):
            by_pattern.setdefault(name, {})[pattern] = "*".join(expert.groups())
            orders[name] = converter.source_patterns
    return {
        name: _JOIN.join(keys_of[pattern] for pattern in orders[name])
        for name, keys_of in by_pattern.items()
        if len(keys_of) == len(orders[name])
    }


def _only_stacks(converter: Any) -> bool:
    """Whether a converter (core_model_loading.py, `WeightConverter.operations`) only
    stacks tensors and concatenates rows."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    wanted: list[tuple[type, int]] = [(MergeModulelist, 0)]
    if len(converter.source_patterns) > 1:
        wanted.append((Concatenate, 1))
    operations = converter.operations
    return wanted == [(type(item), getattr(item, "dim", None)) for item in operations]


def _as_loaded(model: Any, keys: Iterable[str]) -> Iterator[tuple[str, str, Any, str]]:
    """(key, name in the model, converter or None, pattern of the converter) for each
    key."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern: dict[str | None, Any] = {}
    for converter in converters:
        by_pattern.update(dict.fromkeys(converter.source_patterns, converter))
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters)
        yield key, name, by_pattern.get(pattern), pattern or ""
