"""The linear recurrence: every form equals the loop that autograd differentiates, in states and gradients."""

import pytest
import torch

from kru_hf.scan_linear import CHUNK, kron_linear_scan

FORMS = [("steps", True), ("parallel", True), ("parallel", False)]
SHAPES = {"fixed": ((2, 3), True), "steps": ((2, 3), False), "dense": ((5,), False), "long": ((2, 3, 2, 2, 9), False)}


def unitary(*shape):
    """Factors (…, 2, P, P), unitary."""
    matrix = torch.linalg.qr(torch.randn(*shape, shape[-1], dtype=torch.complex128))[0]
    return torch.stack((matrix.real, matrix.imag), -3)


def problem(shapes, fixed, length, batch=2, heads=3):
    torch.manual_seed(0)
    lead = (heads,) if fixed else (batch, length, heads)
    units = heads * torch.Size(shapes).numel()
    return {
        "inputs": torch.randn(batch, length, 2, units, dtype=torch.float64),
        "factors": [unitary(*lead, p) for p in shapes],
        "decay": 0.8 + 0.2 * torch.rand(batch, length, heads, dtype=torch.float64),
        "initial_state": torch.randn(batch, 2, units, dtype=torch.float64),
        "mask": torch.rand(batch, length) < 0.8,
        "starts": torch.rand(batch, length) < 0.05,
    }


def run(given, dtype=torch.float64, **options):
    """States, final state and the gradients of all that has one."""
    cast = {
        name: [x.to(dtype).requires_grad_() for x in value]
        if name == "factors"
        else value.to(dtype).requires_grad_()
        if value.is_floating_point()
        else value
        for name, value in given.items()
    }
    states, final = kron_linear_scan(**cast, **options)
    weights = torch.linspace(-1, 1, states.numel(), dtype=dtype).view_as(states)
    leaves = [x for value in cast.values() for x in (value if isinstance(value, list) else [value])]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    loss = (states * weights).sum() + final.square().sum()
    return [states.detach(), final.detach(), *torch.autograd.grad(loss, leaves)]


def assert_equal_to_loop(given, tolerance, dtype=torch.float64, **options):
    found, expected = run(given, dtype, **options), run(given, backend="reference")
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize(("backend", "is_unitary"), FORMS)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_every_form_is_the_loop(shapes, backend, is_unitary):
    length = 2 * CHUNK + 7 if shapes[0] != SHAPES["long"][0] else 5
    given = problem(*shapes, length)
    assert_equal_to_loop(given, 1e-10, unitary=is_unitary, backend=backend)
    for name in ("mask", "starts"):
        given.pop(name)
    assert_equal_to_loop(given, 1e-10, unitary=is_unitary, backend=backend)
    for name in ("decay", "initial_state"):
        given.pop(name)
    assert_equal_to_loop(given, 1e-10, unitary=is_unitary, backend=backend)


@pytest.mark.parametrize("fixed", [True, False])
def test_factors_that_are_not_unitary(fixed):
    given = problem((2, 3), fixed, CHUNK + 9)
    given["factors"] = [0.9 * factor + 0.05 for factor in given["factors"]]
    for backend in ("steps", "parallel"):
        assert_equal_to_loop(given, 1e-10, backend=backend)


@pytest.mark.parametrize(("backend", "is_unitary"), FORMS)
def test_float32_over_thousands_of_steps(backend, is_unitary):
    given = problem((2, 2), False, 4096, 1, 1)
    given.pop("starts")
    assert_equal_to_loop(given, 1e-4, torch.float32, unitary=is_unitary, backend=backend)


def test_the_state_is_carried_from_part_to_part():
    given = problem((3, 2), False, 20)
    whole, _ = kron_linear_scan(**given)
    state, parts = given["initial_state"], []
    for part in (slice(0, 7), slice(7, 20)):
        cut = {name: value[:, part] for name, value in given.items() if name not in ("factors", "initial_state")}
        factors = [factor[:, part] for factor in given["factors"]]
        states, state = kron_linear_scan(factors=factors, initial_state=state, **cut)
        parts.append(states)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_compiled_code_and_transforms_give_the_same():
    given = problem((2, 2), True, 9)
    expected, _ = kron_linear_scan(**given)
    compiled = torch.compile(kron_linear_scan, backend="aot_eager")
    torch.testing.assert_close(compiled(**given, backend="parallel")[0], expected)
    inputs = given.pop("inputs")
    tangent = torch.func.jvp(lambda x: kron_linear_scan(x, **given)[0], (inputs,), (inputs,))[1]
    given["initial_state"] = torch.zeros_like(given["initial_state"])
    torch.testing.assert_close(tangent, kron_linear_scan(inputs, **given)[0])  # it is linear in the inputs


BAD = {
    "square": ({"factors": [torch.zeros(3, 2, 2, 3)]}, r"factors\[0\] must be square, got 2x3"),
    "units": ({"factors": [torch.zeros(3, 2, 5, 5)]}, "3 heads with factors of N = 5 have 15 units, the inputs 18"),
    "none": ({"factors": []}, "factors must hold at least one tensor"),
    "shape": ({"factors": [torch.zeros(2, 5, 5)]}, r"factors\[0\] must have the shape .*got \(2, 5, 5\)"),
    "length": (
        {"factors": [torch.zeros(2, 4, 3, 2, 6, 6)]},
        r"factors\[0\] must have the shape \(H, 2, P, P\) or \(2, 5, H, 2, P, P\).*got \(2, 4, 3, 2, 6, 6\)",
    ),
    "decay": ({"decay": torch.full((2, 5, 3), 1.5)}, r"decay must be in \(0, 1\], got values from 1.5 to 1.5"),
    "zero": ({"decay": torch.zeros(2, 5, 3)}, r"decay must be in \(0, 1\], got values from 0 to 0"),
    "heads": ({"decay": torch.ones(2, 5, 1)}, r"decay must have the shape \(2, 5, 3\), got \(2, 5, 1\)"),
    "state": ({"initial_state": torch.zeros(2, 2, 17)}, r"initial_state must have the shape \(2, 2, 18\)"),
    "mask": ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask must be a bool tensor of the shape \(2, 5\)"),
    "inputs": ({"inputs": torch.zeros(2, 5, 18)}, r"inputs must have the shape \(B, T, 2, H\*N\)"),
    "backend": ({"backend": "native"}, "backend must be one of auto, parallel, steps, reference, got 'native'"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(given, message):
    good = {"inputs": torch.zeros(2, 5, 2, 18), "factors": [torch.zeros(3, 2, 6, 6)]}
    with pytest.raises(ValueError, match=message):
        kron_linear_scan(**{**good, **given})


def test_wrong_dtypes_are_named():
    inputs, factors = torch.zeros(2, 5, 2, 18), [torch.zeros(3, 2, 6, 6)]
    with pytest.raises(TypeError, match=r"factors\[0\] must be torch.float32 on cpu like the inputs"):
        kron_linear_scan(inputs, [factors[0].double()])
    with pytest.raises(TypeError, match="inputs must be float32 or float64, got torch.float16"):
        kron_linear_scan(inputs.half(), factors)
