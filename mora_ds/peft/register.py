"""The entry of MoRA in PEFT's list of methods.

`peft.utils.register_peft_method` takes only names that `PeftType` has, an enum in
PEFT's source. The name is therefore added first. It is no other project's: a MoRA that
PEFT may get itself would be called MORA.
"""

from typing import Any

from peft.utils import PeftType, register_peft_method

PEFT_TYPE = "MORA_DS"
"""`peft_type` in adapter_config.json."""

PREFIX = "mora_"
"""Names of the method's parameters begin with it."""


def register(config: Any, model: Any) -> None:
    """Make the method known to `get_peft_model` and `PeftModel.from_pretrained`."""
    if PEFT_TYPE in PeftType.__members__:
        return
    # Python has no public way to add a member to an enum. Those of this one are texts,
    # which are their own names.
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = member._value_ = PEFT_TYPE
    setattr(PeftType, PEFT_TYPE, member)
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    register_peft_method(
        name=PEFT_TYPE.lower(), config_cls=config, model_cls=model, prefix=PREFIX
    )
