"""Writes a model as ONNX, for programs such as onnxruntime: fp32, fp16, or int8 weights.

The graph is made from the fp32 model and rounded afterwards; normalisations and softmax stay fp32,
and so do inputs and outputs. It takes what the plain view makes of rows, any number of rows at
once, and of texts and sounds any length, where the model has no fixed one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpdist.errors import ConfigError
from hpdist.evaluate.export.metadata import describe_file, feeding_files
from hpdist.evaluate.export.trace import first_line, positional, quiet, shapes_of
from hpdist.evaluate.loaded import LoadedModel

PRECISIONS = ("fp32", "fp16", "int8")

_OPSET = 18
_MOST_BYTES = 2_000_000_000  # of one protobuf
_ANY_LENGTH = ("text", "audio")
_IN_FULL = (  # what fp16 leaves in fp32
    *("Softmax", "LogSoftmax", "BatchNormalization", "LayerNormalization"),
    *("GroupNormalization", "InstanceNormalization", "RMSNormalization"),
)


def write(loaded: LoadedModel, precision: str, file: Path) -> None:
    """Write a model, in fp32 on the CPU, as ONNX.

    Raises ConfigError where a package is missing, the model cannot be traced, or the file would be
    larger than ONNX's own limit.
    """
    onnx = packages()
    proto, shapes = graph(loaded)
    if proto.ByteSize() > _MOST_BYTES:
        raise ConfigError(
            f"--format: the model has {proto.ByteSize():,} bytes and one ONNX file at most "
            f"{_MOST_BYTES:,}; choose safetensors"
        )
    if precision == "fp16":
        proto = _in_fp16(proto)
    elif precision == "int8":
        proto = _in_int8(proto, file, onnx)
    values = describe_file(loaded, precision, shapes, feeding_files(loaded))
    onnx.helper.set_model_props(proto, values)
    proto.producer_name, proto.producer_version = "hpdist", loaded.description.hpdist
    onnx.save(proto, str(file))


def packages(file_format: str = "onnx") -> Any:
    """Import what writing ONNX needs; give `onnx`. Raises ConfigError where it is missing."""
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--format {file_format} needs onnx, onnxscript and onnxruntime ({error}); "
            "pip install 'hpdist[export]'"
        ) from error
    return onnx


def graph(loaded: LoadedModel) -> tuple[Any, dict[str, Any]]:
    """Trace a model, in fp32 on the CPU; give the graph, and dtype and shape of each input.

    Raises ConfigError where torch cannot trace it.
    """
    model, names, given = positional(loaded)
    tries = [True, False] if loaded.spec.kind in _ANY_LENGTH else [False]
    for any_length in tries:
        sizes = [_dynamic(tensor, any_length) for tensor in given]
        try:
            with quiet():
                program: Any = torch.onnx.export(
                    model,
                    (given,),
                    input_names=names,
                    output_names=list(loaded.task.outputs),
                    dynamo=True,
                    dynamic_shapes=(tuple(sizes),),
                    opset_version=_OPSET,
                    verbose=False,
                )
        except Exception as error:  # torch's own, of many kinds
            if any_length:
                continue
            raise ConfigError(
                f"--format: torch cannot trace the model: {first_line(error)}; choose safetensors"
            ) from error
        break
    return program.model_proto, shapes_of(names, given, sizes)


def _dynamic(tensor: Tensor, any_length: bool) -> dict[int, Any]:
    """Say which dimensions may be of any size: rows, and the last one where lengths differ."""
    found: dict[int, Any] = {0: torch.export.Dim("rows")}
    if any_length and tensor.dim() > 1:
        found[tensor.dim() - 1] = torch.export.Dim.DYNAMIC
    return found


def _in_fp16(proto: Any) -> Any:
    from onnxruntime.transformers import float16

    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *_IN_FULL]
    with quiet():
        return float16.convert_float_to_float16(proto, keep_io_types=True, op_block_list=blocked)


def _in_int8(proto: Any, file: Path, onnx: Any) -> Any:
    """Quantize the weights of products to 8 bits; activations follow as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    full, small = (file.with_name(f"{file.name}.{part}") for part in ("full", "small"))
    try:
        del proto.graph.value_info[:]
        onnx.save(proto, str(full))
        with quiet():
            quantize_dynamic(str(full), str(small), weight_type=QuantType.QUInt8)
        return onnx.load(str(small))
    except Exception as error:  # onnxruntime's own, of many kinds
        raise ConfigError(
            f"--precision int8: onnxruntime cannot quantize the model: {first_line(error)}; "
            "choose fp16"
        ) from error
    finally:
        full.unlink(missing_ok=True)
        small.unlink(missing_ok=True)
