"""The part of the Hugging Face Hub's HTTP API that an upload uses, on this machine."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

TOKEN = "hf_a_valid_token"


class FakeHub:
    """`files` are those of the one repository, me/tuned, after a commit; `status` is what a commit answers where it is not 200."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.others: list[str] = []  # API paths of repositories that the user may only read
        self.status = 200
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.asked.append(f"{self.command} {self.path}")
                login = self.path.startswith("/lfs/") or self.headers.get("Authorization") == f"Bearer {TOKEN}"
                status, answer = hub.answer(self.command, self.path, body) if login else (401, {"error": "Invalid credentials"})
                sent = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            do_GET = do_POST = do_PUT = do_HEAD = _answer

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict]:
        """(status, JSON) of a request with a valid token."""
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "orgs": []}
        if method == "PUT" and path.startswith("/lfs/"):
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}
        if path.endswith("/commit/main"):
            return self._commit(body) if self.status == 200 else (self.status, {"error": "no"})
        if method == "GET":  # whether a repository is there
            return (200, {"id": path.removeprefix("/api/models/")}) if path in self.others else (404, {"error": "Repository not found"})
        asked = json.loads(body)
        if path.startswith(tuple(self.others)):
            return 403, {"error": "no rights"}
        if path == "/api/repos/create":
            owner = asked.get("organization", "me")
            return (200, {"url": f"{self.url}/me/{asked['name']}"}) if owner == "me" else (403, {"error": f"no rights for {owner}"})
        if path.endswith("/preupload/main"):
            modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in asked["files"]}
            return 200, {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]}
        if path.endswith("/info/lfs/objects/batch"):
            actions = [{**blob, "actions": {"upload": {"href": f"{self.url}/lfs/{blob['oid']}"}}} for blob in asked["objects"]]
            return 200, {"transfer": "basic", "objects": actions}
        return (200, {"errors": [], "warnings": []}) if path == "/api/validate-yaml" else (404, {"error": path})

    def _commit(self, body: bytes) -> tuple[int, dict]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
                assert hashlib.sha256(self.files[value["path"]]).hexdigest() == value["oid"]
        return 200, {"commitUrl": f"{self.url}/me/tuned/commit/{'a' * 40}", "commitOid": "a" * 40, "hookOutput": ""}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[FakeHub]:
    """A hub that huggingface_hub talks to in place of the real one; the user is logged in."""
    from huggingface_hub import constants

    made = FakeHub()
    for name, value in {"ENDPOINT": made.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_TOKEN_PATH": str(tmp_path / "token")}.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    made.close()
