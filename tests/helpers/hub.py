"""A stand-in for the Hugging Face Hub: the few HTTP calls that an upload makes (huggingface_hub 2.4)."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What has been uploaded."""

    url: str = ""
    refuses: bool = False
    """Whether it answers every call as it does a wrong token."""
    private: dict[str, bool] = field(default_factory=dict)
    """Repository -> whether it was made private."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> {path: content}."""
    tokens: set[str] = field(default_factory=set)
    """What stood in the header Authorization."""


@contextmanager
def stand_in() -> Iterator[Hub]:
    """A server on this machine, for as long as the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"error": "Invalid username or password."}, 401 if hub.refuses else 404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.tokens.add(self.headers.get("Authorization", ""))
            if hub.refuses:
                self._answer({"error": "Invalid username or password."}, 401)
            elif self.path == "/api/repos/create":
                given = json.loads(body)
                name = "/".join(filter(None, (given.get("organization"), given["name"])))
                hub.private[name] = given.get("private", given.get("visibility") == "private")
                self._answer({"url": f"{hub.url}/{name}", "id": name})
            elif self.path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                self._answer({"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
            else:
                self._commit(body)

        def _commit(self, body: bytes) -> None:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    hub.files.setdefault(name, {})[value["path"]] = base64.b64decode(value["content"])
            self._answer({"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1", "success": True})

        def _answer(self, content: Any, status: int = 200) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
