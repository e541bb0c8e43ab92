"""Kronecker Recurrent Units (Jose, Cissé, Fleuret, ICML 2018) as transformers models.

Importing this package registers ``model_type = "kru"`` with the Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_kru import KRUCache
from .cells import KRURecurrence
from .char_tokenizer import build_char_tokenizer
from .configuration_kru import KRUConfig
from .kronecker import kron_apply, kron_dense, plan_factor_shapes, random_unitary, unitary_penalty
from .modeling_kru import KRUForCausalLM, KRUModel, KRUPreTrainedModel
from .scan import kru_scan, scan_backend_report

__version__ = "0.1.0"

AutoConfig.register("kru", KRUConfig, exist_ok=True)
AutoModel.register(KRUConfig, KRUModel, exist_ok=True)
AutoModelForCausalLM.register(KRUConfig, KRUForCausalLM, exist_ok=True)

__all__ = [
    "KRUCache",
    "KRUConfig",
    "KRUForCausalLM",
    "KRUModel",
    "KRUPreTrainedModel",
    "KRURecurrence",
    "build_char_tokenizer",
    "kron_apply",
    "kron_dense",
    "kru_scan",
    "plan_factor_shapes",
    "random_unitary",
    "scan_backend_report",
    "unitary_penalty",
]
