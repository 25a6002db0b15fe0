"""`fetch` from a hub on this machine, into a cache that serves where there is no network."""

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from jobs import command, write_manifest
from tiny_model import copied

REPO, COMMIT = "owner/tiny", "a" * 40
COMMAND = Path(sys.executable).with_name("tokenflow-batch")


def hub(model):
    """The few answers of a model hub that a download needs."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            files = {str(p.relative_to(model)): p for p in model.rglob("*") if p.is_file()}
            if self.path.startswith(f"/api/models/{REPO}/revision/"):
                listed = [{"rfilename": name} for name in files]
                self.answer_json({"id": REPO, "sha": COMMIT, "siblings": listed})
                return
            if self.path.startswith(f"/api/models/{REPO}/tree/{COMMIT}"):
                sizes = {name: path.stat().st_size for name, path in files.items()}
                self.answer_json(
                    [{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes.items()]
                )
                return
            file = model / self.path.partition(f"/resolve/{COMMIT}/")[2]
            if f"/{REPO}/resolve/" in self.path and file.is_file():
                self.answer(file.read_bytes(), "application/octet-stream")
            else:
                self.send_error(404)

        do_HEAD = do_GET  # noqa: N815 - the library's name

        def answer_json(self, value):
            self.answer(json.dumps(value).encode(), "application/json")

        def answer(self, data, kind):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    return Hub


@pytest.fixture
def endpoint(tiny_model, tmp_path):
    """The hub's address; it has the tiny model, and a file that nobody needs."""
    model = copied(tiny_model, tmp_path / "served")
    (model / "unet" / "pickled.bin").write_bytes(b"not wanted")
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub(model))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def call(*arguments, cache, **more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = {**clean, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **more}
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_what_is_fetched_serves_a_machine_without_a_network(endpoint, tiny_model, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"is not looked at")
    manifest, cache = write_manifest(tmp_path, REPO), tmp_path / "cache"
    before = call("status", manifest, cache=cache, HF_HUB_OFFLINE="1")
    assert before.returncode == 3
    first = call("fetch", manifest, cache=cache, HF_ENDPOINT=endpoint)
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.strip().removeprefix(f"{REPO}: "))
    for name in ("unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"):
        assert (folder / name).read_bytes() == (tiny_model / name).read_bytes()
    assert not (folder / "unet" / "pickled.bin").exists()
    lost = folder / "vae" / "diffusion_pytorch_model.safetensors"
    lost.resolve().unlink()
    lost.unlink()  # as after a download that was cut short
    assert call("status", manifest, cache=cache, HF_HUB_OFFLINE="1").returncode == 3
    assert call("fetch", manifest, cache=cache, HF_ENDPOINT=endpoint).returncode == 0
    after = call("status", manifest, cache=cache, HF_HUB_OFFLINE="1")
    assert after.returncode == 0, after.stderr


def test_what_is_here_already_is_named(tiny_model, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"is not looked at")
    answer = command("fetch", write_manifest(tmp_path, tiny_model))
    assert (answer.exit_code, answer.output.split()) == (0, [f"{tiny_model}:", str(tiny_model)])


def test_a_hub_that_does_not_have_it_is_told(endpoint, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"is not looked at")
    manifest = write_manifest(tmp_path, "owner/other")
    answer = call("fetch", manifest, cache=tmp_path / "cache", HF_ENDPOINT=endpoint)
    assert answer.returncode == 3
    assert "can't be had from the hub" in answer.stderr
    assert "Traceback" not in answer.stderr
