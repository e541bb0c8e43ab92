"""What surrounds a scan: signals, threads at the process's end, devices, views, arguments that do not fit, tracers."""

import signal
import subprocess
import sys

import pytest
import torch
from problems import problem
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import kru_hf
from kru_hf import cells, kron_scan
from kru_hf.scan import COMPILED, unavailable_reason

NAMES = [name for name, cell in cells.CELLS.items() if unavailable_reason("cpu", cell) is None]
CELLS = pytest.mark.parametrize("cell", NAMES)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "portable", "cpu"])
LAYERS = [kru_hf.KRU, kru_hf.KRULSTM, kru_hf.KRUGRU, kru_hf.KRUJANET]


def arguments(cell, batch=2, length=3, shapes=((2, 2), (4, 4)), mask=True):
    """Inputs, factors, bias, initial state and mask of a scan, in float32."""
    p = problem(cell, shapes, batch, length, masked=mask)
    return p.inputs.float(), [factor.float() for factor in p.factors], p.bias.float(), p.initial_state.float(), p.mask


def scan(cell, *given, backend="auto"):
    return kron_scan(*given, cell=cell, backend=backend)


def results(cell, given, backend):
    """Both outputs and the gradient of each argument for the sum of the squared outputs."""
    inputs, factors, bias, initial, mask = given
    inputs, bias, initial, *factors = (t.detach().requires_grad_() for t in (inputs, bias, initial, *factors))
    outputs = scan(cell, inputs, factors, bias, initial, mask, backend=backend)
    loss = sum(output.square().sum() for output in outputs)
    return [*(t.detach() for t in outputs), *torch.autograd.grad(loss, [inputs, bias, initial, *factors])]


class Interrupted(Exception):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
@CELLS
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_signal_is_answered_during_a_call_and_spoils_no_memory(cell, way):
    """The handler runs several times in one call, and raises from the third time on wherever the library is at work."""
    before, threads = signal.getsignal(signal.SIGALRM), torch.get_num_threads()
    inputs, factors, bias, initial, _ = arguments(cell, 16, 300, ((512, 512),), mask=False)
    inputs.requires_grad_()
    expected, _ = scan(cell, inputs.detach(), factors, bias, initial, backend="cpu")
    ticks = 0

    def handler(_, frame):
        nonlocal ticks
        ticks += 1
        while ticks > 2 and frame is not None:
            if "kru_hf" in frame.f_globals.get("__name__", ""):
                raise Interrupted
            frame = frame.f_back

    def call():
        states, _ = scan(cell, inputs, factors, bias, initial, backend="cpu")
        if way == "backward":
            nonlocal ticks
            ticks = 0
            signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
            states.sum().backward()

    torch.set_num_threads(2)
    signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(3):
            if way == "forward":
                ticks = 0
                signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
            with pytest.raises(Interrupted):
                call()
            signal.setitimer(signal.ITIMER_REAL, 0)
            others = [torch.full_like(expected, 7.0) for _ in range(4)]
            again, _ = scan(cell, inputs.detach(), factors, bias, initial, backend="cpu")
            assert torch.equal(again, expected)
            assert all(bool((other == 7).all()) for other in others)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        torch.set_num_threads(threads)


AT_THE_END = """
import atexit, threading, torch
from kru_hf import KRU, KRULSTM
torch.set_num_threads(2)
x, layers = torch.randn(100, 32, 64, requires_grad=True), [KRU(64, 512), KRULSTM(64, 512)]
def work(where):
    for layer in layers:
        layer(x)[0].sum().backward()
    print(where)
{main}
def late():
    threading.main_thread().join()
    work("thread")
threading.Thread(target=late).start()
atexit.register(work, "atexit")
"""


@pytest.mark.parametrize("main", ["pass", "work('main')"], ids=["no pool yet", "with a pool"])
def test_threads_that_outlive_the_main_one_and_atexit(main):
    code = AT_THE_END.format(main=main)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.split()[-2:] == ["thread", "atexit"], done.stderr


@CELLS
@BACKENDS
def test_the_default_device_is_not_that_of_the_tensors(cell, backend):
    given = arguments(cell)
    expected = results(cell, given, backend)
    with torch.device("meta"):
        found = results(cell, given, backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@CELLS
@BACKENDS
def test_views_with_the_negative_bit(cell, backend):
    """Also those of the gradients that come in."""
    given = arguments(cell)
    inputs, factors, bias, initial, mask = given
    negated = [torch._neg_view(-tensor) for tensor in (inputs, bias, initial, *factors)]
    views = (negated[0], negated[3:], negated[1], negated[2], mask)
    for a, b in zip(results(cell, views, backend), results(cell, given, backend), strict=True):
        torch.testing.assert_close(a, b)
    leaf = inputs.clone().requires_grad_()
    outputs = scan(cell, leaf, factors, bias, initial, mask, backend=backend)
    cotangents = [torch.randn_like(output) for output in outputs]
    (expected,) = torch.autograd.grad(outputs, leaf, cotangents, retain_graph=True)
    (found,) = torch.autograd.grad(outputs, leaf, [torch._neg_view(-cotangent) for cotangent in cotangents])
    torch.testing.assert_close(found, expected)


BAD = {  # a change of the arguments, and what the message says of it
    "short bias": (lambda x, f, b, h, m: (x, f, b[..., :1], h, m), r"bias must have the shape .*8.*, got .*1"),
    "bias in fp64": (
        lambda x, f, b, h, m: (x, f, b.double(), h, m),
        "bias must be torch.float32 on cpu like the",
    ),
    "fewer factors": (lambda x, f, b, h, m: (x, f[:1], b, h, m), "multiply to 2x2, but the inputs have N = 8 units"),
    "no factors": (lambda x, f, b, h, m: (x, [], b, h, m), "at least one"),
    "factor elsewhere": (
        lambda x, f, b, h, m: (x, [f[0], f[1].to("meta")], b, h, m),
        r"factors\[1\] must be .* meta",
    ),
    "no planes": (lambda x, f, b, h, m: (x, [f[0][0], f[1]], b, h, m), r"factors\[0\] must have the shape .* or \(R, "),
    "terms": (lambda x, f, b, h, m: (x, [f[0], torch.stack((f[1], f[1]))], b, h, m), "must have the same terms R"),
    "integers": (lambda x, f, b, h, m: (x, [f[0].long(), f[1]], b, h, m), r"factors\[0\] must be torch.float32"),
    "sparse factor": (
        lambda x, f, b, h, m: (x, [f[0], f[1].to_sparse()], b, h, m),
        r"factors\[1\] must be a dense",
    ),
    "short state": (lambda x, f, b, h, m: (x, f, b, h[:1], m), "initial_state must have the shape"),
    "a plane less": (lambda x, f, b, h, m: (x, f, b, h[:, 1:], m), "initial_state must have the shape"),
    "state elsewhere": (lambda x, f, b, h, m: (x, f, b, h.to("meta"), m), "initial_state must be torch.float32 on cpu"),
    "short mask": (lambda x, f, b, h, m: (x, f, b, h, m[:, :2]), r"mask must have the shape \(2, 3\), got \(2, 2\)"),
    "mask of integers": (
        lambda x, f, b, h, m: (x, f, b, h, m.long()),
        "mask must be torch.bool.*got torch.int64",
    ),
    "mask elsewhere": (
        lambda x, f, b, h, m: (x, f, b, h, m.to("meta")),
        "mask must be .*got torch.bool on meta",
    ),
    "sparse inputs": (lambda x, f, b, h, m: (x.to_sparse(), f, b, h, m), "inputs must be a dense tensor"),
    "half precision": (lambda x, f, b, h, m: (x.bfloat16(), f, b, h, m), "inputs must be float32 or float64.*bfloat16"),
    "three axes": (lambda x, f, b, h, m: (x[0], f, b, h, m), r"inputs of the cell .* must have the shape \(B, T, "),
    "no batch": (lambda x, f, b, h, m: (x[:0], f, b, h[:0], m[:0]), "no empty axis"),
}


def operator(engine, cell, x, factors, bias, state, mask):
    factors = [factor if factor.dim() == 4 else factor[None] for factor in factors]
    return COMPILED[engine](x, factors, bias, state, mask, None, cell, "modrelu", True)


@CELLS
@pytest.mark.parametrize("way", ["auto", "reference", "portable", "cpu", "operator portable", "operator cpu"])
def test_every_way_in_checks_its_arguments(cell, way):
    def function(*given):
        _, _, engine = way.rpartition(" ")
        return operator(engine, cell, *given) if " " in way else scan(cell, *given, backend=engine)

    given = arguments(cell)
    function(*given)
    for change, message in BAD.values():
        # torch itself refuses sparse tensors before an operator is called.
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=f"{message}|SparseCPU"):
            function(*change(*given))


@CELLS
@pytest.mark.parametrize("engine", ["portable", "cpu"])
def test_operators_of_the_backward_check_their_arguments(cell, engine):
    """Gradients, states and what forward kept, each too short."""
    x, f, b, h, m = arguments(cell)
    f = [factor[None] for factor in f]
    states, final, saved = COMPILED[engine](x, f, b, h, m, None, cell, "modrelu", True)
    backward = getattr(torch.ops.kru_hf, f"{engine}_scan_backward")
    good = {"states": states, "saved": saved, "d_states": states, "d_final": final}
    for name in good:
        if good[name].numel():
            with pytest.raises(ValueError, match=f"^{name} must have the shape"):
                backward(x, f, b, h, m, None, cell, "modrelu", *(good | {name: good[name][:1]}).values())


@CELLS
@BACKENDS
@pytest.mark.parametrize("mask", [False, True])
def test_shapes_without_numbers(cell, backend, mask):
    """On the meta device and under FakeTensorMode, forward and backward."""
    given = arguments(cell, mask=mask)
    expected = [tensor.shape for tensor in results(cell, given, "auto")]
    inputs, factors, bias, initial, read = given
    meta = [t.to("meta") for t in (inputs, bias, initial, *factors)]
    given = (meta[0], meta[3:], meta[1], meta[2], None if read is None else read.to("meta"))
    assert [tensor.shape for tensor in results(cell, given, backend)] == expected
    with FakeTensorMode():
        found = results(cell, arguments(cell, mask=mask), backend)
    assert [tensor.shape for tensor in found] == expected and all(tensor.device.type == "cpu" for tensor in found)


@CELLS
@pytest.mark.parametrize("backend", ["portable", "cpu"])
def test_traces_read_their_mask(cell, backend):
    """make_fx and torch.jit.trace record one operator, whose mask is an input."""
    inputs, factors, bias, initial, mask = arguments(cell)

    def function(inputs, bias, initial, mask, *factors):
        return scan(cell, inputs, list(factors), bias, initial, mask, backend=backend)[0]

    given, other = (inputs, bias, initial, mask, *factors), ~mask
    traced = [make_fx(function)(*given), torch.jit.trace(function, given)]
    expected = function(inputs, bias, initial, other, *factors)
    for trace in traced:
        assert torch.equal(trace(inputs, bias, initial, other, *factors), expected)
    assert sum("kru_hf" in str(node.target) for node in traced[0].graph.nodes) == 1


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_layers_without_numbers(layer):
    """Lengths of a packed sequence are numbers, so that only plain inputs have shapes alone."""
    module = layer(3, 8, factor_size=2, num_layers=2, bidirectional=True)
    expected = module(torch.randn(4, 2, 3))[0].shape
    assert module.to("meta")(torch.randn(4, 2, 3, device="meta"))[0].shape == expected
    with FakeTensorMode():
        assert layer(3, 8, factor_size=2, num_layers=2, bidirectional=True)(torch.randn(4, 2, 3))[0].shape == expected
