"""The part of the Hugging Face hub that an upload needs, on this machine: what it was sent can be looked at."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

TOKEN, READER = "hf_mayWriteHere123", "hf_mayOnlyRead4567"
NAMES = {TOKEN: "me", READER: "reader"}


@dataclass
class Repo:
    """files: {branch: {name: content}}."""

    private: bool
    files: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    messages: list[str] = field(default_factory=list)


@dataclass
class FakeHub:
    """failing: {part of an address: status} of requests that are refused; asked: method and address of all requests."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    failing: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        self.asked.append(f"{method} {path}")
        refused = next((status for part, status in self.failing.items() if part in path), None)
        if refused is not None:
            return refused, {"error": "refused"}
        if method == "PUT":  # the storage's addresses are signed: no token comes with them
            self.objects[path.rpartition("/")[2]] = body
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            return 200, {}
        if token not in NAMES:
            return 401, {"error": "Invalid credentials in Authorization header"}
        for wanted, pattern, handle in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == wanted:
                return handle(self, NAMES[token], body, *found.groups())
        return 501, {"error": f"nobody answers {method} {path}"}

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[name].files[branch]


Answer = tuple[int, Any]


def whoami(hub: FakeHub, user: str, body: bytes) -> Answer:
    return 200, {"type": "user", "name": user, "auth": {"accessToken": {"role": "write"}}}


def create(hub: FakeHub, user: str, body: bytes) -> Answer:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    there = {"url": f"{hub.endpoint}/{name}"}
    if name in hub.repos:
        return 409, there
    if asked["organization"] != user:
        return 403, {"error": "You don't have the rights to create a model under the namespace"}
    hub.repos[name] = Repo(asked.get("visibility") == "private")
    return 200, there


def auth_check(hub: FakeHub, user: str, body: bytes, name: str) -> Answer:
    return (200, {}) if name.startswith(f"{user}/") else (403, {"error": "Forbidden"})


def info(hub: FakeHub, user: str, body: bytes, name: str, branch: str | None) -> Answer:
    if name not in hub.repos:
        return 404, {"error": "Repository not found"}
    repo = hub.repos[name]
    siblings = [{"rfilename": file} for file in repo.files[branch or "main"]]
    return 200, {"id": name, "private": repo.private, "siblings": siblings, "sha": 40 * "0"}


def tree(hub: FakeHub, user: str, body: bytes, name: str, branch: str) -> Answer:
    files = hub.files(name, branch)
    return 200, [{"type": "file", "path": file, "oid": "0", "size": len(files[file])} for file in files]


def make_branch(hub: FakeHub, user: str, body: bytes, name: str, branch: str) -> Answer:
    hub.repos[name].files.setdefault(branch, dict(hub.files(name)))
    return 200, {}


def validate(hub: FakeHub, user: str, body: bytes) -> Answer:
    card = json.loads(body)["content"]
    data = yaml.safe_load(card.split("---\n")[1])
    return (200, {"errors": [], "warnings": []}) if isinstance(data, dict) else (400, {"errors": [], "warnings": []})


def preupload(hub: FakeHub, user: str, body: bytes, name: str, branch: str) -> Answer:
    assert branch in hub.repos[name].files
    files = json.loads(body)["files"]
    modes = {True: "lfs", False: "regular"}
    return 200, {
        "files": [
            {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
            for f in files
        ]
    }


def batch(hub: FakeHub, user: str, body: bytes, name: str) -> Answer:
    objects: list[dict[str, Any]] = json.loads(body)["objects"]
    for one in objects:
        if one["oid"] not in hub.objects:
            one["actions"] = {"upload": {"href": f"{hub.endpoint}/storage/{one['oid']}"}}
    return 200, {"transfer": "basic", "objects": objects}


def commit(hub: FakeHub, user: str, body: bytes, name: str, branch: str) -> Answer:
    repo = hub.repos[name]
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "header":
            repo.messages.append(value["summary"])
        elif line["key"] == "file":
            repo.files[branch][value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            repo.files[branch][value["path"]] = hub.objects[value["oid"]]
        else:
            assert line["key"] == "deletedFile"
            del repo.files[branch][value["path"]]
    return 200, {"commitUrl": f"{hub.endpoint}/{name}/commit/1", "commitOid": 40 * "1"}


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("GET", f"/api/models/{NAME}/auth-check/write", auth_check),
    ("GET", f"/api/models/{NAME}(?:/revision/([^/]+))?", info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", tree),
    ("POST", f"/api/models/{NAME}/branch/([^/]+)", make_branch),
    ("POST", "/api/validate-yaml", validate),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", batch),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", commit),
]


@contextmanager
def served(hub: FakeHub) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, value = hub.answer(self.command, self.path.partition("?")[0], token, body)
            told = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub for huggingface_hub, with nobody logged in."""
    hub = FakeHub()
    with served(hub):
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "nobody"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield hub
