"""Hugging Face's Trainer: MoRA and ReMoRA within `transformers.Trainer` and trl's
trainers. Needs the extra `hf`.

    class Trainer(MoRATrainer, transformers.Trainer): ... Trainer(model, args,
    train_dataset=data, mora=MoRAConfig(rank=8),
    callbacks=[MoRACallback(merge_every=500)]).train()

trainer        the mixin: engine, checkpoints, resume, merged model
callback       when merges are due, and what they do to the learning rate
options        options of `TrainingArguments` that cannot be honoured
"""

from mora_ds.hf.callback import MoRACallback
from mora_ds.hf.trainer import MoRATrainer, load_model

__all__ = ["MoRACallback", "MoRATrainer", "load_model"]
