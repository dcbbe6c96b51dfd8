"""The Hub's side, over HTTP: a small server on this machine speaks the part of its protocol that the library uses.

Each case runs in a process of its own, because the library reads its environment when it is imported.
"""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLAN = """
import json, sys
from ltxforge.errors import LtxforgeError
from ltxforge.models.detect import plan_model
from ltxforge.models.sources import fetch
from ltxforge.plan import to_json
from ltxforge.signals import StopRequest
try:
    plan = plan_model(**json.loads(sys.argv[1]))
    before = to_json(plan)
    if "fetch" in sys.argv:
        plan = fetch(plan, lambda event: None, StopRequest())
    print(json.dumps([before, to_json(plan)]))
except LtxforgeError as error:
    print(json.dumps({"type": type(error).__name__, "what": error.what, "remedy": error.remedy}))
"""


class Repositories(http.server.BaseHTTPRequestHandler):
    """`org/ltx` holds the folder `root`; `org/gated` asks for its terms; anything else is absent."""

    root = None

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/org/ltx/tree/"):
            return self.reply(json.dumps(self.tree()).encode(), body)
        if path.startswith("api/models/org/ltx"):
            return self.reply(json.dumps(self.info()).encode(), body)
        if path.startswith("org/ltx/resolve/"):
            return self.send_file(self.root / path.split("/", 4)[4], body)
        if "org/gated" in path:
            return self.refuse(403, "GatedRepo")
        return self.refuse(404, "RepoNotFound")

    def info(self) -> dict:
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        return {"id": "org/ltx", "sha": COMMIT, "siblings": [self.sibling(path) for path in files]}

    def tree(self) -> list[dict]:
        listed = []
        for entry in self.info()["siblings"]:
            file = {"type": "file", "path": entry["rfilename"], "size": entry["size"], "oid": entry["blobId"]}
            if "lfs" in entry:
                file["lfs"] = {**entry["lfs"], "oid": entry["lfs"]["sha256"]}
            listed.append(file)
        return listed

    def sibling(self, path) -> dict:
        entry = {"rfilename": path.relative_to(self.root).as_posix(), "size": path.stat().st_size, "blobId": "0" * 40}
        if path.suffix == ".safetensors":
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entry["lfs"] = {"sha256": digest, "size": entry["size"], "pointerSize": 134}
        return entry

    def send_file(self, path, body: bool):
        content = path.read_bytes()
        self.server.fetched.append((path.name, self.headers.get("Range"), body))
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if wanted := self.headers.get("Range"):
            first, last = (int(part) if part else len(content) - 1 for part in wanted.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            return self.reply(content[first : last + 1], body, 206, headers)
        return self.reply(content, body, 200, headers)

    def refuse(self, status: int, code: str):
        self.reply(b"{}", True, status, {"X-Error-Code": code, "X-Error-Message": code})

    def reply(self, content: bytes, body: bool, status: int = 200, headers: dict | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def server(request, tiny_folder):
    """`org/ltx` on this machine: LTX-Video, or the tiny model that a test names by `indirect`."""
    root = tiny_folder(getattr(request, "param", "tiny/ltx-video"))
    handler = type("Handler", (Repositories,), {"root": root})
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    serving.fetched = []
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield serving
    serving.shutdown()
    serving.server_close()


def plan(home, endpoint: str, *words: str, offline: bool = False, **recipe):
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PLAN, json.dumps(recipe), *words],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def address(server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_planning_reads_headers_and_fetching_the_rest(tmp_path, server, tiny_folder):
    before, after = plan(tmp_path, address(server), "fetch", base="org/ltx", version="0.9.5")
    for name, part in before["components"].items():
        assert (part["kind"], part["repository"], part["revision"]) == ("hub", "org/ltx", COMMIT)
        assert (part["inside"], after["components"][name]["inside"]) == (name, name)
    assert before["components"]["transformer"]["location"] == ""
    whole = [name for name, wanted, body in server.fetched if body and wanted is None and name.endswith(".safetensors")]
    assert len(whole) == len(set(whole)) == len(list(tiny_folder().rglob("*.safetensors")))
    for part in after["components"].values():
        assert Path(part["location"]).is_dir()
    assert "model_index.json" in {name for name, *_ in server.fetched}


def test_digests_are_those_of_the_same_files_here(tmp_path, server, tiny_folder):
    there, _ = plan(tmp_path, address(server), base="org/ltx", version="0.9.5")
    here, _ = plan(tmp_path, address(server), base=str(tiny_folder()), version="0.9.5")
    for name, part in here["components"].items():
        assert part["digest"] == there["components"][name]["digest"], name
        assert part["bytes"] == there["components"][name]["bytes"], name


@pytest.mark.parametrize("server", ["tiny/ltx2.5"], indirect=True)
def test_ltx2_is_planned_from_headers_as_it_is_here(tmp_path, server, tiny_folder):
    folder = tiny_folder("tiny/ltx2.5")
    there, fetched = plan(tmp_path, address(server), "fetch", base="org/ltx")
    here, _ = plan(tmp_path, address(server), base=str(folder))
    assert there["version"] == here["version"] == "2.5-dev"
    for name, part in here["components"].items():
        for key in ("digest", "bytes"):
            assert part[key] == there["components"][name][key], name
        assert Path(fetched["components"][name]["location"]).is_dir()
    only = plan(tmp_path, address(server), base=str(folder), audio_vae="org/ltx:audio_vae")[0]
    assert only["components"]["audio_vae"]["inside"] == "audio_vae"


def test_offline_a_cached_repository_works_and_another_is_told(tmp_path, server):
    online = plan(tmp_path, address(server), "fetch", base="org/ltx", version="0.9.5")[1]
    offline = plan(tmp_path, address(server), "fetch", base="org/ltx", version="0.9.5", offline=True)[1]
    assert offline == online
    other = plan(tmp_path, address(server), base="org/other", offline=True)
    assert other["type"] == "HubError"
    assert "HF_HUB_OFFLINE" in other["what"]


def test_one_part_inside_a_repository(tmp_path, server):
    recipe = {"base": "tiny/ltx-video", "transformer": f"org/ltx:transformer@{COMMIT}"}
    before, after = plan(tmp_path, address(server), "fetch", **recipe)
    assert before["components"]["transformer"]["inside"] == "transformer"
    assert after["components"]["vae"]["kind"] == "builtin"
    fetched = {name for name, wanted, body in server.fetched if body and not wanted}
    assert not any(name.startswith("model") for name in fetched)  # neither T5 nor the index of the pipeline


def test_gated_absent_and_misspelt(tmp_path, server):
    gated = plan(tmp_path, address(server), base="org/gated")
    assert gated["type"] == "HubError"
    assert "https://huggingface.co/org/gated" in gated["remedy"]
    absent = plan(tmp_path, address(server), base="Lightricks/LTX-Vidoe")
    assert "Did you mean Lightricks/LTX-Video?" in absent["remedy"]
    inside = plan(tmp_path, address(server), base="tiny/ltx-video", transformer="org/ltx:transfomer")
    assert inside["type"] == "WeightsError"
    assert "org/ltx:transformer" in inside["remedy"]


def test_an_unreachable_hub_gives_one_message(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    said = plan(tmp_path, endpoint, base="Lightricks/LTX-Video")
    assert said["type"] == "HubError"
    assert "cannot be reached for Lightricks/LTX-Video" in said["what"]
    for remedy in ("local copy", "HF_ENDPOINT", "HF_HUB_OFFLINE=1"):
        assert remedy in said["remedy"]
