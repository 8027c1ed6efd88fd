"""Rotary position embeddings other than those of a base's config.json: --rope_scaling.

    settings -> rope_changes -> the settings of the text config that become others ->
    changed, before the model is made

From transformers 5 on a model computes its frequencies when it is made, and never looks
at its config again. The changes go into base.json, since the base's own config.json
stays as it is: exports and `load_adapter` make them again.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from mora_ds.common.errors import COUNT, UserError, reason
from mora_ds.common.files import JsonObject
from mora_ds.common.rope import FLAG, check_settings
from mora_ds.common.untrusted import shown, typed

_PARAMETERS = "rope_parameters"
_LONGEST = "max_position_embeddings"
_ORIGINAL = "original_max_position_embeddings"


def rope_changes(config: Any, settings: Mapping[str, Any] | None) -> JsonObject:
    """{name: value} of the text config of a model with `settings` (`rope_settings`).

    Raises `UserError` for a model without rotary embeddings, and for one whose kinds of
    layers have their own.
    """
    if settings is None:
        return {}
    text = config.get_text_config()
    before = getattr(text, _PARAMETERS, None) or {}
    if "rope_theta" not in before:
        raise UserError(
            f"{FLAG}: a {config.model_type} model has no rotary embeddings that are one for all layers"
        )
    scaled = {"rope_theta": before["rope_theta"], **settings}
    if "partial_rotary_factor" in before:
        scaled["partial_rotary_factor"] = before["partial_rotary_factor"]
    if settings["rope_type"] not in ("yarn", "llama3"):
        # Of other kinds transformers reads the original number from
        # max_position_embeddings
        return {_PARAMETERS: scaled}
    scaled.setdefault(_ORIGINAL, getattr(text, _LONGEST))
    return {_PARAMETERS: scaled, _LONGEST: int(scaled[_ORIGINAL] * scaled["factor"])}


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """`config` itself, in which the text config has the `changes`."""
    config.get_text_config().update(copy.deepcopy(changes))
    return config


def check_used(model: Any, rope_type: str) -> None:
    """Raise `UserError` where the model does not compute such rotary embeddings, or its
    config would be refused in a config.json. Its tensors may be on the meta device."""
    text = model.config.get_text_config()
    try:
        text.validate_rope()
    except Exception as error:
        # Classes of configs have checks of their own, which raise errors of many kinds
        raise UserError(
            f"{FLAG}: a {text.model_type} model cannot have these: {reason(error)}"
        ) from error
    if rope_type not in [
        getattr(module, "rope_type", None) for module in model.modules()
    ]:
        raise UserError(
            f"{FLAG}: a {text.model_type} model ignores rope_type {rope_type}"
        )


def longest_row(config: Any) -> int | None:
    """How many positions a model has been made for; None where its config does not say.

    max_position_embeddings counts them without the factor where the scaling is linear
    or dynamic: transformers' and vLLM's reading.
    """
    text = config.get_text_config()
    longest: int | None = getattr(text, _LONGEST, None)
    parameters = getattr(text, _PARAMETERS, None) or {}
    is_without = parameters.get("rope_type") in ("linear", "dynamic")
    if longest is None or not is_without:
        return longest
    return int(longest * parameters["factor"])


def changes_of(config: Any, folder: Path) -> JsonObject:
    """What `rope_changes` has changed in a live config, against the base's folder."""
    live = config.get_text_config().to_dict()
    stored = type(config).from_pretrained(folder).get_text_config().to_dict()
    names = (_PARAMETERS, _LONGEST)
    return {name: live[name] for name in names if live.get(name) != stored.get(name)}


def check_changes(changes: Mapping[str, Any]) -> None:
    """Raise `UserError` for anything that `rope_changes` cannot have returned: a
    base.json may come from anybody, and must not set other attributes of a config, such
    as auto_map, which names code."""
    for name, value in changes.items():
        where = f"config_changes: {name}"
        if name == _PARAMETERS:
            check_settings(value, where, is_of_config=True)
        elif name == _LONGEST:
            typed(Annotated[int, COUNT], value, where)
        else:
            raise UserError(f"config_changes: unknown key {shown(name)}")


def change_file(content: JsonObject, changes: Mapping[str, Any]) -> None:
    """Make the `changes` in the `content` of a base's config.json."""
    text = content.get("text_config", content)
    text.update(changes)
    # Servers read the names of transformers 4
    if parameters := changes.get(_PARAMETERS):
        text["rope_scaling"] = parameters
        text["rope_theta"] = parameters["rope_theta"]
