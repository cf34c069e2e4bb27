"""Other projects' programs against the server: schemathesis and the client of the Triton Inference Server."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from dist_train.serving.app import make_app
from dist_train.serving.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the other projects


def app_of(model: Path) -> FastAPI:
    return make_app(Settings(model=str(model), name="risk"))


@pytest.mark.parametrize("examples", [15, pytest.param(1500, marks=pytest.mark.slow)])
def test_schemathesis_finds_no_answer_that_the_openapi_document_does_not_have(plain_onnx: Path, examples: int) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as of_document

    checks = [not_a_server_error, of_document.status_code_conformance, of_document.content_type_conformance]
    document = schemathesis.openapi.from_asgi("/openapi.json", app_of(plain_onnx))
    seen: Counter[tuple[str, int]] = Counter()
    for found in document.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=examples if operation.method == "post" else 5, deadline=None, database=None,
            derandomize=True, suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def call(case: Any) -> None:
            answer = case.call()
            seen[case.operation.label, answer.status_code] += 1
            case.validate_response(answer, checks=checks)

        call()
    routes = {route for route, _ in seen}
    assert {"POST /v1/score", "POST /v2/models/{name}/infer", "GET /metrics"} <= routes
    assert max(status for _, status in seen) < 500


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    import uvicorn

    with socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.02)
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def test_the_client_of_triton_gets_the_probabilities(plain_onnx: Path) -> None:
    client = pytest.importorskip("tritonclient.http")
    app = app_of(plain_onnx)
    example = TestClient(app).get("/openapi.json").json()["paths"]["/v1/score"]["post"]["requestBody"]
    record = example["content"]["application/json"]["schema"]["example"]["records"][0]
    expected = TestClient(app).post("/v1/score", json={"records": [record] * 2}).json()["predictions"][0]
    with served(app) as address:
        triton = client.InferenceServerClient(address)
        assert triton.is_server_live()
        assert triton.is_server_ready()
        assert triton.is_model_ready("risk")
        assert not triton.is_model_ready("other")
        inputs = []
        for given_input in triton.get_model_metadata("risk")["inputs"]:
            cell, is_text = record[given_input["name"]], given_input["datatype"] == "BYTES"
            value = ("" if cell is None else str(cell)) if is_text else (np.nan if cell is None else cell)
            values = np.array([[value], [value]], dtype=object if is_text else np.float64)
            inputs.append(client.InferInput(given_input["name"], [2, 1], given_input["datatype"]))
            inputs[-1].set_data_from_numpy(values, binary_data=False)
        output = client.InferRequestedOutput("probabilities", binary_data=False)
        found = triton.infer("risk", inputs, outputs=[output]).as_numpy("probabilities")
        with pytest.raises(Exception, match="is not there"):
            triton.infer("risk", inputs[:1], outputs=[output])
        triton.close()
    np.testing.assert_allclose(found, [list(expected["probabilities"].values())] * 2, rtol=0, atol=1e-12)
