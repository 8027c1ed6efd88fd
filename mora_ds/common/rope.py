"""Settings of rotary position embeddings by transformers' own keys: of --rope_scaling,
and of a config."""

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
"""rope_type -> its keys besides rope_theta (transformers 5.24,
modeling_rope_utils.py)."""

_NEEDED = {"factor", "low_freq_factor", "high_freq_factor"}
"""Keys that a rope_type cannot be without, if it has them."""

_POSITIVE = Annotated[float, POSITIVE]
_HINTS: dict[str, Any] = {
    "factor": Annotated[float, Bounds(least=1)],
    "original_max_position_embeddings": Annotated[int, COUNT],
    "truncate": bool,
}


def rope_settings(text: str) -> dict[str, Any]:
    """The keys in the JSON of --rope_scaling. Raises `UserError`."""
    settings = plain_json(text, FLAG)
    check_settings(settings, FLAG)
    return dict(settings)


def check_settings(settings: Any, where: str, *, is_of_config: bool = False) -> None:
    """Raise `UserError`, after the words `where`, for a rope_type that is not known,
    and for keys that it does not have, lacks, or has other values of. `is_of_config`:
    they are all that a model's config says, rope_theta too."""
    named = settings.get("rope_type") if isinstance(settings, dict) else settings
    kind = str(named)[:99]
    if kind not in _KEYS:
        raise UserError(f"{where}: {unknown('rope_type', kind, _KEYS)}")
    known = {"rope_type", "rope_theta", *_KEYS[kind]}
    needed = known & _NEEDED or {"rope_theta"}
    if is_of_config:
        # --rope_scaling leaves it as it is
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
