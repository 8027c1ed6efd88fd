"""What tensors are called in a model's files and in the live model, where transformers
changes that as it loads them.

    renamed_keys      it only renames a tensor
    stacked_files     it puts the experts of a mixture, a tensor each, into one: the key of a stack names them all

A key of a stack has * for the number of the expert, and several patterns joined by +
where their rows follow each other: "layers.0.experts.*.w1.weight +
layers.0.experts.*.w3.weight".
"""

import re
from collections.abc import Container, Iterable, Iterator
from typing import Any

_JOIN = " + "
_EXPERT = re.compile(r"(.*\.experts\.)\d+(\..*)")


def is_stack(key: str) -> bool:
    """Whether a key names a stack of experts."""
    return "*" in key


def members_of(key: str, known: Container[str]) -> list[list[str]]:
    """The keys of a stack's tensors among the `known` ones: for each expert from 0 on,
    those whose rows follow each other. Empty where there are none."""
    sides = [pattern.partition("*") for pattern in key.split(_JOIN)]
    members: list[list[str]] = []
    while True:
        names = [f"{before}{len(members)}{after}" for before, _, after in sides]
        if not all(name in known for name in names):
            return members
        members.append(names)


def renamed_keys(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Name in the live model -> key, for tensors that are only renamed at load.

    For example GPT-NeoX: {"lm_head.weight": "embed_out.weight"}. Not tensors that are
    fused or split at load.
    """
    return {
        name: key
        for key, name, converter, _ in _as_loaded(model, keys)
        if converter is None and name != key
    }


def stacked_files(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Name in the live model -> key of the stack, for experts that transformers puts
    into one tensor when it loads `model`: one after the other, and the rows of gate and
    up of each below each other.

    Not what it transposes or interleaves. That it did no more is for
    `verify_against_model` to say.
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
    """Whether a converter (core_model_loading.py, `WeightConverter.operations`) stacks
    tensors, and does nothing else but to put the rows of several below each other."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    wanted: list[tuple[type, int]] = [(MergeModulelist, 0)]
    if len(converter.source_patterns) > 1:
        wanted.append((Concatenate, 1))
    operations = converter.operations
    return wanted == [(type(item), getattr(item, "dim", None)) for item in operations]


def _as_loaded(model: Any, keys: Iterable[str]) -> Iterator[tuple[str, str, Any, str]]:
    """(key, live name, the converter that takes it or None, the pattern by which)."""
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
