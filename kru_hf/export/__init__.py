"""Models outside PyTorch: the C runtime and its weight file, and exports to other formats."""

from .standard import export_standard
from .streaming import StreamingModel
from .weight_file import weight_file

__all__ = ["StreamingModel", "export_standard", "weight_file"]
