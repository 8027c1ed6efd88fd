"""Registers MoRA as a PEFT method.

`peft.utils.register_peft_method` accepts only members of `PeftType`, an enum in PEFT's
source, so a member is added first. Its name, MORA_DS, does not conflict with a MORA that
PEFT may add.
"""

from typing import Any

from peft.utils import PeftType, register_peft_method

PEFT_TYPE = "MORA_DS"
"""`peft_type` in adapter_config.json."""

PREFIX = "mora_"
"""Prefix of the method's parameter names."""


def register(config: Any, model: Any) -> None:
    """Register the method for `get_peft_model` and `PeftModel.from_pretrained`."""
    if PEFT_TYPE in PeftType.__members__:
        return
    # Python has no public way to add a member to an enum. Members of this one are
    # strings that equal their names.
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = member._value_ = PEFT_TYPE
    setattr(PeftType, PEFT_TYPE, member)
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    register_peft_method(
        name=PEFT_TYPE.lower(), config_cls=config, model_cls=model, prefix=PREFIX
    )
