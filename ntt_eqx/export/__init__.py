"""Sparse models for other programs: safetensors, ONNX, and sparse matrices of JAX and SciPy."""

from ._errors import ExportError as ExportError
from ._matrices import to_bcoo as to_bcoo, to_csr as to_csr
from ._onnx import save_onnx as save_onnx
from ._safetensors import load_safetensors as load_safetensors, save_safetensors as save_safetensors
