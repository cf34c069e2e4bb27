"""Load on a server of `dist-train serve`: seconds of requests of one record, and its memory.

    dist-train serve credit_risk.onnx --workers 2 > /dev/null &
    python -m benchmarks.http_load http://127.0.0.1:8000 --requests 100000 --connections 32 --pid $!

The record is the example of the server's OpenAPI page. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--pid", type=int, help="process of the server, whose memory and that of its workers is read")
    arguments = parser.parse_args()
    with urlopen(f"{arguments.address}/openapi.json") as page:
        schema = json.load(page)["paths"]["/v1/score"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body = json.dumps(schema["example"]).encode()
    head = f"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    host = urlsplit(arguments.address)
    tenth = arguments.requests // 10
    warm, _ = asyncio.run(_load(host.hostname or "", host.port or 80, head + body, tenth, arguments.connections))
    before, start = _resident(arguments.pid), time.perf_counter()
    seconds, errors = asyncio.run(
        _load(host.hostname or "", host.port or 80, head + body, arguments.requests, arguments.connections)
    )
    took = time.perf_counter() - start
    seconds.sort()
    found = {
        "requests": len(seconds),
        "errors": errors,
        "requests_per_second": round(len(seconds) / took),
        "p50_ms": round(seconds[len(seconds) // 2] * 1e3, 2),
        "p99_ms": round(seconds[len(seconds) * 99 // 100] * 1e3, 2),
        "resident_MiB_before": before,
        "resident_MiB_after": _resident(arguments.pid),
        "warm_up_requests": len(warm),
    }
    print(json.dumps(found))


async def _load(host: str, port: int, request: bytes, number: int, connections: int) -> tuple[list[float], int]:
    seconds: list[float] = []
    errors = 0
    left = number

    async def connection() -> None:
        nonlocal errors, left
        reader, writer = await asyncio.open_connection(host, port)
        while left > 0:
            left -= 1
            start = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            seconds.append(time.perf_counter() - start)
            errors += b" 200 " not in head[:16]
        writer.close()

    await asyncio.gather(*(connection() for _ in range(connections)))
    return seconds, errors


def _resident(pid: int | None) -> float | None:
    """MiB of a process and its children."""
    if pid is None:
        return None
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0
    for process in [pid, *map(int, children)]:
        status = Path(f"/proc/{process}/status").read_text()
        total += int(status.partition("VmRSS:")[2].split()[0])
    return round(total / 1024, 1)


if __name__ == "__main__":
    main()
