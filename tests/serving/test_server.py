"""The HTTP server of a model: what it answers, what it refuses, and that it says nothing of a customer."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import polars as pl
import pytest

from dist_train import load
from tests.cli.in_process import command
from tests.commands import REPOSITORY
from tests.ranks import free_port

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")

from fastapi.testclient import TestClient

from dist_train.serving.app import make_app
from dist_train.serving.settings import Settings

RECORD: dict[str, Any] = {
    "income": 31415.0, "age": 40, "flat": 1.5, "limit": 31415.0, "purpose": "car", "owner": True, "branch": None,
}  # fmt: skip
KEY = "a key of this test"


def client(model: Path, **settings: Any) -> TestClient:
    return TestClient(make_app(Settings(model=str(model), name="risk", **settings)), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def plain(plain_onnx: Path) -> TestClient:
    return client(plain_onnx)


def test_scores_are_those_of_the_predictor(plain: TestClient, model_of: Any) -> None:
    records = [RECORD, RECORD | {"income": None, "purpose": "boat", "owner": "false", "more": 1}] * 40
    answer = plain.post("/v1/score", json={"records": records})
    assert answer.status_code == 200
    predictions = answer.json()["predictions"]
    found = [[row["probabilities"][name] for name in ("no", "yes")] for row in predictions]
    frame = pl.DataFrame([{key: str(v) if key == "owner" else v for key, v in row.items()} for row in records])
    expected = load(model_of("plain")).predict_proba(frame.drop("more").with_columns(pl.col("branch").cast(pl.String)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert [row["predicted_class"] for row in predictions] == [("no", "yes")[i] for i in expected.argmax(1)]
    assert {"row": 1, "column": "purpose", "problem": "a category that the model does not know"} in answer.json()[
        "warnings"
    ]


def test_reasons_are_those_of_the_predictor(plain_onnx: Path, model_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = model_of("plain")
    explaining = client(plain_onnx, run=str(run))
    records = [RECORD, RECORD | {"income": None, "purpose": "boat", "age": 75}]
    answer = explaining.post("/v1/score", json={"records": records, "reasons": 3}).json()
    assert "boat" not in caplog.text, "no value of a record is logged"
    cells = [{name: None if value is None else str(value) for name, value in row.items()} for row in records]
    frame = pl.DataFrame([row | {"owner": "true"} for row in cells])
    numbers = dict.fromkeys(("income", "age", "flat", "limit"), pl.Float64)
    explanation = load(run).explain(frame.with_columns(pl.col(name).cast(kind) for name, kind in numbers.items()))
    for row, expected in zip(answer["predictions"], explanation.reasons(3).iter_rows(named=True), strict=True):
        found = [(reason["column"], reason["effect"]) for reason in row["reasons"]]
        pairs = [(expected[f"reason_{i}"], expected[f"effect_{i}"]) for i in (1, 2, 3)]
        assert found == [pair for pair in pairs if pair[0] is not None]
        whole = row["baseline_log_odds"] + sum(effect for _, effect in found) + row["other_effects"]
        assert row["log_odds"] == pytest.approx(whole + row["reasons_error"])
    assert answer["reasons"] == {"class": explanation.positive, "calibrated": explanation.calibrated}
    assert "reasons" not in explaining.post("/v1/score", json={"records": records}).json()["predictions"][0]
    for wrong in (-1, 8, True, "four"):
        refused = explaining.post("/v1/score", json={"records": records, "reasons": wrong})
        assert (refused.status_code, "whole number from 0 to 7" in refused.text) == (422, True)


def test_the_open_inference_protocol(plain: TestClient) -> None:
    metadata = plain.get("/v2/models/risk").json()
    assert plain.get("/v2/models/risk/ready").json()["ready"] is True
    inputs = [
        {"name": given["name"], "datatype": given["datatype"], "shape": [2, 1], "data": [RECORD[given["name"]]] * 2}
        for given in metadata["inputs"]
    ]
    answer = plain.post("/v2/models/risk/infer", json={"id": "7", "inputs": inputs}).json()
    (output,) = answer["outputs"]
    assert (answer["id"], output["shape"], output["datatype"]) == ("7", [2, 2], "FP64")
    one = plain.post("/v1/score", json={"records": [RECORD]}).json()["predictions"][0]["probabilities"]
    assert output["data"] == [one["no"], one["yes"]] * 2
    assert plain.get("/v2/models/other").status_code == 404


def test_the_example_of_the_openapi_page_is_scored(plain: TestClient) -> None:
    page = plain.get("/openapi.json").json()
    example = page["paths"]["/v1/score"]["post"]["requestBody"]["content"]["application/json"]["schema"]["example"]
    assert plain.post("/v1/score", json=example).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"{", 400, "no JSON"),
        (b'{"records": [{"income": NaN}]}', 400, "null is a missing cell"),
        (b"[" * 100_000, 400, "no JSON"),
        (b'{"records": []}', 422, "1 to 10,000 rows"),
        (b'{"records": [], "reasons": 4}', 422, "started with a run and --reasons"),
        (b'{"records": [3]}', 422, "row 0: must be an object"),
        (b'{"records": [{"income": 1}]}', 422, "null is a missing cell"),
        (json.dumps({"records": [RECORD | {"age": "secret"}]}).encode(), 422, "column 'age': must be a number"),
        (json.dumps({"records": [RECORD | {"age": 1e300}]}).encode(), 422, "beyond the range of float32"),
        (json.dumps({"records": [RECORD | {"purpose": "\ud800"}]}).encode(), 422, "no valid Unicode"),
    ],
)
def test_what_cannot_be_scored_is_refused_without_its_values(
    plain: TestClient, body: bytes, status: int, text: str
) -> None:
    answer = plain.post("/v1/score", content=body)
    assert answer.status_code == status
    assert text in answer.text
    assert "secret" not in answer.text


def test_keys_sizes_rates_and_the_contract(plain_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# ours\n{KEY}\n")
    guarded = client(plain_onnx, api_key_file=str(tmp_path / "keys"), max_bytes=2000, contract="refuse")
    assert guarded.get("/health").status_code == 200
    assert guarded.post("/v1/score", json={"records": [RECORD]}).status_code == 401
    assert guarded.post("/v1/score", json={"records": [RECORD]}, headers={"X-API-Key": KEY + "!"}).status_code == 401
    bearer = {"Authorization": f"Bearer {KEY}"}
    assert guarded.post("/v1/score", json={"records": [RECORD]}, headers=bearer).status_code == 200
    outside = guarded.post("/v1/score", json={"records": [RECORD | {"age": 1000}]}, headers=bearer)
    assert outside.status_code == 422
    assert outside.json()["problems"] == [
        {"row": 0, "column": "age", "problem": "above the range of the training rows"}
    ]
    assert guarded.post("/v1/score", content=b" " * 2001, headers=bearer).status_code == 413
    parts = (b" " * 500 for _ in range(5))
    assert guarded.post("/v1/score", content=parts, headers=bearer).status_code == 413
    slow = client(plain_onnx, rate=2.0)
    statuses = [slow.post("/v1/score", json={"records": [RECORD]}).status_code for _ in range(4)]
    assert statuses[:2] == [200, 200]
    assert 429 in statuses


def test_the_log_and_the_metrics_have_no_values(plain_onnx: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_test = client(plain_onnx)
    of_test.post("/v1/score?name=secret", json={"records": [RECORD | {"purpose": "secret"}]}, headers={"X": "secret"})
    of_test.get("/secret")
    metrics = of_test.get("/metrics").text
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["route"], line["status"], line["rows"]) for line in lines[:2]] == [
        ("/v1/score", 200, 1),
        ("", 404, 0),
    ]
    assert 'dist_train_unlike_training_total{column="purpose"} 1.0' in metrics
    assert "secret" not in metrics + json.dumps(lines)


def malformed(generator: random.Random) -> bytes:
    """A request of which something has been spoilt: a value, a name, the structure, or bytes."""
    values: list[Any] = [
        None, True, -1, 1e39, 10**400, "", "x" * 300, "\0", "\ud800", [], [1], {}, {"a": []}, "2020-01-31", 0.1, "nan",
    ]  # fmt: skip
    record: dict[str, Any] = dict(RECORD)
    for _ in range(generator.randint(0, 3)):
        record[generator.choice([*RECORD, "other", ""])] = generator.choice(values)
    if generator.random() < 0.2:
        record.pop(generator.choice(list(record)))
    inputs = [{"name": name, "datatype": "FP64", "shape": [1, 1], "data": [value]} for name, value in record.items()]
    inputs[0][generator.choice(["name", "datatype", "shape", "data"])] = generator.choice(values)
    body = generator.choice(
        [{"records": [record]}, {"records": record}, {"inputs": inputs}, {"inputs": record}, [record]]
    )
    data = bytearray(json.dumps(body).encode())
    for _ in range(generator.choice([0, 0, 1, 5])):
        data[generator.randrange(len(data))] = generator.randrange(256)
    return bytes(data[: generator.choice([len(data), len(data), generator.randrange(len(data))])])


@pytest.mark.parametrize("number", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_malformed_requests_are_the_clients_fault(plain: TestClient, number: int) -> None:
    generator = random.Random(number)
    for _ in range(number):
        body = malformed(generator)
        route = generator.choice(["/v1/score", "/v2/models/risk/infer"])
        answer = plain.post(route, content=body)
        assert answer.status_code in (200, 400, 422), (body, answer.text)


def test_mistakes_in_the_arguments_cost_a_line(plain_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("short\n")
    (tmp_path / "no.onnx").write_text("no model")
    for arguments, text in [
        ((plain_onnx, "--host", "0.0.0.0"), "name --api-key-file"),
        ((plain_onnx, "--api-key-file", tmp_path / "keys"), "shorter than 16 characters"),
        ((tmp_path / "no.onnx",), "is no file of `dist-train export`"),
        ((tmp_path / "none.onnx",), "there is no such file"),
        ((plain_onnx, "--engine", "vllm", "--workers", "2"), "--workers: is an option of --engine onnx"),
    ]:
        outcome = command("serve", *arguments)
        assert outcome.code == 2
        assert text in outcome.err


@pytest.fixture
def running(plain_onnx: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "dist_train", "serve", plain_onnx, "--port", str(port), "--workers", "2"],
        stdout=subprocess.DEVNULL, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.kill()


@pytest.mark.slow  # starts processes
def test_a_killed_worker_is_replaced_and_sigterm_ends_the_server(
    running: tuple[subprocess.Popen[str], str],
) -> None:
    server, address = running
    assert answered(address)
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    for pid in workers:
        os.kill(int(pid), signal.SIGKILL)
    assert answered(address)
    server.terminate()
    assert server.wait(60) == 0


def test_sigterm_finishes_a_request_that_has_begun(plain_onnx: Path) -> None:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "dist_train", "serve", plain_onnx, "--port", str(port)],
        stdout=subprocess.DEVNULL, cwd=REPOSITORY,
    )  # fmt: skip
    try:
        assert answered(f"http://127.0.0.1:{port}")
        body = json.dumps({"records": [RECORD]}).encode()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as begun:
            begun.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
            begun.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body[:20])
            time.sleep(0.5)  # the server has read what there is
            server.terminate()
            time.sleep(0.5)
            assert server.poll() is None
            begun.sendall(body[20:])
            answer = b"".join(iter(lambda: begun.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"predicted_class" in answer
        assert server.wait(60) == 0
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
    finally:
        server.kill()


def answered(address: str) -> bool:
    body = json.dumps({"records": [RECORD]}).encode()
    for _ in range(120):
        try:
            with urlopen(Request(f"{address}/v1/score", body), timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    return False
