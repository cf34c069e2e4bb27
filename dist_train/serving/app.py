"""The HTTP application of a model: `/v1/score`, the Open Inference Protocol below `/v2`, health and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool

from dist_train import __version__
from dist_train.serving.guard import Guard
from dist_train.serving.inference_protocol import from_tensors, metadata_of, to_tensors
from dist_train.serving.metrics import Metrics
from dist_train.serving.onnx_model import BadRecord, OnnxModel
from dist_train.serving.settings import Settings, api_keys

if TYPE_CHECKING:
    from dist_train.serving.reasons import Reasons

_FEW_ROWS = 64
"""So many rows take less time than another thread needs to begin."""
_PROTOCOL = "/v2/models/{name}"
_NAMED: dict[int | str, dict[str, Any]] = {401: {"description": "no key"}, 404: {"description": "no such model"}}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "no JSON"},
    401: {"description": "no key"},
    413: {"description": "too large"},
    422: {"description": "not scored"},
    429: {"description": "too many"},
}
_SERVER = {"name": "dist_train", "version": __version__, "extensions": []}


class BadBody(ValueError):
    """A body that is not what the route takes."""


class UnlikeTraining(Exception):
    """Cells outside of what training had, where the contract refuses them."""


def make_app(settings: Settings) -> FastAPI:
    """The application; UserError where the model or the keys cannot be read."""
    model = OnnxModel(Path(settings.model))
    metrics = Metrics(several=settings.workers > 1)
    app = FastAPI(title=f"dist_train: {settings.name}", version=__version__)
    scorer = _Scorer(model, settings, metrics)
    reasons = None
    if settings.run is not None:
        from dist_train.serving.reasons import Reasons  # imports torch and polars, which a file alone does without

        reasons = Reasons(Path(settings.run))
    keys = api_keys(settings.api_key_file)
    app.add_middleware(Guard, keys=keys, max_bytes=settings.max_bytes, rate=settings.rate, metrics=metrics)
    _add_errors(app)
    _add_scoring(app, model, scorer, reasons)
    _add_protocol(app, model, scorer, settings.name)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": settings.name, "hashes": model.metadata["hashes"]}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_page() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return app


class _Scored(NamedTuple):
    """Of a request: the cells of each column, probabilities of each row, cells unlike those of training."""

    cells: list[list[float | str]]
    probabilities: list[list[float]]
    problems: list[dict[str, Any]]


class _Scorer:
    """Records -> probabilities, within the limits of the settings."""

    def __init__(self, model: OnnxModel, settings: Settings, metrics: Metrics) -> None:
        self.model, self.settings, self.metrics = model, settings, metrics

    async def __call__(self, records: Sequence[Mapping[str, Any]], request: Request) -> _Scored:
        if not 1 <= len(records) <= self.settings.max_rows:
            raise BadRecord(f"a request has 1 to {self.settings.max_rows:,} rows")
        request.state.rows = len(records)
        if len(records) <= _FEW_ROWS:
            return self._score(records)
        return await run_in_threadpool(self._score, records)

    def _score(self, records: Sequence[Mapping[str, Any]]) -> _Scored:
        cells = self.model.cells(records)
        problems = [] if self.settings.contract == "ignore" else self.model.problems(cells)
        for problem in problems:
            self.metrics.unlike_training(problem["column"])
        if problems and self.settings.contract == "refuse":
            raise UnlikeTraining(problems)
        return _Scored(cells, self.model.probabilities(self.model.inputs(cells)).tolist(), problems)


def _add_scoring(app: FastAPI, model: OnnxModel, scorer: _Scorer, reasons: Reasons | None) -> None:
    properties = {
        column.name: {"type": ["string", "number", "boolean", "null"]}
        if column.is_text
        else {"type": ["number", "string", "null"] if column.is_moment else ["number", "null"]}
        for column in model.columns
    }
    record = {"type": "object", "properties": properties, "required": list(properties)}
    schema = {
        "type": "object",
        "required": ["records"],
        "properties": {
            "records": {"type": "array", "minItems": 1, "maxItems": scorer.settings.max_rows, "items": record},
            "reasons": {"type": "integer", "minimum": 0, "maximum": reasons.most if reasons else 0},
        },
        "example": {"records": [model.example]},
    }

    @app.post("/v1/score", openapi_extra=_body(schema), responses=_REFUSALS)
    async def score(request: Request) -> dict[str, Any]:
        """Probabilities and predicted class of each record; columns that the model does not have are ignored."""
        body = _object(await request.body())
        number = _number_of_reasons(body.get("reasons", 0), reasons)
        records = body.get("records")
        if not isinstance(records, list):
            raise BadRecord("the body must be an object with the list `records`")
        scored = await scorer(records, request)
        predictions = [
            {
                "predicted_class": model.classes[max(range(len(row)), key=row.__getitem__)],
                "probabilities": dict(zip(model.classes, row, strict=True)),
            }
            for row in scored.probabilities
        ]
        answer = {"predictions": predictions, "warnings": scored.problems}
        if reasons is None or number == 0:
            return answer
        names = [column.name for column in model.columns]
        explained = await run_in_threadpool(reasons.of, names, scored.cells, number)
        for prediction, of_row in zip(predictions, explained, strict=True):
            prediction |= of_row
        return answer | {"reasons": reasons.described}


def _number_of_reasons(wanted: object, reasons: Reasons | None) -> int:
    if wanted and reasons is None:
        raise BadRecord("`reasons` are computed where the server was started with a run and --reasons")
    most = reasons.most if reasons else 0
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 <= wanted <= most:
        raise BadRecord(f"`reasons` must be a whole number from 0 to {most}")
    return wanted


def _add_protocol(app: FastAPI, model: OnnxModel, scorer: _Scorer, name: str) -> None:
    def is_unknown(asked: str) -> JSONResponse | None:
        return None if asked == name else JSONResponse({"error": "there is no such model"}, 404)

    @app.get("/v2")
    async def server() -> dict[str, Any]:
        return _SERVER

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.get(_PROTOCOL, responses=_NAMED, response_model=None)
    async def model_metadata(name: str) -> dict[str, Any] | JSONResponse:
        return is_unknown(name) or metadata_of(model, name)

    @app.get(f"{_PROTOCOL}/ready", responses=_NAMED, response_model=None)
    async def model_ready(name: str) -> dict[str, Any] | JSONResponse:
        return is_unknown(name) or {"name": name, "ready": True}

    example = {"inputs": to_tensors(model, model.example)}

    request_body = _body({"type": "object", "example": example})

    @app.post(f"{_PROTOCOL}/infer", openapi_extra=request_body, responses=_NAMED | _REFUSALS, response_model=None)
    async def infer(name: str, request: Request) -> dict[str, Any] | JSONResponse:
        """The Open Inference Protocol with JSON bodies: an input of shape [rows, 1] for each column."""
        unknown = is_unknown(name)
        if unknown:
            return unknown
        body = _object(await request.body())
        probabilities = (await scorer(from_tensors(model, body, scorer.settings.max_rows), request)).probabilities
        output = {"name": "probabilities", "datatype": "FP64", "shape": [len(probabilities), len(model.classes)]}
        flat = [value for row in probabilities for value in row]
        identity = {"id": body["id"]} if isinstance(body.get("id"), str) else {}
        return {"model_name": name, "model_version": "1", **identity, "outputs": [{**output, "data": flat}]}


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(BadBody)
    async def bad_body(request: Request, error: BadBody) -> JSONResponse:
        return _refusal(request, 400, str(error))

    @app.exception_handler(BadRecord)
    async def bad_record(request: Request, error: BadRecord) -> JSONResponse:
        return _refusal(request, 422, str(error))

    @app.exception_handler(UnlikeTraining)
    async def unlike_training(_: Request, error: UnlikeTraining) -> JSONResponse:
        return JSONResponse({"detail": "cells are unlike those of training", "problems": error.args[0]}, 422)


def _refusal(request: Request, status: int, text: str) -> JSONResponse:
    return JSONResponse({"error" if request.url.path.startswith("/v2/") else "detail": text}, status)


def _body(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _object(body: bytes) -> dict[str, Any]:
    def refuse(_: str) -> float:
        raise BadBody("NaN and Infinity are no JSON: null is a missing cell")

    try:
        found = json.loads(body, parse_constant=refuse)
    except BadBody:
        raise
    except (ValueError, RecursionError):
        raise BadBody("the body is no JSON") from None
    if not isinstance(found, dict):
        raise BadBody("the body must be a JSON object")
    return found
