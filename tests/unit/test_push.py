"""``sws push``: what it refuses before it asks the network, and what it sends to a Hub on this machine."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.launching import REPOSITORY

FILES = {"config.json": "{}", "model.safetensors": "weights", "README.md": "---\nlicense: mit\n---\n# pets\n"}


class Hub(BaseHTTPRequestHandler):
    """Answer as the Hub does where no file is large, and keep what was asked for."""

    asked: list[tuple[str, str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        content = [json.loads(line) for line in body.splitlines()]
        type(self).asked.append((self.path, self.headers["Authorization"], content))
        address = f"http://{self.headers['Host']}/me/pets"
        answer: dict[str, Any] = {"url": address, "commitUrl": f"{address}/commit/1", "commitOid": "1"}
        if "/preupload/" in self.path:
            how = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"], **how} for file in content[0]["files"]]}
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer({"id": "me/pets", "sha": "0", "siblings": [], "private": False})

    def _answer(self, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def push(folder: Path, repo: str = "me/pets", *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launcher/push.py", str(folder), "--repo", repo, *options]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    found = clean | {"HF_HOME": str(folder.with_name("hf")), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    return subprocess.run(command, cwd=REPOSITORY, env=found, capture_output=True, text=True, timeout=600)


def test_the_folder_is_one_commit(hub: str, folder: Path) -> None:
    done = push(folder, HF_ENDPOINT=hub, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub}/me/pets: timm opens it as hf-hub:me/pets\n"
    (path, token, lines), *others = [each for each in Hub.asked if "/commit/" in each[0]]
    assert (path, token, others) == ("/api/models/me/pets/commit/main", "Bearer hf_secret", [])
    sent = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
    assert {name: base64.b64decode(content).decode() for name, content in sent.items()} == FILES


def test_a_public_repository_does_not_become_private(hub: str, folder: Path) -> None:
    done = push(folder, "me/pets", "--private", HF_ENDPOINT=hub, HF_TOKEN="hf_secret")
    assert done.stderr == "error: --private: me/pets is there already, and public; nothing was uploaded\n"
    assert not [path for path, *_ in Hub.asked if "/commit/" in path]


def test_what_cannot_be_pushed_is_refused(folder: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert push(folder, **nowhere).stderr == (
        "error: no token for the Hub: hf auth login asks for one, or put it into HF_TOKEN\n"
    )
    assert "error: --repo pets: expected OWNER/NAME" in push(folder, "pets", **nowhere).stderr
    offline = push(folder, HF_TOKEN="hf_secret", **nowhere)
    assert offline.stderr.startswith("error: me/pets: could not be pushed to http://127.0.0.1:9 (")
    assert (offline.returncode, offline.stderr.count("\n")) == (1, 1)
    (folder / "config.json").unlink()
    assert "has no config.json; sws export makes such a folder" in push(folder).stderr
