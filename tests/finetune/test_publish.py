"""Publishing with the real huggingface_hub, to a server of ours that speaks the hub's protocol."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import yaml
from digit_models import NAMES, WNIDS

from finetune import card_data, publish


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories made, and the files of each commit; ``allow`` False refuses everything."""

    protocol_version = "HTTP/1.1"
    made: list
    commits: dict
    allow = True

    def do_POST(self):
        body = self._body()
        if not self.allow or self.headers.get("Authorization") != "Bearer hf_test":
            return self._answer({"error": "no"}, 401)
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            return self._answer({"url": self._address("USER/NAME")})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            told = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
            ]
            return self._answer({"files": told})
        if "/commit/" not in self.path:  # such as the check of the card's YAML
            return self._answer({"errors": [], "warnings": []})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.commits[value["path"]] = base64.b64decode(value["content"])
        address = self._address("USER/NAME/commit/" + "0" * 40)
        return self._answer({"commitOid": "0" * 40, "commitUrl": address, "success": True})

    def do_GET(self):
        self._answer({"error": "not found"}, 404)

    def _address(self, path):
        return f"http://127.0.0.1:{self.server.server_port}/{path}"

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    handler = type("OneHub", (Hub,), {"made": [], "commits": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


def run_publish(hub, *arguments, token="hf_test"):
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    env |= {"HF_TOKEN": token} if token else {"HF_HOME": "/nonexistent"}
    command = [sys.executable, "-m", "finetune", "publish", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_the_hub_gets_the_exported_files_and_nothing_else(hub, exported):
    done = run_publish(hub, "--repo", "USER/NAME", "--private", exported)
    assert done.returncode == 0, done.stderr
    assert hub.commits == {path.name: path.read_bytes() for path in exported.iterdir()}
    assert hub.made[0]["name"] == "NAME" and "README.md" in done.stdout
    assert "/commit/" in done.stdout


def test_a_dry_run_shows_the_files_and_uploads_nothing(hub, exported):
    done = run_publish(hub, "--repo", "USER/NAME", "--dry-run", exported, token="")
    assert done.returncode == 0 and "model.safetensors" in done.stdout
    assert not hub.made and not hub.commits


def test_who_may_not_write_is_told_how(hub, exported):
    hub.allow = False
    for token in ("hf_wrong", ""):
        done = run_publish(hub, "--repo", "USER/NAME", exported, token=token)
        assert done.returncode == 1 and "hf auth login" in done.stderr
        assert done.stderr.count("\n") == 1


def test_only_a_proven_export_is_published(exported, tmp_path, capfd):
    copy = tmp_path / "export"
    copy.mkdir()
    for path in exported.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    command = ["--repo", "USER/NAME", "--dry-run", str(copy)]
    assert publish.main(command) == 0
    (copy / "pytorch_model.bin").write_bytes(b"\x80")
    assert publish.main(command) == 1
    assert "pytorch_model.bin is not part of the export" in capfd.readouterr().err
    (copy / "pytorch_model.bin").unlink()
    (copy / "README.md").write_text("another card")
    assert publish.main(command) == 1
    assert "README.md is not what was proven" in capfd.readouterr().err
    (copy / "certificate.json").unlink()
    assert publish.main(command) == 1
    assert publish.main(["--repo", "NAME", str(exported)]) == 2


def test_the_card_tells_machines_what_it_is(exported):
    from huggingface_hub import ModelCard

    data = ModelCard.load(exported / "README.md").data
    assert (data.license, data.library_name) == ("mit", "timm")
    assert data.metrics == ["accuracy"] and "image-classification" in data.tags
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    text = (exported / "README.md").read_text()
    recorded = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"][0]["metrics"]
    assert found == {"top-1": 50.0} and recorded[0]["value"] == 50.0


def test_nothing_published_names_a_place_on_this_machine(exported):
    for path in exported.iterdir():
        if path.suffix != ".safetensors":
            assert str(exported.parent.parent) not in path.read_text(), path
            assert "/tmp/" not in path.read_text(), path


def test_paths_are_cut_and_other_slashes_stay():
    cut = card_data.without_local_paths
    assert cut("--out /data/me/exports/tiny --config pretrain/configs/a.yaml") == (
        "--out tiny --config pretrain/configs/a.yaml"
    )
    assert cut({"data": {"train": "/mnt/in1k/train", "rate": 0.1}}) == {
        "data": {"train": "train", "rate": 0.1}
    }
    for text in ("s3://bucket/in1k/train", "https://a.b/c", "images/s", "48×48, 3/4", "val/top1"):
        assert cut(text) == text
    assert cut("data.val=~/in1k/val") == "data.val=val"


def test_transformers_shows_the_classes_names(exported):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(exported)
    assert config.id2label == dict(enumerate(NAMES)) and len(WNIDS) == config.num_labels
