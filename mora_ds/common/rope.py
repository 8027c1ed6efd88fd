"""Checks settings of rotary position embeddings, with transformers' keys, from
--rope_scaling or from a config."""

from typing import Annotated, Any

from mora_ds.common.errors import COUNT, POSITIVE, Bounds, UserError, nearest, unknown
from mora_ds.common.untrusted import plain_json, shown, typed

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
"""rope_type -> its keys in addition to rope_theta (transformers 5.24,
modeling_rope_utils.py)."""

_NEEDED = {"factor", "low_freq_factor", "high_freq_factor"}
"""Keys that are required by every rope_type that has them."""

_POSITIVE = Annotated[float, POSITIVE]
_HINTS: dict[str, Any] = {
    "factor": Annotated[float, Bounds(least=1)],
    "original_max_position_embeddings": Annotated[int, COUNT],
    "truncate": bool,
}


def rope_settings(text: str) -> dict[str, Any]:
    """Parse and check the JSON of --rope_scaling. Raises `UserError`."""
    settings = plain_json(text, FLAG)
    check_settings(settings, FLAG)
    return dict(settings)


def check_settings(settings: Any, where: str, *, is_of_config: bool = False) -> None:
    """Raise `UserError` for an unknown rope_type, and for its unknown, missing or invalid
    keys. `where`: the start of the message. `is_of_config`: the settings are those of a
    model's config, so rope_theta is required."""
    named = settings.get("rope_type") if isinstance(settings, dict) else settings
    kind = str(named)[:99]
    if kind not in _KEYS:
        raise UserError(f"{where}: {unknown('rope_type', kind, _KEYS)}")
    known = {"rope_type", "rope_theta", *_KEYS[kind]}
    needed = known & _NEEDED or {"rope_theta"}
    if is_of_config:
        # --rope_scaling does not change it
        known.add("partial_rotary_factor")
        needed.add("rope_theta")
    if missing := sorted(needed - settings.keys()):
        raise UserError(f"{where}: rope_type {kind} needs the key {missing[0]}")
    for key, value in settings.items():
        if key not in known:
            raise UserError(
                f"{where}: rope_type {kind} has no key {shown(key)}.{nearest(key, known)}"
            )
        if key != "rope_type":
            typed(_HINTS.get(key, _POSITIVE), value, f"{where}: {key}")
    if kind == "llama3" and settings["high_freq_factor"] <= settings["low_freq_factor"]:
        raise UserError(f"{where}: high_freq_factor must be above low_freq_factor")
