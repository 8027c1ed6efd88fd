"""The inputs of a run, and the check that the run does not overwrite or delete any."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mora_ds.checkpoint.layout import BASE_FOLDER
from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import expanded, is_url
from mora_ds.config.arguments import Arguments
from mora_ds.config.data import DataArguments
from mora_ds.config.mixture import mixture_config
from mora_ds.config.research import TARGETS
from mora_ds.train.output_folder import DEMO, NAMES, is_reserved
from mora_ds.train.run_file import holds_run
from mora_ds.train.tasks import is_task_file

Inputs = Iterator[tuple[str, str | None]]
"""(flag or setting, the path or the name on the Hub that it has)"""

_READABLE = (BASE_FOLDER, DEMO)
"""Output folders that a resumed run may read, because it does not replace them."""

_CACHE = "--cache_dir"
"""This folder may be the output folder: no run uses the names that it contains."""


def check_inputs(arguments: Arguments, folder: Path) -> None:
    """Raise `UserError` for an input that lies where the run writes.

    That is: a file that the run would replace or delete, a model or text folder that is
    the output folder, or a pattern that would match files written by the run.

    `folder`: the output folder. Links are followed. A hard link to an output is safe,
    because a run replaces files and never writes into existing ones. A resumed run may
    read its own outputs that it does not replace.
    """
    readable: tuple[str, ...] = ()
    if arguments.training.resume_from_checkpoint is not None and holds_run(folder):
        readable = _READABLE
    # The demo reserves the folder first and writes the inputs of its main job there.
    elif is_reserved(folder):
        readable = (DEMO,)
    output_dir = folder.resolve()
    outputs = [output_dir / name for name in NAMES if name not in readable]
    texts = list(_texts(arguments.data))
    for flag, named in _paths([*_settings(arguments), *texts]):
        real = _real_path(named)
        is_output = any(path in outputs for path in (real, *real.parents))
        if is_output or (real == output_dir and flag != _CACHE):
            raise _input_in_output(flag, named, folder)
    for flag, name in texts:
        if not name or is_url(name):
            continue
        if _matches_output(_real_path(expanded(name, flag)), output_dir):
            raise _input_in_output(flag, name, folder)


def _real_path(path: Path) -> Path:
    """The path without links. For a loop of links `Path.resolve` raises; `realpath`
    does not."""
    return Path(os.path.realpath(path))


def _matches_output(text: Path, output_dir: Path) -> bool:
    """Whether a text folder or pattern matches files that a run writes to `output_dir`,
    which need not exist yet."""
    if not glob.has_magic(str(text)):
        return text in output_dir.parents
    before, is_recursive, _ = str(text).partition("**")
    if is_recursive:
        folders = (output_dir, *output_dir.parents)
        return any(searched.match(before) for searched in folders)
    return any((output_dir / name).match(str(text)) for name in ("", *NAMES))


def _input_in_output(flag: str, named: object, folder: Path) -> UserError:
    return UserError(
        f"{flag} {named}: the run would read it and also write, replace or delete files of it in --output_dir "
        f"{folder}: name a copy elsewhere, or another --output_dir"
    )


def _settings(arguments: Arguments) -> Inputs:
    """(flag, path or name on the Hub) of all inputs except the text."""
    model = arguments.model
    yield "--model_name_or_path", model.model_name_or_path
    yield "--model_config", model.model_config
    yield "--tokenizer_name", model.tokenizer_name
    yield TARGETS, arguments.research.get("targets")
    yield "--deepspeed", arguments.training.deepspeed
    yield "--mixture", arguments.data.mixture
    yield _CACHE, arguments.data.cache_dir
    for name in arguments.training.eval_tasks:
        if is_task_file(name):
            yield "--eval_tasks", name


def _texts(data: DataArguments) -> Inputs:
    """(flag, pattern) of all text."""
    for source in mixture_config(data).sources:
        for pattern in source.files:
            yield source.flag, pattern
        if source.dataset:
            yield source.flag, str(expanded(source.dataset, source.flag))
    for _, pattern in data.named_eval_files():
        yield "--eval_files", pattern


def _paths(inputs: Iterable[tuple[str, str | None]]) -> Iterator[tuple[str, Path]]:
    """(flag, path) of the files and folders that validated settings name or match by a
    pattern."""
    for flag, name in inputs:
        if not name or is_url(name):
            continue
        path = str(expanded(name, flag))
        matches = [path]
        if glob.has_magic(path) and not os.path.exists(path):
            matches = glob.glob(path, recursive=True)
        for match in matches:
            yield flag, Path(match)
