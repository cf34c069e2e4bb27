"""What each request passes before it is answered: key, rate, size; and the line of the access log after it."""

from __future__ import annotations

import hmac
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dist_train.serving.metrics import Metrics

_OPEN = ("/health", "/v2/health/live", "/v2/health/ready")
_MAX_CLIENTS = 10_000
_DETAILS = {401: "the header X-API-Key has no valid key", 413: "the body is too large", 429: "too many requests"}


class TooLarge(Exception):
    """The body of a request has more bytes than the limit."""


class Guard:
    """Middleware around the application.

    The log has a line of JSON for each request: time, request id, method, route, status, rows, seconds. It has no path
    as it was sent, no header and no value of a customer.
    """

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[bytes], max_bytes: int, rate: float, metrics: Metrics, log: bool = True
    ) -> None:
        self.app, self.keys, self.max_bytes, self.rate, self.metrics = app, keys, max_bytes, rate, metrics
        self.log = log
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, begun = time.perf_counter(), 500, False
        request_id = uuid4().hex
        scope.setdefault("state", {})["rows"] = 0

        async def sending(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                begun, status = True, message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            refused = self._refused(scope)
            if refused:
                await _answer(refused, sending)
            else:
                await self.app(scope, self._limited(receive), sending)
        except TooLarge:
            await _answer(413, sending)
        except Exception as error:
            print(json.dumps({"request": request_id, "fault": type(error).__name__}), file=sys.stderr, flush=True)
            if not begun:
                await _answer(500, sending)
        finally:
            self._tell(scope, request_id, status, time.perf_counter() - start)

    def _refused(self, scope: Scope) -> int:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.max_bytes:
            return 413
        if self.keys and scope["path"] not in _OPEN and not self._is_known(headers):
            return 401
        if self.rate and scope["path"] not in _OPEN and not self._has_turn(scope):
            return 429
        return 0

    def _is_known(self, headers: dict[bytes, bytes]) -> bool:
        given = headers.get(b"x-api-key") or headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        fits = [hmac.compare_digest(given, key) for key in self.keys]  # all are compared: no time tells which fits
        return any(fits)

    def _has_turn(self, scope: Scope) -> bool:
        """A bucket for each client: it fills by `rate` a second up to one second's worth."""
        client = (scope.get("client") or ("",))[0]
        now, size = time.monotonic(), max(1.0, self.rate)
        left, then = self._buckets.pop(client, (size, now))
        left = min(size, left + (now - then) * self.rate)
        self._buckets[client] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > _MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return left >= 1

    def _limited(self, receive: Receive) -> Receive:
        total = 0

        async def receiving() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.max_bytes:
                raise TooLarge
            return message

        return receiving

    def _tell(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "")
        rows = scope["state"]["rows"]
        self.metrics.count(route, status, seconds, rows)
        if not self.log:
            return
        line: dict[str, Any] = {
            "time": round(time.time(), 3),
            "request": request_id,
            "method": scope["method"] if scope["method"] in ("GET", "POST") else "other",
            "route": route,
            "status": status,
            "rows": rows,
            "seconds": round(seconds, 6),
        }
        print(json.dumps(line), flush=True)


async def _answer(status: int, send: Send) -> None:
    body = json.dumps({"detail": _DETAILS.get(status, "the server has a fault")}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
