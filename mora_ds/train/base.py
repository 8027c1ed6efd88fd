"""The base model of a run: which folder it comes from, its config, and its complete weights on this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mora_ds.checkpoint.layout import BASE_FOLDER
from mora_ds.common.untrusted import expanded
from mora_ds.config.data import ModelArguments
from mora_ds.config.training import TrainingArguments
from mora_ds.data import largest_id
from mora_ds.models.load import (
    LoadedBase,
    config_digest,
    create_base,
    folder_config,
    load_base,
    read_model_config,
    resolve_folder,
)
from mora_ds.train.setup import Place


def find_model(model: ModelArguments, place: Place) -> tuple[Path | None, Any]:
    """(folder of the base, its config); no folder where --model_config asks for random weights. Collective."""
    folder = None
    if model.model_name_or_path is None:
        assert model.model_config is not None, "validated"
        config = read_model_config(expanded(model.model_config, "--model_config"))
    else:
        folder = resolve_folder(model.model_name_or_path, place.ranks)
        config = folder_config(folder, model.trust_remote_code)
    place.ranks.same("the model", {"config.json (digest)": config_digest(config)})
    return folder, config


def prepare_base(
    model: ModelArguments,
    training: TrainingArguments,
    folder: Path | None,
    tokenizer: Any,
    dtype: torch.dtype,
    place: Place,
    cast: bool = True,
) -> LoadedBase:
    """Load the complete base on this process, from `folder` or created from --model_config; `cast` as in `load_base`.
    Collective."""
    base_folder = place.folder / BASE_FOLDER
    if folder is None:
        config_file = expanded(str(model.model_config), "--model_config")
        vocabulary = largest_id(tokenizer)[1] + 1

        def create() -> None:
            if place.checkpoint is None or not (base_folder / "config.json").exists():
                create_base(config_file, base_folder, training.seed, tokenizer, vocabulary)

        place.ranks.on_first("creation of the base", create, long=True)
        folder = base_folder
    loaded = load_base(folder, base_folder, place.ranks, dtype, model.implementation, model.trust_remote_code, cast)
    if training.gradient_checkpointing:
        loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return loaded
