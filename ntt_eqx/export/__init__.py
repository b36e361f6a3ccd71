"""Sparse models for other programs: NumPy, ONNX, StableHLO, safetensors, and sparse matrices."""

from ._errors import ExportError as ExportError
from ._format import Exported as Exported
from ._matrices import to_bcoo as to_bcoo, to_csr as to_csr
from ._numpy import (
    load_numpy as load_numpy,
    save_numpy as save_numpy,
    save_runner as save_runner,
)
from ._onnx import save_onnx as save_onnx
from ._safetensors import load_safetensors as load_safetensors, save_safetensors as save_safetensors
from ._stablehlo import load_stablehlo as load_stablehlo, save_stablehlo as save_stablehlo
