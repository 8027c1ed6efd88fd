"""--output_dir in a bucket, or in another store that fsspec knows.

    lease -> fetch (run.yaml, metrics.jsonl, summary.json) -> (the start-up) -> begin
    -> save: upload, then the checkpoint -> ... -> upload with the merged model -> lease given up

The run works in a local folder, which all ranks must see and which ends with it.
Checkpoints go to the store directly (`checkpoint.storage.ObjectStorage`); all else is
uploaded from that folder by rank 0.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mora_ds.checkpoint.layout import (
    BASE_FOLDER,
    MERGED_FOLDER,
    METRICS_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    TOKENIZER_FOLDER,
)
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.fetched import bind
from mora_ds.common.files import file_sizes
from mora_ds.common.object_store import Lease, ObjectStore, StoreError
from mora_ds.common.untrusted import MAX_BYTES, is_url
from mora_ds.config.arguments import Arguments
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.data import cache_folder
from mora_ds.train.non_fatal import non_fatal
from mora_ds.train.output_folder import LOCK
from mora_ds.train.profile import PROFILE
from mora_ds.train.start_up import start_up
from mora_ds.train.trackers import TENSORBOARD

_READ_AGAIN = (RUN_FILE, METRICS_FILE, SUMMARY_FILE)
"""What a resumed run goes on with."""
_UPLOADED = (*_READ_AGAIN, TENSORBOARD, PROFILE)
_AT_START = (RUN_FILE, BASE_FOLDER, TOKENIZER_FOLDER)
"""What a start-up writes. Checkpoints name the base."""


class RemoteFolder:
    """An output folder at a URL. All ranks have one; rank 0 reserves it and writes."""

    def __init__(self, url: str, parent: Path) -> None:
        """The working folder is made in `parent`."""
        self._store = ObjectStore(url)
        self.url = self._store.url
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder = (parent / f".mora_ds-run-{name}").resolve()
        bind(self.folder, self.url)
        self._lease = Lease(self._store, LOCK)
        self._is_open = False
        self._has_begun = False

    def open(self) -> None:
        """Reserve the URL, and fetch the files that a resumed run goes on with. A folder
        is not fetched: an empty one stands for it. Raises `UserError`."""
        try:
            self._lease.take()
            self._is_open = True
            # Only who has the lease works in the folder: a killed run has left it
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            facts = {name: self._store.facts(name) for name in _READ_AGAIN}
            for name in (RUN_FILE, SUMMARY_FILE):
                size, _ = facts[name] or (0, "")
                if size > MAX_BYTES:
                    raise UserError(f"{self.url}/{name} is too large to be a run's")
            self._store.fetch([name for name in facts if facts[name]], self.folder)
            # What no run has made is refused as on a disk (`output_folder`)
            for name in self._store.folders():
                (self.folder / name).mkdir()
        except (StoreError, OSError) as error:
            raise UserError(
                f"--output_dir {self.url} cannot be used with --cache_dir {self.folder.parent}: {error}"
            ) from error

    def begin(self, overwrites: bool) -> None:
        """The run has begun. Delete what one that it `overwrites` has uploaded, and
        upload run.yaml, and a base and a tokenizer that the start-up has made."""
        self._has_begun = True
        if overwrites:
            # But run.yaml, which says that they are a run's, whenever this is killed
            for name in {*_UPLOADED, *_AT_START, MERGED_FOLDER} - {RUN_FILE}:
                self._store.delete(name)
        self._upload(*_AT_START)

    def upload(
        self, ranks: Ranks, failures: list[str], has_merged: bool = False
    ) -> None:
        """Upload logs, and the merged model in place of one that is there. A failure is
        logged and appended to `failures`. Collective. Raises `RunError` where another
        run has taken the URL over."""

        def upload() -> None:
            self._lease.check()
            with non_fatal(f"the upload to {self.url}", failures):
                self._upload(*_UPLOADED)
                if has_merged:
                    self._store.delete(MERGED_FOLDER)
                    self._upload(MERGED_FOLDER)

        ranks.run_on_rank0("upload of the run", upload, long=True)

    def close(self) -> None:
        """Upload the logs of a run that has begun, however it has ended, give the URL
        up, and delete the working folder."""
        # What ended the run is reported, and not this
        with suppress(RunError):
            if self._is_open:
                try:
                    self._lease.check()
                    if self._has_begun:
                        self._upload(*_UPLOADED)
                    shutil.rmtree(self.folder, ignore_errors=True)
                finally:
                    self._lease.release()

    def _upload(self, *names: str) -> None:
        """Upload those of these files and folders that are there."""
        for file in file_sizes(self.folder):
            if file.split("/")[0] in names:
                self._store.put(file, self.folder / file)


@contextmanager
def remote_folder(arguments: Arguments, ranks: Ranks) -> Iterator[RemoteFolder | None]:
    """The output folder of a run whose --output_dir is a URL; None for others.
    Collective."""
    url = arguments.training.output_dir
    if not is_url(url):
        yield None
        return
    parent = cache_folder(arguments.data)
    with start_up():
        remote = ranks.agree("output folder", lambda: RemoteFolder(url, parent))
    try:
        with start_up():
            ranks.run_on_rank0("reservation of the URL", remote.open, long=True)
        yield remote
    finally:
        if ranks.is_rank0:
            remote.close()
