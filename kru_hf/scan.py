"""``kru_scan``: the recurrence with one signature and several engines, and the report of which one runs."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .kronecker import check_choice
from .scan_checks import check_scan
from .scan_cpu import is_available as cpu_is_available
from .scan_cpu import run_scan
from .scan_cpu import supports as cpu_supports
from .scan_cpu import unavailable_reason as cpu_unavailable_reason
from .scan_gated import gated_backend_report
from .scan_reference import ACTIVATIONS, kru_scan_reference
from .scan_torch import kru_scan_torch
from .scan_triton import is_available as triton_is_available
from .scan_triton import kru_scan_triton
from .scan_triton import supports as triton_supports
from .scan_triton import unavailable_reason as triton_unavailable_reason
from .transforms import is_transformed, transformed_backend

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "torch", "cpu", "triton")
_ENGINES = {
    "reference": kru_scan_reference,
    "torch": kru_scan_torch,
    "cpu": run_scan,  # not checked again: generation calls it for every token
    "triton": kru_scan_triton,
}
_told: set[str] = set()


def _obstacle(backend: str, inputs: Tensor, factors: Sequence[Tensor]) -> str | None:
    """Why ``backend`` cannot run these tensors, or None."""
    if backend == "cpu":
        return cpu_supports(inputs, factors) if cpu_is_available() else cpu_unavailable_reason()
    if backend == "triton":
        return triton_supports(inputs, factors) if triton_is_available() else triton_unavailable_reason()
    return None


def choose_backend(inputs: Tensor, factors: Sequence[Tensor]) -> tuple[str, str]:
    """The engine that "auto" takes for these tensors, and why: the device's own engine if it can, else "torch"."""
    native = "cpu" if inputs.device.type == "cpu" else "triton"
    obstacle = _obstacle(native, inputs, factors)
    if obstacle is None:
        return native, f"the {native} engine runs {inputs.dtype} on {inputs.device.type}"
    return "torch", f"the {native} engine cannot run: {obstacle}"


def scan_backend_report() -> str:
    """Lines that say which engines can run here, and why the others cannot."""
    lines = []
    for name, available, reason in (
        ("cpu", cpu_is_available(), cpu_unavailable_reason()),
        ("triton", triton_is_available(), triton_unavailable_reason()),
    ):
        lines.append(f"{name}: available" if available else f"{name}: not available ({reason})")
    lines.append("torch: available")
    lines.append("reference: available (slow: the definition)")
    on_cpu = "cpu" if cpu_is_available() else "torch"
    on_gpu = "triton" if triton_is_available() else "torch"
    lines.append(f"auto: {on_cpu} for float32 on the CPU, {on_gpu} on a GPU, torch where those do not fit")
    lines.append(gated_backend_report())
    return "\n".join(lines)


def kru_scan(
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    activation: str = "modrelu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = σ((W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + U x_t) over a whole sequence.

    Args:
        inputs: U x_t (B, T, 2, N), float32 or float64; axis 2 holds the real and the imaginary plane.
        factors: F tensors W_f (2, P_f, Q_f) with ∏ P_f = ∏ Q_f = N; factor 0 is the slowest index of the state.
        bias: b of modReLU (N,). Not used by the "identity" activation.
        initial_state: h_0 (B, 2, N); zeros if None.
        mask: (B, T) bool; False holds the state at that step, whatever the input.
        activation: "modrelu", or "identity" for the linear network.
        backend: "auto", or one of "reference", "torch", "cpu", "triton": an engine that cannot run is an error.

    Returns:
        states (B, T, 2, N) and final_state (B, 2, N), a copy. Differentiable once in inputs, factors, bias and
        initial_state; more often, by forward mode and by torch.func's transforms with "reference", which "auto" takes
        for the last two.

    Raises:
        ValueError: a shape or an option that does not fit. TypeError: a dtype or device that does not.
        RuntimeError: the named backend cannot run here. NotImplementedError: it cannot be differentiated that way.
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("activation", activation, ACTIVATIONS)
    check_scan("kru", inputs, factors, bias, initial_state, mask)
    if is_transformed((inputs, bias, initial_state, mask, *factors)):
        backend = transformed_backend(backend)
    elif inputs.is_meta and backend != "reference":
        backend = "torch"  # nothing to compute: the shapes of any engine
    elif backend == "auto":
        backend, reason = choose_backend(inputs, factors)
        if not torch.compiler.is_compiling() and reason not in _told:
            _told.add(reason)
            logger.info("kru_scan uses the %s engine: %s", backend, reason)
    elif (obstacle := _obstacle(backend, inputs, factors)) is not None:
        raise RuntimeError(f"backend {backend!r} cannot run: {obstacle}")
    return _ENGINES[backend](inputs, factors, bias, initial_state, mask, activation=activation)
