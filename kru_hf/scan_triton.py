from .scan_torch import kru_scan_torch as kru_scan_triton

__all__ = ["kru_scan_triton"]


def is_available():
    return False


def unavailable_reason():
    return "not written yet"


def supports(inputs, factors):
    return None
