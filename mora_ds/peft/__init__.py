"""MoRA as a method of Hugging Face's PEFT, on one process or under DDP. Needs the extra
`peft`.

    import mora_ds.peft                                                    registers the method
    model = get_peft_model(model, mora_ds.peft.MoraConfig(r=8))
    model.save_pretrained(folder); PeftModel.from_pretrained(base, folder); model.merge_and_unload()

config, model   the method: the operators of `adapters.ops` in PEFT's layers
register        PEFT's list of methods
"""

from mora_ds.peft.config import MoraConfig
from mora_ds.peft.model import MoraModel
from mora_ds.peft.register import PEFT_TYPE, register

register(MoraConfig, MoraModel)

__all__ = ["PEFT_TYPE", "MoraConfig", "MoraModel"]
