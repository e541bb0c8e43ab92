"""In place of ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``: layers of our own, and Kronecker weights for torch's."""

from .drop_in import KRU, KRUGRU, KRUJANET, KRULSTM, KRULinear
from .kroneckerize import KroneckerizeReport, dekroneckerize, kroneckerize, to_kru

__all__ = [
    "KRU",
    "KRUGRU",
    "KRUJANET",
    "KRULSTM",
    "KRULinear",
    "KroneckerizeReport",
    "dekroneckerize",
    "kroneckerize",
    "to_kru",
]
