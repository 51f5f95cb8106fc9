"""Networks for other runtimes: ONNX, `torch.export` programs, and libraries compiled by AOTInductor.

The graph includes the protocol of the published figures (see `esc_arch.tools.upscale.Upscaler`), and every file is run
and compared with PyTorch before it is written. (The packages of the extra `onnx` are imported when ONNX is asked for.)
"""

from .checking import Difference, InputShape, Report
from .compiled import export_compiled, export_program
from .onnx import export_onnx

__all__ = ["Difference", "InputShape", "Report", "export_compiled", "export_onnx", "export_program"]
