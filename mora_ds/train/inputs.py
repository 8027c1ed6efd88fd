"""What a run reads, and that none of it lies where the run writes or deletes."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mora_ds.checkpoint.layout import BASE_FOLDER
from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import expanded
from mora_ds.config.arguments import Arguments
from mora_ds.config.data import DataArguments
from mora_ds.config.mixture import mixture_plan
from mora_ds.config.research import TARGETS
from mora_ds.train.output_folder import DEMO, NAMES, is_reserved
from mora_ds.train.run_file import holds_run
from mora_ds.train.tasks import is_task_file

Inputs = Iterator[tuple[str, str | None]]
"""(flag or setting, the path or the name on the Hub that it has)"""

_READABLE = (BASE_FOLDER, DEMO)
"""Folders of a run that it may read again when it resumes, as it replaces neither."""

_CACHE = "--cache_dir"
"""Its folders have names that no run uses, so that they may lie in the output
folder."""


def check_inputs(arguments: Arguments, folder: Path) -> None:
    """Raise `UserError` for a flag that names a file which would be replaced or
    deleted; for a model or text whose folder is the output folder, and for text that is
    searched for in it or above it: what the run writes there would be taken for a part
    of it.

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
    output_dir = folder.resolve()
    outputs = [output_dir / name for name in NAMES if name not in readable]
    outputs += [output.resolve() for output in outputs if output.is_symlink()]
    texts = list(_texts(arguments.data))
    for flag, named in _paths([*_settings(arguments), *texts]):
        real = _real(named)
        is_output = any(path in outputs for path in (real, *real.parents))
        if is_output or (real == output_dir and flag != _CACHE):
            raise _shared(flag, named, folder)
    for flag, name in texts:
        if name and _searches(_real(expanded(name, flag)), output_dir):
            raise _shared(flag, name, folder)


def _real(path: Path) -> Path:
    """The path without links. `realpath` follows a loop of links as far as it goes,
    where `resolve` raises."""
    return Path(os.path.realpath(path))


def _searches(text: Path, output_dir: Path) -> bool:
    """Whether a folder or pattern of text comes upon what a run writes to `output_dir`,
    which need not exist yet."""
    if not glob.has_magic(str(text)):
        return text in output_dir.parents
    before, is_recursive, _ = str(text).partition("**")
    if is_recursive:
        folders = (output_dir, *output_dir.parents)
        return any(searched.match(before) for searched in folders)
    return any((output_dir / name).match(str(text)) for name in ("", *NAMES))


def _shared(flag: str, named: object, folder: Path) -> UserError:
    return UserError(
        f"{flag} {named}: the run would read it and also write, replace or delete files of it in --output_dir "
        f"{folder}: name a copy elsewhere, or another --output_dir"
    )


def _settings(arguments: Arguments) -> Inputs:
    """(flag, path or name on the Hub) of all inputs but the text."""
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
    """The flags and patterns of all text."""
    for source in mixture_plan(data).sources:
        for pattern in (*source.files, source.dataset):
            yield source.flag, pattern
    for _, pattern in data.named_eval_files():
        yield "--eval_files", pattern


def _paths(inputs: Iterable[tuple[str, str | None]]) -> Iterator[tuple[str, Path]]:
    """(flag, path) of the files and folders that validated settings name or match."""
    for flag, name in inputs:
        if not name:
            continue
        path = str(expanded(name, flag))
        matches = [path]
        if glob.has_magic(path) and not os.path.exists(path):
            matches = glob.glob(path, recursive=True)
        for match in matches:
            yield flag, Path(match)
