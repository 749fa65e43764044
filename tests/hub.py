"""A server on this machine that takes what `huggingface_hub` uploads, with xet off: repositories, regular files and LFS files."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"


@dataclass
class Hub:
    """What the server holds, and how it fails.

    Attributes:
        repositories: name -> path -> content.
        visibility: name -> what it was made as.
        large: LFS objects, by digest.
        forbidden: organisations that nobody may write to.
        broken: repositories that take no large file.
        wrong: what was asked that does not belong to an upload.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    visibility: dict[str, str] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    forbidden: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    endpoint: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and answer."""
        path = path.split("?")[0]
        if method == "PUT" and (found := re.fullmatch(r"/lfs/(.+)/(\w+)", path)):
            if found[1] in self.broken:
                return 501, {"error": "the disk is full"}
            self.large[found[2]] = body
            return 200, {}
        if (method, path) == ("POST", "/api/validate-yaml"):
            return 200, {"warnings": [], "errors": []}
        if (method, path) == ("POST", "/api/repos/create"):
            return self._create(json.loads(body))
        if (method, path) == ("POST", "/lfs/verify"):
            asked = json.loads(body)
            return (200, {}) if len(self.large[asked["oid"]]) == asked["size"] else (422, {"error": "another size"})
        name = re.fullmatch(r"/(?:api/models/)?([\w-]+/[\w-]+)((?:\.git)?(?:/.*)?)", path)
        if (name and name[2].startswith(".git")) or (name and name[1] in self.repositories):
            return self._of(name[1], method, name[2], body)
        return 404, {"error": "Repository not found"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        if asked["organization"] in self.forbidden:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        name = f"{asked['organization']}/{asked['name']}"
        self.repositories[name], self.visibility[name] = {}, asked.get("visibility", str(asked.get("private")))
        return 200, {"url": f"{self.endpoint}/{name}"}

    def _of(self, name: str, method: str, what: str, body: bytes) -> tuple[int, Any]:
        files = self.repositories[name]
        match method, what:
            case "GET", "":
                return 200, {"id": name, "sha": "0" * 40, "private": True, "siblings": []}
            case "GET", "/tree/main":
                return 200, [{"type": "file", "path": p, "size": len(x), "oid": "0" * 40} for p, x in files.items()]
            case "POST", "/preupload/main":
                asked = json.loads(body)["files"]
                modes = [("lfs" if x["path"].endswith((".safetensors", "tokenizer.json")) else "regular", x) for x in asked]
                return 200, {"files": [{"path": x["path"], "uploadMode": mode, "shouldIgnore": False} for mode, x in modes]}
            case "POST", ".git/info/lfs/objects/batch":
                objects = [x | {"actions": self._actions(name, x["oid"])} for x in json.loads(body)["objects"]]
                return 200, {"transfer": "basic", "objects": objects}
            case "POST", "/commit/main":
                return self._commit(name, files, [json.loads(line) for line in body.splitlines()])
        self.wrong.append(f"{method} {what}")
        return 404, {"error": "no such place"}

    def _actions(self, name: str, oid: str) -> dict[str, Any]:
        return {"upload": {"href": f"{self.endpoint}/lfs/{name}/{oid}"}, "verify": {"href": f"{self.endpoint}/lfs/verify"}}

    def _commit(self, name: str, files: dict[str, bytes], lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    content = self.large[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"]
                    files[value["path"]] = content
                case "deletedFile":
                    del files[value["path"]]
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/0", "commitOid": "0" * 40, "success": True}


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.path.startswith("/lfs/")
            status, answer = hub.answer(self.command, self.path, body) if known else (401, {"error": "Invalid credentials"})
            data = json.dumps(answer).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
