"""A predictor as an ONNX file: raw columns in, calibrated probabilities out."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from dist_train.data.encoding.encoder import category_codes, with_missing_cells
from dist_train.data.encoding.spec import UNKNOWN, CategoricalColumn, FeatureSpec
from dist_train.errors import UserError
from dist_train.serving.network import ExportableNetwork
from dist_train.serving.onnx_model import OUTPUT

OPSET, ML_OPSET = 18, 3
_DAY_FORMS = ("{} 00:00:00", "{}T00:00:00")


def onnx_bytes(network: ExportableNetwork, metadata: Mapping[str, Any], missing_values: Sequence[str]) -> bytes:
    """The file: an input for each column, (rows, 1) double or string, and the output `probabilities`, (rows, classes).

    Raises:
        UserError: the packages of the extra `export` are not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError:
        raise UserError("ONNX needs onnx and onnxscript: pip install 'dist_train[export]'") from None
    model = onnx.compose.merge_models(
        _front(network, missing_values), _exported(network), io_map=[("numbers_", "numbers"), ("codes_", "codes")]
    )
    model.producer_name = "dist_train"
    model.doc_string = f"Inputs are raw columns, (rows, 1). The output {OUTPUT} has the classes of the metadata."
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def _exported(network: ExportableNetwork) -> Any:
    """The model of ONNX of the network alone."""
    import onnx

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                exported_program(network), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=["numbers", "codes"], output_names=[OUTPUT],
            )  # fmt: skip
    finally:
        logger.setLevel(level)
    assert program is not None
    model = program.model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "rows"
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", OPSET)])
    return model


def exported_program(network: ExportableNetwork) -> torch.export.ExportedProgram:
    """The network as torch.export has it: numbers (rows, columns) float64, codes (rows, columns) int64."""
    rows = torch.export.Dim("rows")
    numbers = torch.zeros((3, len(network.numbers)), dtype=torch.float64)
    codes = torch.zeros((3, len(network.vocabularies)), dtype=torch.int64)
    with torch.no_grad():
        return torch.export.export(
            network.eval(), (numbers, codes), dynamic_shapes={"numbers": {0: rows}, "codes": {0: rows}}
        )


def _front(network: ExportableNetwork, missing_values: Sequence[str]) -> Any:
    """Raw columns -> the two tensors of the network."""
    from onnx import TensorProto, helper

    inputs = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["rows", 1]) for name in network.numbers]
    names = list(dict.fromkeys(column.name for column in network.vocabularies))
    inputs += [helper.make_tensor_value_info(name, TensorProto.STRING, ["rows", 1]) for name in names]
    nodes = []
    for index, column in enumerate(network.vocabularies):
        table = spellings(column, missing_values)
        nodes.append(
            helper.make_node(
                "LabelEncoder", [column.name], [f"code_{index}_"], domain="ai.onnx.ml", keys_strings=list(table),
                values_int64s=list(table.values()), default_int64=UNKNOWN,
            )
        )  # fmt: skip
    nodes += _joined(network.numbers, "numbers_", inputs[0].name, TensorProto.DOUBLE)
    codes = [f"code_{index}_" for index in range(len(network.vocabularies))]
    nodes += _joined(codes, "codes_", inputs[0].name, TensorProto.INT64)
    outputs = [
        helper.make_tensor_value_info("numbers_", TensorProto.DOUBLE, ["rows", len(network.numbers)]),
        helper.make_tensor_value_info("codes_", TensorProto.INT64, ["rows", len(codes)]),
    ]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
    graph = helper.make_graph(nodes, "columns", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets[:1]))


def _joined(names: Sequence[str], output: str, some_input: str, dtype: int) -> list[Any]:
    """Columns side by side; no columns, of as many rows as `some_input` has."""
    from onnx import helper

    if names:
        return [helper.make_node("Concat", list(names), [output], axis=1)]
    shape, none = f"{output}shape", f"{output}none"
    return [
        helper.make_node("Shape", [some_input], [f"{output}rows"], start=0, end=1),
        helper.make_node("Constant", [], [none], value_ints=[0]),
        helper.make_node("Concat", [f"{output}rows", none], [shape], axis=0),
        helper.make_node("ConstantOfShape", [shape], [output], value=helper.make_tensor("zero", dtype, [1], [0])),
    ]


def spellings(column: CategoricalColumn, missing_values: Sequence[str]) -> dict[str, int]:
    """Texts of a column -> their codes, as the encoder has them: an ONNX file knows texts and no rule for them.

    They are the categories, the words for missing cells, and the spellings that programs give numbers, booleans and
    days: `1` and `1.0`, `True` and `true`, `2024-01-31` and `2024-01-31 00:00:00`.
    """
    texts = ["", *missing_values]
    for word in column.categories:
        texts += [word, word.strip(), f"{word}.0", f"{word}.00", *(form.format(word) for form in _DAY_FORMS)]
        texts += [word.upper(), word.lower(), word.capitalize(), word.removesuffix(".0")]
    texts += ["true", "True", "TRUE", "t", "T", "false", "False", "FALSE", "f", "F", "1", "1.0", "0", "0.0"]
    cells = pl.Series(column.name, list(dict.fromkeys(texts)), dtype=pl.String)
    alone = FeatureSpec(numeric=(), categorical=(column,), class_names=())
    words = list(dict.fromkeys(["", *missing_values]))
    known = with_missing_cells(cells.to_frame(), alone, words)[column.name]
    codes = category_codes(known, column, "the model")
    return {text: code for text, code in zip(cells.to_list(), codes.tolist(), strict=True) if code != UNKNOWN}


def refuse_hashed(columns: Sequence[CategoricalColumn]) -> None:
    """UserError where categories have codes by a hash, which ONNX does not have."""
    hashed = [column.name for column in columns if column.hash_buckets]
    if hashed:
        raise UserError(
            f"column {hashed[0]!r}: categories beyond data.max_categories have codes by a hash of their text "
            "(data.hash_buckets), which cannot be exported: train with data.hash_buckets=0"
        )


def onnx_inputs(frame: pl.DataFrame, network: ExportableNetwork) -> dict[str, np.ndarray[Any, Any]]:
    """A table as the inputs of the file; dates and durations in seconds."""
    texts = {column.name for column in network.vocabularies}
    found = {name: frame[name].cast(pl.Float64).to_numpy()[:, None] for name in network.numbers}
    return found | {name: np.array(frame[name].fill_null("").to_list(), object)[:, None] for name in texts}


def write_pt2(network: ExportableNetwork, metadata: Mapping[str, Any], file: Path) -> None:
    """The network as a `.pt2` archive of torch.export, with the metadata in `dist_train.json`."""
    torch.export.save(exported_program(network), file, extra_files={"dist_train.json": json.dumps(metadata)})
