"""MoRA and ReMoRA in Hugging Face's `transformers.Trainer` and trl's trainers. Needs the
extra `hf`.

    class Trainer(MoRATrainer, transformers.Trainer): ...

    Trainer(model, args, train_dataset=data, mora=MoRAConfig(rank=8),
            callbacks=[MoRACallback(merge_every=500)]).train()

trainer        the mixin: engine, checkpoints, resume, merged model
callback       steps of merges, and the re-warmup of the learning rate
options        checks of `TrainingArguments`
"""

from mora_ds.hf.callback import MoRACallback
from mora_ds.hf.trainer import MoRATrainer, load_model

__all__ = ["MoRACallback", "MoRATrainer", "load_model"]
