"""--rope_scaling: changes the rotary position embeddings of a base's config.json.

    settings -> rope_changes -> changes of the text config -> with_changes(config, changes), before the model is created

Since transformers 5 a model computes its frequencies when it is created, and later
ignores its config. The changes are saved in base.json, because the base's config.json is
never modified; exports and `load_adapter` apply them again.
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
    """{name: value}: the changes of a text config for `settings` (`rope_settings`).

    Raises `UserError` for a model without rotary embeddings, and for a model whose
    layer types have different ones.
    """
    if settings is None:
        return {}
    text = config.get_text_config()
    before = getattr(text, _PARAMETERS, None) or {}
    if "rope_theta" not in before:
        raise UserError(
            f"{FLAG}: a {config.model_type} model has no rotary embeddings that are the same in all layers"
        )
    scaled = {"rope_theta": before["rope_theta"], **settings}
    if "partial_rotary_factor" in before:
        scaled["partial_rotary_factor"] = before["partial_rotary_factor"]
    if settings["rope_type"] not in ("yarn", "llama3"):
        # For other types transformers reads the original number from
        # max_position_embeddings
        return {_PARAMETERS: scaled}
    scaled.setdefault(_ORIGINAL, getattr(text, _LONGEST))
    return {_PARAMETERS: scaled, _LONGEST: int(scaled[_ORIGINAL] * scaled["factor"])}


def with_changes(config: Any, changes: Mapping[str, Any]) -> Any:
    """Apply the `changes` to the text config of `config`, in place, and return
    `config`."""
    config.get_text_config().update(copy.deepcopy(changes))
    return config


def check_used(model: Any, rope_type: str) -> None:
    """Raise `UserError` if the model ignores this rope_type, or if its config is
    invalid for transformers. The model may be on the meta device."""
    text = model.config.get_text_config()
    try:
        text.validate_rope()
    except Exception as error:
        # The checks of config classes raise any error
        raise UserError(
            f"{FLAG}: not valid for a {text.model_type} model: {reason(error)}"
        ) from error
    if rope_type not in [
        getattr(module, "rope_type", None) for module in model.modules()
    ]:
        raise UserError(
            f"{FLAG}: a {text.model_type} model ignores rope_type {rope_type}"
        )


def max_positions(config: Any) -> int | None:
    """The maximum sequence length of a model; None if its config does not have it.

    For linear and dynamic scaling max_position_embeddings does not include the factor,
    as in transformers and vLLM.
    """
    text = config.get_text_config()
    positions: int | None = getattr(text, _LONGEST, None)
    parameters = getattr(text, _PARAMETERS, None) or {}
    excludes_factor = parameters.get("rope_type") in ("linear", "dynamic")
    if positions is None or not excludes_factor:
        return positions
    return int(positions * parameters["factor"])


def changes_of(config: Any, folder: Path) -> JsonObject:
    """The differences between the config of a model in memory and the base's folder, in
    the settings that `rope_changes` changes."""
    current = config.get_text_config().to_dict()
    stored = type(config).from_pretrained(folder).get_text_config().to_dict()
    return {
        name: current[name]
        for name in (_PARAMETERS, _LONGEST)
        if current.get(name) != stored.get(name)
    }


def check_changes(changes: Mapping[str, Any]) -> None:
    """Raise `UserError` for changes that `rope_changes` cannot return. A base.json may be
    untrusted, and must not set other settings of a config, such as auto_map, which
    names code."""
    for name, value in changes.items():
        where = f"config_changes: {name}"
        if name == _PARAMETERS:
            check_settings(value, where, is_of_config=True)
        elif name == _LONGEST:
            typed(Annotated[int, COUNT], value, where)
        else:
            raise UserError(f"config_changes: unknown key {shown(name)}")


def change_file(content: JsonObject, changes: Mapping[str, Any]) -> None:
    """Apply the `changes` to the `content` of a base's config.json, in place."""
    text = content.get("text_config", content)
    text.update(changes)
    # Inference servers read the names of transformers 4
    if parameters := changes.get(_PARAMETERS):
        text["rope_scaling"] = parameters
        text["rope_theta"] = parameters["rope_theta"]
