"""The heads that a task can have, and those of kru_hf on other models than its own."""

from typing import Any, NamedTuple

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from kru_hf import KRUForCausalLM, KRUForPianoRoll, KRUForSequenceClassification, KRUForTokenClassification


class Head(NamedTuple):
    """Its class in kru_hf, the Auto class under which models of every architecture are found, and the Hub's task."""

    kru: type
    auto: Any
    task: str


HEADS = {
    "causal_lm": Head(KRUForCausalLM, AutoModelForCausalLM, "text-generation"),
    "sequence_classification": Head(
        KRUForSequenceClassification, AutoModelForSequenceClassification, "text-classification"
    ),
    "token_classification": Head(KRUForTokenClassification, AutoModelForTokenClassification, "token-classification"),
    "piano_roll": Head(KRUForPianoRoll, AutoModel, "other"),
}
BY_CLASS = {head.kru.__name__: name for name, head in HEADS.items()}


def register_heads(kind: type, config: Any) -> dict[str, type]:
    """Every head of kru_hf as a model of another kind, registered with transformers' Auto classes.

    Args:
        kind: what stands before the head in its list of bases: `Baseline` makes `BaselineForCausalLM` of
            `KRUForCausalLM`. config: the class of its config.

    Returns:
        the classes by their names.
    """
    AutoConfig.register(config.model_type, config, exist_ok=True)
    made = {}
    for head, auto, _ in HEADS.values():
        name = head.__name__.replace("KRU", kind.__name__)
        members = {"__module__": kind.__module__, "__doc__": f"{head.__name__}. {kind.__doc__}", "config_class": config}
        made[name] = type(name, (kind, head), members)
        auto.register(config, made[name], exist_ok=True)
    return made
