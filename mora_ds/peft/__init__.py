"""MoRA as a PEFT method, for one process or DDP. Needs the extra `peft`.

    import mora_ds.peft                                                    registers the method
    model = get_peft_model(model, mora_ds.peft.MoraConfig(r=8))
    model.save_pretrained(folder); PeftModel.from_pretrained(base, folder); model.merge_and_unload()

config, model   the operators of `adapters.ops` as layers of PEFT
conversion      an adapter as LoRA
register        registers the method with PEFT
"""

from mora_ds.peft.config import MoraConfig
from mora_ds.peft.conversion import convert_to_lora
from mora_ds.peft.model import MoraModel
from mora_ds.peft.register import PEFT_TYPE, register

register(MoraConfig, MoraModel)

__all__ = ["PEFT_TYPE", "MoraConfig", "MoraModel", "convert_to_lora"]
