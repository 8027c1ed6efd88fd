"""What a run reads, and that none of it lies where the run writes or deletes."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from mora_ds.checkpoint.layout import BASE_FOLDER
from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import expanded
from mora_ds.config.arguments import Arguments
from mora_ds.config.data import DataArguments
from mora_ds.config.mixture import mixture_plan
from mora_ds.train.hooks import hooks_of
from mora_ds.train.output_folder import DEMO, NAMES, is_reserved
from mora_ds.train.run_file import holds_run
from mora_ds.train.tasks import is_task_file

_READABLE = (BASE_FOLDER, DEMO)
"""What a resumed run has made and will not replace."""

_OF_TEXT = ("--train_files", "--replay", "--eval_files", "--dataset_name")
"""Flags whose folders are searched for text: the output folder must not lie in them."""


def check_inputs(arguments: Arguments, folder: Path) -> None:
    """Raise `UserError` for a flag that names a file which would be replaced or
    deleted.

    `folder`: the one that the run writes to. Links are followed; another name of the
    same file (a hard link) is safe, as a run replaces files and writes into none. A
    resumed run may read what it has made and will not replace.
    """
    readable: tuple[str, ...] = ()
    if arguments.training.resume_from_checkpoint is not None and holds_run(folder):
        readable = _READABLE
    # The demo has reserved the folder of its main job, and written what that one reads.
    elif is_reserved(folder):
        readable = (DEMO,)
    outputs = [folder.resolve() / name for name in NAMES if name not in readable]
    outputs += [output.resolve() for output in outputs if output.is_symlink()]
    for flag, named in inputs_of(arguments):
        # `realpath` follows a loop of links as far as it goes, where `resolve` raises.
        real = Path(os.path.realpath(named))
        is_output = any(path in outputs for path in (real, *real.parents))
        holds_output = flag in _OF_TEXT and real in folder.resolve().parents
        if is_output or holds_output:
            raise UserError(
                f"{flag} {named}: the run would read it and also replace or delete it in --output_dir {folder}: name a "
                "copy elsewhere, or another --output_dir"
            )


def inputs_of(arguments: Arguments) -> Iterator[tuple[str, Path]]:
    """(flag, path) of all that validated settings name: files, folders, names on the
    Hub."""
    model = arguments.model
    training = arguments.training
    named = [
        ("--model_name_or_path", model.model_name_or_path),
        ("--model_config", model.model_config),
        ("--tokenizer_name", model.tokenizer_name),
        *hooks_of(arguments).inputs(),
        ("--deepspeed", training.deepspeed),
        *_texts(arguments.data),
        ("--cache_dir", arguments.data.cache_dir),
        *(("--eval_tasks", name) for name in training.eval_tasks if is_task_file(name)),
    ]
    for flag, name in named:
        if not name:
            continue
        path = str(expanded(name, flag))
        matches = [path]
        if glob.has_magic(path) and not os.path.exists(path):
            matches = glob.glob(path, recursive=True)
        for match in matches:
            yield flag, Path(match)


def _texts(data: DataArguments) -> Iterator[tuple[str, str | None]]:
    """The flags and patterns of all text."""
    yield "--mixture", data.mixture
    for source in mixture_plan(data).sources:
        for pattern in (*source.files, source.dataset):
            yield source.flag, pattern
    for _, pattern in data.named_eval_files():
        yield "--eval_files", pattern
