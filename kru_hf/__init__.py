"""Kronecker Recurrent Units (Jose, Cissé, Fleuret, ICML 2018) as transformers models.

Importing this package registers ``model_type = "kru"`` with the Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from . import compiled  # noqa: F401  (registers operators)
from .cache_kru import KRUCache
from .configuration_kru import KRUConfig
from .export import steps  # noqa: F401  (registers what generates on the CPU)
from .heads_kru import KRUForSequenceClassification, KRUForTokenClassification
from .kronecker import kron_apply, kron_dense, plan_factor_shapes, random_unitary, unitary_penalty
from .layers import KRU, KRUGRU, KRUJANET, KRULSTM, KroneckerizeReport, KRULinear, dekroneckerize, kroneckerize, to_kru
from .modeling_kru import KRUForCausalLM, KRUModel, KRUPreTrainedModel
from .piano_roll_head import KRUForPianoRoll
from .recurrence import KRULinearRecurrence, KRURecurrence
from .scan import backend_report, kron_scan, use_backend
from .scan_linear import kron_linear_scan
from .text import build_char_tokenizer

__version__ = "0.1.0"

AutoConfig.register("kru", KRUConfig, exist_ok=True)
# A folder says in `architectures` which of them it holds; there is no Auto class for piano rolls.
AutoModel.register(KRUConfig, (KRUModel, KRUForPianoRoll), exist_ok=True)
AutoModelForCausalLM.register(KRUConfig, KRUForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(KRUConfig, KRUForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(KRUConfig, KRUForTokenClassification, exist_ok=True)

__all__ = [
    "KRU",
    "KRUGRU",
    "KRUJANET",
    "KRULSTM",
    "KRULinear",
    "KRULinearRecurrence",
    "KRUCache",
    "KRUConfig",
    "KRUForCausalLM",
    "KRUForPianoRoll",
    "KRUForSequenceClassification",
    "KRUForTokenClassification",
    "KRUModel",
    "KRUPreTrainedModel",
    "KRURecurrence",
    "KroneckerizeReport",
    "backend_report",
    "build_char_tokenizer",
    "dekroneckerize",
    "kron_apply",
    "kron_dense",
    "kron_linear_scan",
    "kron_scan",
    "kroneckerize",
    "plan_factor_shapes",
    "random_unitary",
    "to_kru",
    "unitary_penalty",
    "use_backend",
]
