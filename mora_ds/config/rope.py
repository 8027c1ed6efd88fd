"""--rope_scaling: rotary position embeddings other than those of the model's config.json, by transformers' own keys."""

from __future__ import annotations

from typing import Annotated, Any

from mora_ds.common.errors import COUNT, POSITIVE, Bounds, UserError, nearest, unknown
from mora_ds.common.untrusted import plain_json, typed

FLAG = "--rope_scaling"

_KEYS = {
    "default": ("rope_theta",),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip
"""rope_type -> its keys in transformers 5.24 (`modeling_rope_utils.py`); all have rope_theta."""

_NEEDED = {"factor", "low_freq_factor", "high_freq_factor"}
"""Keys that a rope_type cannot be without, if it has them."""

_POSITIVE = Annotated[float, POSITIVE]
_HINTS: dict[str, Any] = {
    "factor": Annotated[float, Bounds(least=1)],
    "original_max_position_embeddings": Annotated[int, COUNT],
    "truncate": bool,
}


def rope_settings(text: str) -> dict[str, Any]:
    """The keys in the JSON `text`. Raises `UserError` for a type that is not known, and for keys that it does not have,
    lacks, or has other values of."""
    settings = plain_json(text, FLAG)
    kind = str(settings.get("rope_type")) if isinstance(settings, dict) else text
    if kind not in _KEYS:
        raise UserError(unknown(f"rope_type in {FLAG}", kind, _KEYS))
    known = {"rope_type", "rope_theta", *_KEYS[kind]}
    needed = known & _NEEDED or {"rope_theta"}
    if missing := sorted(needed - settings.keys()):
        raise UserError(f"{FLAG}: rope_type {kind} needs the key {missing[0]}")
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"{FLAG}: rope_type {kind} has no key {key!r}.{nearest(key, known)}")
        if key != "rope_type":
            typed(_HINTS.get(key, _POSITIVE), value, f"{FLAG}: {key}")
    if kind == "llama3" and settings["high_freq_factor"] <= settings["low_freq_factor"]:
        raise UserError(f"{FLAG}: high_freq_factor must be above low_freq_factor")
    return dict(settings)
