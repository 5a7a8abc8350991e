"""Streaming over HTTP with a missing shard and a connection cut in the middle."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from test_stream import make


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serves a directory; shard 1 is missing, of shard 2 only the first half arrives."""

    def do_GET(self) -> None:
        if self.path.endswith("000001.tar"):
            self.send_error(404)
        elif self.path.endswith("000002.tar"):
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        else:
            super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(shards):
    handler = functools.partial(_Server, directory=str(shards.directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}/{{shard}}"
        http_server.shutdown()


def right_labels(shards, loader, batches: int) -> np.ndarray:
    found = [next(loader) for _ in range(batches)]
    loader.close()
    for batch in found:
        assert batch.labels.tolist() == [shards.labels[i] for i in batch.sample_ids]
    return np.concatenate([batch.sample_ids for batch in found])


def test_http_with_a_missing_and_a_cut_shard(shards, server, tmp_path):
    log = tmp_path / "bad.jsonl"
    ids = right_labels(shards, make(shards, stream=server, log=log), 20)
    assert set(ids) <= {*range(13), *range(26, 60)}  # none of shard 1
    whole = [i for i in ids.tolist() if not 26 <= i < 39]
    assert set(whole) == {*range(13), *range(39, 60)}  # all of the shards that arrive
    reasons = {}
    for line in map(json.loads, log.read_text().splitlines()):
        reasons[line["shard"]] = line["reason"]
    assert set(reasons) == {"shard-000001.tar", "shard-000002.tar"}
    assert all("the stream broke" in reason for reason in reasons.values())
