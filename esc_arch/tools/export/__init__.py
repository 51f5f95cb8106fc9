"""Export networks to other runtimes: ONNX, `torch.export` programs, and libraries compiled by AOTInductor.

The graph includes the published test protocol (see `esc_arch.tools.upscale.Upscaler`), and every file is run and
compared with PyTorch before it is written.
"""

from .checking import ExportResult, InputShape
from .formats import export_compiled, export_onnx, export_program

__all__ = ["ExportResult", "InputShape", "export_compiled", "export_onnx", "export_program"]
