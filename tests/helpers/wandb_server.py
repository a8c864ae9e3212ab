"""A minimal W&B server: enough for a run to start, log and resume. It keeps the history's rows."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

PROJECT = {"id": "p", "name": "localfeat", "entity": {"id": "e", "name": "me"}}
VIEWER = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}


class Server(ThreadingHTTPServer):
    """A local server.

    Attributes:
        rows: run id -> rows of its history, in order of arrival.
        refuses: the status of every response: 200, 401 for a wrong key, 500 for a failing server.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.refuses = 200

    def handle_error(self, *_: Any) -> None:
        """Print nothing when W&B gives up waiting."""

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the data of a GraphQL response."""
        name = str(variables.get("name"))
        if operation == "UpsertBucket":
            inserted = name not in self.rows
            self.rows.setdefault(name, [])
            return {"upsertBucket": {"bucket": self.bucket(name), "inserted": inserted}}
        if operation == "RunResumeStatus":
            return {"model": {**PROJECT, "bucket": self.bucket(name)} if name in self.rows else None}
        if operation == "ArtifactType":  # asked before a table is first sent
            return {"project": {"artifact": None}}
        if operation == "CreateArtifact":
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s"}}}}
        if operation == "CreateRunFiles":
            return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": []}}
        return {"viewer": VIEWER} if operation == "Viewer" else {}

    def bucket(self, name: str) -> dict[str, Any]:
        rows = self.rows[name]
        counts = {"logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0}
        tails = {"historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]"}
        about = {"id": name, "name": name, "displayName": name, "config": "{}", "summaryMetrics": "{}", "tags": []}
        return {**about, **counts, **tails, "project": PROJECT, "wandbConfig": '{"t": 1}'}


class Requests(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.server.refuses != 200:
            self.reply({"errors": [{"message": "refused"}]})
        elif "file_stream" in self.path:
            run = self.path.split("/")[-2]
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"content": []})
            self.server.rows[run] += [json.loads(line) for line in history["content"]]
            self.reply({"limits": {}})
        elif "graphql" in self.path:
            sent = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", sent["query"])
            self.reply({"data": self.server.answer(operation[1] if operation else "", sent.get("variables") or {})})
        else:
            self.reply({})

    def do_GET(self) -> None:
        self.reply({})

    def reply(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(self.server.refuses)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def serving() -> Iterator[tuple[Server, str]]:
    """Yield the server and its address."""
    with Server() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
