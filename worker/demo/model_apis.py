"""The batch APIs of OpenAI and Anthropic, for the demo and tests: their limits, failures, lost answers.

One `ModelApis` answers both, over httpx's MockTransport or over HTTP. It counts what was paid: each request
that a batch ran, by its `custom_id`, and those that came on their own.
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx

OPENAI_MOST = 50_000
OPENAI_BYTES = 200_000_000
ANTHROPIC_MOST = 100_000
ANTHROPIC_BYTES = 256_000_000
_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NAME = re.compile(rb'filename="([^"]*)"')

Json = dict[str, Any]
# Of a request's body: the text of its answer, a tool call as (name, arguments), or a status of its failure.
Reply = Callable[[Json], "str | tuple[str, Json] | int"]


class AnswerLost(Exception):
    """The connection breaks before an answer comes."""


@dataclass
class Batch:
    """A batch of either provider."""

    id: str
    key: str
    created_at: float
    ends_at: float
    items: list[tuple[str, Json]]
    file_id: str = ""
    endpoint: str = ""
    refused: str = ""
    betas: str = ""
    expires: bool = False
    lines: list[str] | None = None
    files: dict[str, str] = field(default_factory=dict)


@dataclass
class ModelApis:
    """Both APIs. `takes` gives the seconds of a batch, `now` the time, `keys` the accounts' keys."""

    now: Callable[[], float]
    takes: Callable[[], float] = lambda: 60.0
    reply: Reply = lambda body: f"echo {body.get('input') or body.get('messages')}"
    keys: set[str] | None = None
    tokens: tuple[int, int] = (100, 20)
    batches: dict[str, Batch] = field(default_factory=dict)
    files: dict[str, tuple[str, str, bytes, float]] = field(default_factory=dict)
    paid: Counter[str] = field(default_factory=Counter)
    alone: list[Json] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    # How many answers are lost after it was done, and requests before: by `POST /path`.
    lose_answers: Counter[str] = field(default_factory=Counter)
    lose_requests: Counter[str] = field(default_factory=Counter)
    throttle: Counter[str] = field(default_factory=Counter)
    # The share of requests that expire in a batch.
    expire: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(7))  # noqa: S311 - not of secrets
    lock: threading.RLock = field(default_factory=threading.RLock)
    _number: int = 0

    @property
    def twice(self) -> int:
        """How many requests were paid more often than once in batches."""
        return sum(count - 1 for count in self.paid.values())

    def answer(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        """Answer a request. Raises AnswerLost."""
        with self.lock:
            parts = urlsplit(url)
            place = f"{method} {re.sub(r'/(batch|file|msgbatch)[-_][0-9]+', '/ID', parts.path)}"
            self.asked.append(place)
            self._settle()
            if self._take(self.lose_requests, place):
                raise AnswerLost(place)
            if self._take(self.throttle, place):
                return 429, b'{"error": {"type": "rate_limit_error"}}'
            key = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
            if self.keys is not None and key not in self.keys:
                return 401, b'{"error": {"type": "authentication_error"}}'
            query = dict(parse_qsl(parts.query))
            status, answer = self._route(method, parts.path, query, headers, body, key)
            if self._take(self.lose_answers, place):
                raise AnswerLost(place)
            return status, answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    @staticmethod
    def _take(counted: Counter[str], place: str) -> bool:
        counted[place] -= 1
        if counted[place] < 0:
            del counted[place]
            return False
        return True

    def _route(
        self, method: str, path: str, query: Json, headers: Mapping[str, str], body: bytes, key: str
    ) -> tuple[int, Any]:
        match method, path.strip("/").split("/")[1:]:
            case "POST", ["files"]:
                return self._upload(headers, body, key)
            case "GET", ["files"]:
                listed = [
                    {"id": id_, "filename": name, "created_at": int(at)}
                    for id_, (owner, name, _, at) in self.files.items()
                    if owner == key
                ]
                return self._page(listed, query, "after")
            case "DELETE", ["files", id_]:
                return (404, {}) if self.files.pop(id_, None) is None else (200, {"id": id_, "deleted": True})
            case "GET", ["files", id_, "content"]:
                for batch in self.batches.values():
                    if id_ in batch.files and batch.key == key:
                        return 200, batch.files[id_].encode()
                return (200, self.files[id_][2]) if id_ in self.files else (404, {})
            case "POST", ["batches"]:
                return self._create_of_file(json.loads(body), key)
            case "GET", ["batches"]:
                mine = [b for b in self.batches.values() if b.key == key and b.file_id]
                return self._page([self._openai(batch) for batch in mine], query, "after")
            case "GET", ["batches", id_]:
                found = self.batches.get(id_)
                return (404, {}) if found is None or found.key != key else (200, self._openai(found))
            case "POST", ["messages", "batches"]:
                return self._create(json.loads(body), headers, len(body), key)
            case "GET", ["messages", "batches"]:
                mine = [b for b in self.batches.values() if b.key == key and not b.file_id]
                return self._page([self._anthropic(batch) for batch in mine], query, "after_id")
            case "GET", ["messages", "batches", id_]:
                found = self.batches.get(id_)
                return (404, {}) if found is None or found.key != key else (200, self._anthropic(found))
            case "GET", ["messages", "batches", id_, "results"]:
                found = self.batches.get(id_)
                if found is None or found.lines is None or found.key != key:
                    return 404, {}
                return 200, "\n".join(found.lines).encode()
            case "DELETE", ["messages", "batches", id_]:
                return 200, {"id": id_}
            case "POST", ["responses" | "messages"] | ["chat", "completions"]:
                read = json.loads(body)
                self.alone.append(read)
                reply = self.reply(read)
                if isinstance(reply, int):
                    return reply, {"error": {"type": "server_error"}}
                return 200, self._response(read, reply, openai=path.endswith("/responses"))
        return 404, {"error": {"type": "not_found_error"}}

    # --- OpenAI. ---

    def _upload(self, headers: Mapping[str, str], body: bytes, key: str) -> tuple[int, Json]:
        boundary = headers["content-type"].partition("boundary=")[2].encode()
        for part in body.split(b"--" + boundary):
            head, _, content = part.partition(b"\r\n\r\n")
            if (found := _NAME.search(head)) is not None:
                content = content.removesuffix(b"\r\n")
                if len(content) > OPENAI_BYTES:
                    return 400, {"error": {"code": "file_too_large"}}
                id_ = self._id("file-")
                self.files[id_] = (key, found[1].decode(), content, self.now())
                return 200, {"id": id_, "object": "file"}
        return 400, {"error": {"code": "no_file"}}

    def _create_of_file(self, asked: Json, key: str) -> tuple[int, Json]:
        file = self.files.get(str(asked.get("input_file_id")))
        if file is None or file[0] != key:
            return 400, {"error": {"code": "invalid_file"}}
        items, refused = [], ""
        try:
            lines = [json.loads(line) for line in file[2].decode().splitlines()]
            items = [(line["custom_id"], line["body"]) for line in lines]
            if any(line["url"] != asked["endpoint"] or line["method"] != "POST" for line in lines):
                refused = "mismatched_endpoint"
        except (ValueError, LookupError):
            refused = "invalid_json_line"
        if len({body.get("model") for _, body in items}) > 1:
            refused = "mismatched_model"
        if len({id_ for id_, _ in items}) != len(items):
            refused = "duplicate_custom_id"
        if len(items) > OPENAI_MOST:
            refused = "too_many_requests"
        if any(body.get("poison") for _, body in items):
            refused = "invalid_request"
        batch = self._begin("batch_", key, items)
        batch.file_id, batch.endpoint, batch.refused = asked["input_file_id"], asked["endpoint"], refused
        return 200, self._openai(batch)

    def _openai(self, batch: Batch) -> Json:
        is_over = batch.lines is not None
        status = "in_progress"
        if batch.refused:
            status = "failed"
        elif is_over:
            status = "expired" if batch.expires else "completed"
        files = list(batch.files)
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": batch.endpoint,
            "input_file_id": batch.file_id,
            "status": status,
            "created_at": int(batch.created_at),
            "output_file_id": files[0] if files else None,
            "error_file_id": files[1] if len(files) > 1 else None,
            "request_counts": {"total": len(batch.items)},
            "errors": {"data": [{"code": batch.refused, "line": 1}]} if batch.refused else None,
        }

    # --- Anthropic. ---

    def _create(self, asked: Json, headers: Mapping[str, str], size: int, key: str) -> tuple[int, Json]:
        if set(asked) != {"requests"} or not asked["requests"] or len(asked["requests"]) > ANTHROPIC_MOST:
            return 400, {"error": {"type": "invalid_request_error"}}
        if size > ANTHROPIC_BYTES:
            return 413, {"error": {"type": "request_too_large"}}
        items = [(one["custom_id"], one["params"]) for one in asked["requests"]]
        ids = {id_ for id_, _ in items}
        if len(ids) != len(items) or not all(_CUSTOM_ID.fullmatch(id_) for id_ in ids):
            return 400, {"error": {"type": "invalid_request_error"}}
        if any(body.get("poison") for _, body in items):
            return 400, {"error": {"type": "invalid_request_error"}}
        batch = self._begin("msgbatch_", key, items)
        batch.betas = headers.get("anthropic-beta", "")
        return 200, self._anthropic(batch)

    def _anthropic(self, batch: Batch) -> Json:
        over = batch.lines is not None
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": "ended" if over else "in_progress",
            "created_at": datetime.fromtimestamp(batch.created_at, UTC).isoformat(),
            "request_counts": {
                "processing": 0 if over else len(batch.items),
                "succeeded": len(batch.items) * over,
            },
            "results_url": "https://elsewhere.example/results",
        }

    # --- Both. ---

    def _begin(self, prefix: str, key: str, items: list[tuple[str, Json]]) -> Batch:
        now = self.now()
        batch = Batch(self._id(prefix), key, now, now + self.takes(), items)
        self.batches[batch.id] = batch
        return batch

    def _settle(self) -> None:
        """End the batches whose time has come."""
        for batch in self.batches.values():
            if batch.lines is None and not batch.refused and self.now() >= batch.ends_at:
                self._end(batch)

    def _end(self, batch: Batch) -> None:
        good, bad = [], []
        is_openai = bool(batch.file_id)
        for id_, body in batch.items:
            if self.random.random() < self.expire:
                batch.expires = True
                bad.append(self._unrun(id_, openai=is_openai))
                continue
            reply = self.reply(body)
            if isinstance(reply, int):
                bad.append(self._failed(id_, reply, openai=is_openai))
                continue
            self.paid[id_] += 1
            good.append(self._done(id_, body, reply, batch))
        self.random.shuffle(good)
        batch.lines = [*good, *bad] if not is_openai else good
        if is_openai:
            batch.files = {self._id("file-"): "\n".join(good)}
            if bad:
                batch.files[self._id("file-")] = "\n".join(bad)

    def _done(self, id_: str, body: Json, reply: Any, batch: Batch) -> str:
        if not batch.file_id:
            message = self._response(body, reply, openai=False)
            return json.dumps({"custom_id": id_, "result": {"type": "succeeded", "message": message}})
        response = self._response(body, reply, openai="input" in body)
        return json.dumps(
            {"custom_id": id_, "response": {"status_code": 200, "body": response}, "error": None}
        )

    def _failed(self, id_: str, status: int, *, openai: bool) -> str:
        error = {"error": {"type": "server_error", "message": "no"}}
        if openai:
            return json.dumps({"custom_id": id_, "response": {"status_code": status, "body": error}})
        return json.dumps(
            {"custom_id": id_, "result": {"type": "errored", "error": {"type": "error", **error}}}
        )

    def _unrun(self, id_: str, *, openai: bool) -> str:
        if openai:
            return json.dumps({"custom_id": id_, "response": None, "error": {"code": "batch_expired"}})
        return json.dumps({"custom_id": id_, "result": {"type": "expired"}})

    def _response(self, body: Json, reply: Any, *, openai: bool) -> Json:
        input_, output = self.tokens
        if openai:
            if isinstance(reply, tuple):
                call = {"type": "function_call", "id": "fc_1", "call_id": f"call_{self._id('')}"}
                parts = [call | {"name": reply[0], "arguments": json.dumps(reply[1]), "status": "completed"}]
            else:
                text = {"type": "output_text", "text": reply, "annotations": []}
                message = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
                parts = [message | {"content": [text]}]
            usage = {"input_tokens": input_, "output_tokens": output, "total_tokens": input_ + output}
            details = {"input_tokens_details": {"cached_tokens": 0}}
            details |= {"output_tokens_details": {"reasoning_tokens": 0}}
            head = {"id": self._id("resp_"), "object": "response", "created_at": int(self.now())}
            head |= {"model": body["model"], "status": "completed", "parallel_tool_calls": True}
            return head | {"output": parts, "usage": usage | details, "tools": [], "tool_choice": "auto"}
        if isinstance(reply, tuple):
            content = [{"type": "tool_use", "id": self._id("toolu_"), "name": reply[0], "input": reply[1]}]
        else:
            content = [{"type": "text", "text": reply}]
        usage = {"input_tokens": input_, "output_tokens": output}
        head = {"id": self._id("msg_"), "type": "message", "role": "assistant", "model": body["model"]}
        stop = "tool_use" if isinstance(reply, tuple) else "end_turn"
        return head | {"content": content, "stop_reason": stop, "stop_sequence": None, "usage": usage}

    def _page(self, listed: list[Json], query: Json, cursor: str) -> tuple[int, Json]:
        newest = listed[::-1]
        if cursor in query:
            ids = [item["id"] for item in newest]
            newest = newest[ids.index(query[cursor]) + 1 :] if query[cursor] in ids else []
        most = int(query.get("limit", 20))
        return 200, {"data": newest[:most], "has_more": len(newest) > most}

    def _id(self, prefix: str) -> str:
        self._number += 1
        return f"{prefix}{self._number}"


def client_of(apis: ModelApis) -> httpx.AsyncClient:
    """A client whose requests the fakes answer, whatever their host."""

    def handle(request: httpx.Request) -> httpx.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            status, body = apis.answer(request.method, str(request.url), headers, request.read())
        except AnswerLost as lost:
            raise httpx.ReadError(str(lost)) from lost
        return httpx.Response(status, content=body)

    return httpx.AsyncClient(transport=httpx.MockTransport(handle))


@contextmanager
def serving(apis: ModelApis) -> Iterator[str]:
    """The base URL of the fakes over HTTP."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            try:
                status, content = apis.answer(self.command, self.path, headers, body)
            except AnswerLost:
                self.close_connection = True
                self.connection.close()
                return
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
