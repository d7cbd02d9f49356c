"""A deferred output behaves as the tensor it stands for: values, gradients, errors, memory."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mstc.errors import DeferredOutputError
from mstc.runtime.deferred import DeferredTensor, wrap_outputs
from mstc.runtime.memory import measure_step
from passes.defer import DeferResult, defer_outputs

VOCAB, WIDTH = 96, 8

# PyTorch warns when any tensor with a grad_fn is passed to a compiled function.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


class Model(nn.Module):
    """A language model without its middle."""

    def __init__(self, order: str = "loss first", cap: float | None = None, region: Any = None):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.order, self.cap, self.region = order, cap, region

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = F.layer_norm(torch.relu(self.mix(self.embed(ids))), (WIDTH,))
        if self.region is None:
            logits = self.head(hidden)
        else:
            with torch.autocast("cpu", dtype=self.region):
                logits = self.head(hidden)
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        loss = F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1))
        return (loss, logits) if self.order == "loss first" else (logits, loss)


RECORDING = False
"""Whether operations on deferred outputs are recorded."""


class OpByOp:
    """Runs a record as it is."""

    key = "op by op"

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        return graph


class Backend:
    """Defers, then runs the graph as it is or under AOTAutograd."""

    def __init__(self, inner: str = "eager"):
        self.inner = inner
        self.results: list[DeferResult] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        result = defer_outputs(gm, min_bytes=256)
        compiled = torch._dynamo.lookup_backend(self.inner)(result.graph_module, example_inputs)
        self.results.append(result)

        def call(*args: Any) -> list[Any]:
            outputs = compiled(*args)
            return wrap_outputs(
                result.deferred,
                outputs,
                args,
                num_outputs=result.num_outputs,
                compile_record=OpByOp() if RECORDING else None,
            )

        return call


@pytest.fixture(autouse=True, params=[False, True], ids=["at once", "recorded"])
def _recording(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that holds for outputs that are made when they are read holds for recorded ones."""
    monkeypatch.setattr(sys.modules[__name__], "RECORDING", request.param)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
        yield


@pytest.fixture(autouse=True, scope="module")
def _reset() -> Iterator[None]:
    yield
    compiled_pair.cache_clear()
    torch._dynamo.reset()


def batch(length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(VOCAB, (2, length)), torch.randint(VOCAB, (2, length))


def deferred(inner: str = "eager") -> tuple[Any, Any, Any]:
    """A new model, its loss, its deferred logits."""
    model = Model()
    loss, logits = torch.compile(model, backend=Backend(inner))(*batch())
    assert type(logits) is DeferredTensor
    assert not logits.is_materialized
    return model, loss, logits


@functools.cache
def compiled_pair(order: str, cap: float | None, inner: str, dtype: torch.dtype) -> Any:
    model = Model(order, cap).to(dtype)
    twin = copy.deepcopy(model)
    return model, twin, torch.compile(twin, backend=Backend(inner))


def pair(
    order: str = "loss first",
    cap: float | None = None,
    inner: str = "eager",
    dtype: torch.dtype = torch.float64,
) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]:
    """(model, loss, logits) in eager mode, and the same with deferred logits."""
    model, twin, compiled = compiled_pair(order, cap, inner, dtype)
    data = batch()
    plain, ours = model(*data), compiled(*data)
    if order != "loss first":
        plain, ours = plain[::-1], ours[::-1]
    assert type(ours[1]) is DeferredTensor
    assert not ours[1].is_materialized
    model.zero_grad()
    twin.zero_grad()
    return (model, *plain), (twin, *ours)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad for p in model.parameters()]
    return [torch.zeros(()) if g is None else g for g in found]


def assert_same_gradients(model: nn.Module, twin: nn.Module) -> None:
    for expected, got in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(got, expected)


OBJECTIVES: dict[str, Callable[[Any, Any], Any]] = {
    "loss": lambda loss, logits: loss,
    "logits": lambda loss, logits: logits.square().float().mean(),
    "both": lambda loss, logits: loss + logits.float().logsumexp(-1).mean(),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("order", ["loss first", "logits first"])
def test_values_and_gradients(order: str, cap: float | None, objective: str, inner: str) -> None:
    expected, got = pair(order, cap, inner)
    for _, loss, logits in (expected, got):
        OBJECTIVES[objective](loss, logits).backward()
        assert logits.requires_grad
        assert not logits.is_leaf
        assert logits.grad_fn is not None
    torch.testing.assert_close(got[1], expected[1])
    assert torch.equal(got[2].materialize(), expected[2])
    assert_same_gradients(expected[0], got[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("region", [None, torch.bfloat16])
@pytest.mark.parametrize("ambient", [False, True])
def test_as_exact_as_eager(objective: str, region: Any, ambient: bool, dtype: torch.dtype) -> None:
    model = Model(cap=5.0, region=region).to(dtype)
    truth = copy.deepcopy(model).to(torch.float64)
    truth.region = None
    twin = copy.deepcopy(model)
    data = batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
        compiled = torch.compile(twin, backend=Backend("aot_eager"))(*data)
        plain = model(*data)
    exact = truth(*data)
    assert not compiled[1].is_materialized
    assert compiled[1].dtype == plain[1].dtype
    torch.testing.assert_close(compiled[1].materialize(), plain[1])
    for outputs in (compiled, plain, exact):
        OBJECTIVES[objective](*outputs).backward()
    for ours, theirs, true in zip(*map(gradients, (twin, model, truth)), strict=True):
        assert (ours - true).norm() <= 1.5 * (theirs - true).norm() + 1e-3 * true.norm()


def test_autocast_of_the_call_is_remembered_and_no_other() -> None:
    model = Model()
    with torch.autocast("cpu", torch.bfloat16):
        _, logits = torch.compile(model, backend=Backend())(*batch())
    assert logits.dtype == torch.bfloat16
    assert logits.materialize().dtype == torch.bfloat16
    _, _, other = deferred()
    with torch.autocast("cpu", torch.bfloat16):
        assert other.sum().dtype == torch.float32
        assert other.materialize().dtype == torch.float32


def test_reading_in_an_autocast_region_leaves_no_cached_weight_behind() -> None:
    model = Model()
    data = batch()
    compiled = torch.compile(model, backend=Backend("aot_eager"))
    with torch.autocast("cpu", torch.bfloat16):
        _, logits = compiled(*data)
        with torch.no_grad():
            logits.argmax()
        F.linear(torch.ones(1, WIDTH), model.head.weight).sum().backward()
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_dynamic_shapes(inner: str) -> None:
    model, backend = Model(cap=5.0), Backend(inner)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for length in (4, 6, 9):
        data = batch(length)
        _, logits = compiled(*data)
        expected = model(*data)[1]
        assert logits.shape == (2, length, VOCAB)
        assert logits.stride() == expected.stride()
        assert not logits.is_materialized
        assert torch.equal(logits.materialize(), expected)
    assert len(backend.results) == 1


def test_metadata_needs_no_values() -> None:
    (_, _, plain), (_, _, logits) = pair(dtype=torch.float32)
    for read in (
        lambda t: (t.shape, t.size(), t.size(-1), t.stride(), t.dtype, t.device, t.layout),
        lambda t: (t.ndim, t.dim(), t.numel(), len(t), t.nelement(), t.element_size(), t.nbytes),
        lambda t: (t.requires_grad, t.is_leaf, t.is_contiguous(), t.storage_offset(), t.is_cpu),
        lambda t: (t.is_floating_point(), t.is_complex(), t.is_sparse, t._version),
        lambda t: (torch.is_tensor(t), isinstance(t, torch.Tensor), t.get_device(), t.type()),
        lambda t: (t.detach().requires_grad, t.detach().shape, t.detach().is_leaf),
        lambda t: (t.half().dtype, t.double().shape, t.to(torch.bfloat16).detach().dtype),
        lambda t: t.to("cpu").shape,
    ):
        assert read(logits) == read(plain)
    assert not logits.is_materialized


USES: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda t: t.detach().numpy(),
    "asarray": lambda t: np.asarray(t.detach()),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "element": lambda t: t[0, 1, 2].item(),
    "slice": lambda t: t[..., :3],
    "mask": lambda t: t[t > 0],
    "index": lambda t: t[:, torch.tensor([0, 2])],
    "compare": lambda t: t == t.clone(),
    "allclose": lambda t: torch.allclose(t, t * 1.0),
    "argmax": lambda t: t.argmax(-1),
    "cat": lambda t: torch.cat([t, t]),
    "stack": lambda t: torch.stack([t[0], t[1]]),
    "iterate": lambda t: list(t),
    "unpack": lambda t: (lambda a, b: a - b)(*t),
    "bool": lambda t: bool(t[0, 0, 0] * 0 == 0),
    "contains": lambda t: 123.0 in t,
    "repr": lambda t: repr(t.detach()),
    "format": lambda t: f"{t.detach()}",
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "deepcopy": lambda t: copy.deepcopy(t.detach()),
    "deepcopy of a leaf": lambda t: copy.deepcopy(t.detach().requires_grad_()),
    "copy": lambda t: copy.copy(t.detach()),
    "arithmetic": lambda t: 1 + t * 2 - t / 3,
    "matmul": lambda t: t @ t.mT,
    "out": lambda t: torch.mul(t.detach(), 2, out=torch.empty(t.shape)),
    "into": lambda t: torch.empty(t.shape).copy_(t.detach()),
    "new_zeros": lambda t: t.new_zeros(2) + t.new_tensor([1.0, 2.0]),
    "as tensor": lambda t: torch.as_tensor(t),
    "dlpack": lambda t: torch.from_dlpack(t.detach()),
    "data": lambda t: t.data,
    "cast": lambda t: t.double(),
    "cast twice": lambda t: t.half().float(),
    "integers": lambda t: t.to(torch.int64),
    "chunk": lambda t: t.chunk(2, dim=-1),
    "functional": lambda t: F.log_softmax(t, -1),
    "expand": lambda t: t.unsqueeze(0).expand(3, -1, -1, -1),
    "subclass": lambda t: t.as_subclass(torch.Tensor),
    "foreach": lambda t: torch._foreach_mul([t, t], 2.0),
    "clone": lambda t: t.clone(),
    "flat": lambda t: t.contiguous().view(-1),
    "data_ptr": lambda t: t.data_ptr() != 0,
    "parameter": lambda t: nn.Parameter(t.detach().clone()),
    "vmap": lambda t: torch.vmap(torch.sum)(t),
    "func.grad": lambda t: torch.func.grad(lambda x: (x * t).sum())(torch.ones(t.shape)),
}


@pytest.mark.parametrize("use", USES)
def test_use(use: str) -> None:
    (_, _, plain), (_, _, logits) = pair(dtype=torch.float32)
    expected, got = USES[use](plain), USES[use](logits)
    assert type(got) in (type(expected), DeferredTensor)
    if isinstance(expected, torch.Tensor):
        assert (got.dtype, got.requires_grad) == (expected.dtype, expected.requires_grad)
        got = got.materialize() if isinstance(got, DeferredTensor) else got
    if isinstance(expected, str | bool | int):
        assert got == expected
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_grad_requiring_uses_that_pytorch_refuses() -> None:
    _, _, logits = deferred()
    with pytest.raises(RuntimeError, match="requires grad"):
        logits.numpy()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(logits)
    with pytest.raises(RuntimeError, match="leaf"):
        logits.requires_grad_(False)
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(logits)
    with pytest.raises(RuntimeError, match="tensor subclasses"):
        torch.Tensor.numpy(logits)


def test_repr_shows_a_tensor() -> None:
    _, _, logits = deferred()
    assert repr(logits).startswith("tensor([[[")
    assert "grad_fn" in repr(logits)


def test_save_and_load() -> None:
    (_, _, plain), (_, _, logits) = pair()
    file = io.BytesIO()
    torch.save({"logits": logits}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["logits"]
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, plain)


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda t: t.mul_(2),
    "setitem": lambda t: t.__setitem__(0, 0.5),
    "augmented": lambda t: t.__iadd__(t.detach().clone()),
    "through a view": lambda t: t[:, 1:].mul_(3),
    "through a view of a view": lambda t: t.view(-1)[5:].view(-1, 1)[2:].exp_(),
    "masked_fill_": lambda t: t.masked_fill_(t < 0, -1.0),
    "copy_": lambda t: t.copy_(t.detach() * 2),
    "zero_": lambda t: t.zero_(),
    "relu_": lambda t: torch.relu_(t),
    "clamp_": lambda t: t.clamp_(min=0),
    "index_fill_": lambda t: t.index_fill_(1, torch.tensor([0, 2]), 0.25),
    "foreach": lambda t: torch._foreach_mul_([t], 2.0),
    "tanh_": lambda t: t.tanh_(),
    "unsqueeze_": lambda t: t.unsqueeze_(0),
    "transpose_": lambda t: t.transpose_(0, 1),
    "squeeze_": lambda t: t.squeeze_(0).mul_(2),
    "data": lambda t: t.data.mul_(2),
    "set data": lambda t: setattr(t, "data", t.data * 2),
    "resize": lambda t: t.detach().resize_(3, 4).zero_(),
    "by another": lambda t: t.mul_(t.detach().exp()),
}


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("use", IN_PLACE)
def test_in_place(use: str, cap: float | None) -> None:
    expected, got = pair(cap=cap, inner="aot_eager")
    for _, loss, logits in (expected, got):
        IN_PLACE[use](logits)
        (loss + logits.square().mean() + logits[-1].exp().mean()).backward()
    assert got[2]._version == expected[2]._version
    assert got[2].shape == expected[2].shape
    assert got[2].stride() == expected[2].stride()
    torch.testing.assert_close(got[2].materialize(), expected[2], rtol=0, atol=0)
    assert_same_gradients(expected[0], got[0])


def test_a_write_between_use_and_backward_is_an_error_as_ever() -> None:
    for _, _, logits in pair():
        result = (logits * logits).sum()
        logits.mul_(2)
        with pytest.raises(RuntimeError, match="inplace operation"):
            result.backward()


def test_detached_shares_values_and_cast_does_not() -> None:
    for _, _, logits in pair(dtype=torch.float32):
        detached, wide = logits.detach(), logits.double()
        before = logits.clone()
        with torch.no_grad():
            logits.mul_(2)
        torch.testing.assert_close(detached, before * 2)
        torch.testing.assert_close(wide.float(), before)
        detached.add_(1)
        assert torch.equal(logits, before * 2 + 1)
        assert logits._version == 2
        detached.unsqueeze_(0)
        assert detached.shape == (1, *logits.shape)
        assert torch.equal(detached[0], logits)
        detached.zero_()
        assert not logits.any()


def test_hooks_and_grad() -> None:
    """As under torch.compile, an output's hooks see the gradient that comes from outside."""
    model, data = Model().double(), batch()
    seen: list[list[torch.Tensor]] = []
    for backend in (Backend("aot_eager"), "aot_eager"):
        torch._dynamo.reset()
        model.zero_grad()
        loss, logits = torch.compile(model, backend=backend)(*data)
        caught: list[torch.Tensor] = []
        logits.register_hook(lambda g, to=caught: (to.append(g), g * 2)[1])
        logits.retain_grad()
        assert logits.requires_grad_() is logits
        (loss + logits.sin().sum()).backward()
        seen.append([*caught, logits.grad, *gradients(model)])
    assert len(seen[0]) == len(seen[1])
    torch.testing.assert_close(seen[1], seen[0])


def test_hooks_do_not_make_values() -> None:
    _, loss, logits = deferred()
    logits.register_hook(lambda g: g)
    logits.retain_grad()
    loss.backward()
    assert logits.grad is None
    assert not logits.is_materialized


def test_backward_with_a_gradient_and_autograd_grad() -> None:
    expected, got = pair(inner="aot_eager")
    weight = torch.randn(2, 6, VOCAB)
    for model, loss, logits in (expected, got):
        logits.backward(weight, retain_graph=True)
        torch.autograd.backward([loss, logits], [torch.ones(()), weight], retain_graph=True)
        (grad,) = torch.autograd.grad(logits, model.head.weight, weight)
        model.head.weight.grad += grad
    assert_same_gradients(expected[0], got[0])


def test_gradient_of_a_gradient() -> None:
    seen = []
    for model, _, logits in pair(cap=2.0):
        (grad,) = torch.autograd.grad(logits.square().sum(), model.mix.weight, create_graph=True)
        grad.square().sum().backward()
        seen.append(gradients(model))
    torch.testing.assert_close(seen[1], seen[0])


def test_gradient_of_a_gradient_when_the_hidden_state_is_made_from_the_head() -> None:
    def forward(ids: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(torch.nn.functional.embedding(ids, weight).sin(), weight)
        return logits.mean(), logits

    ids, seen = batch()[0], []
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=True)
    for function in (forward, torch.compile(forward, backend=Backend())):
        (grad,) = torch.autograd.grad(
            function(ids, weight)[1].exp().mean(), weight, create_graph=True
        )
        seen.append([grad, *torch.autograd.grad(grad.square().sum(), weight)])
    torch.testing.assert_close(seen[1], seen[0])


def test_gradient_only_for_what_wants_one() -> None:
    expected, got = pair()
    for model, _, logits in (expected, got):
        (grad,) = torch.autograd.grad(logits.exp().sum(), model.mix.weight)
        model.mix.weight.grad = grad
    assert_same_gradients(expected[0], got[0])


def test_custom_autograd_function_reaches_the_weights() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            return 2 * x * grads[0]

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0]

    expected, got = pair()
    for _, _, logits in (expected, got):
        Square.apply(Same.apply(logits)).sum().backward()
    assert_same_gradients(expected[0], got[0])


def test_saved_tensor_hooks_and_checkpoint() -> None:
    expected, got = pair()
    for _, _, logits in (expected, got):
        with torch.autograd.graph.save_on_cpu():
            a = (logits * logits).sum()
        b = checkpoint(lambda t: t.sin().sum(), logits, use_reentrant=False)
        c = checkpoint(lambda t: t.cos().sum(), logits, use_reentrant=True)
        (a + b + c).backward()
    assert_same_gradients(expected[0], got[0])


def other_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1), label_smoothing=0.1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_passed_to_another_compiled_function(inner: str, dynamic: bool) -> None:
    data = batch()
    model, twin = Model().double(), Model().double()
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(twin, backend=Backend("aot_eager"), dynamic=dynamic)
    counter = CompileCounterWithBackend(inner)
    loss_fn = torch.compile(other_loss, backend=counter, dynamic=dynamic, fullgraph=True)
    for prepare in (lambda t: t, lambda t: t, lambda t: t.clone(), lambda t: t[0].mul_(2)):
        results = []
        for module, function in ((model, other_loss), (compiled, loss_fn)):
            loss, logits = module(*data)
            prepare(logits)
            other = function(logits, data[1])
            (loss + other).backward()
            results.append(other)
        torch.testing.assert_close(results[1], results[0])
        assert_same_gradients(model, twin)
    assert counter.frame_count == 2  # from the parts; from values that somebody has written to


def test_compiled_functions_that_write_detach_or_run_without_grad() -> None:
    def write(t: torch.Tensor) -> torch.Tensor:
        t.mul_(2)
        t[0] = 1.0
        return t.sum()

    for inner in ("eager", "aot_eager"):
        for use in (write, lambda t: write(t.detach()), lambda t: t.double().detach() * 2):
            expected, got = pair()
            if inner == "aot_eager":
                got[2].materialize()  # looked at: then its values are what is passed
            plain = use(expected[2])
            ours = torch.compile(use, backend=inner, fullgraph=True)(got[2])
            torch.testing.assert_close(ours, plain)
            torch.testing.assert_close(got[2].materialize(), expected[2])
            for logits in (expected[2], got[2]):
                (logits * 3).sum().backward()
            assert_same_gradients(expected[0], got[0])
        _, _, logits = deferred()
        with torch.no_grad():
            assert torch.compile(torch.argmax, backend=inner)(logits) == logits.argmax()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_graph_breaks_before_and_after_the_head(inner: str) -> None:
    def forward(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = model.mix(model.embed(ids))
        torch._dynamo.graph_break()
        logits = model.head(hidden)
        loss = F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1))
        torch._dynamo.graph_break()
        return loss + logits.square().mean(), logits

    model, data, backend = Model().double(), batch(), Backend(inner)
    twin = copy.deepcopy(model)
    compiled = torch.compile(forward, backend=backend)
    for _ in range(2):
        results = []
        for function, module in ((forward, model), (compiled, twin)):
            loss, logits = function(module, *data)
            (loss + logits.cos().mean()).backward()
            results.append(loss)
        torch.testing.assert_close(results[1], results[0])
        assert_same_gradients(model, twin)
    assert sum(len(result.deferred) for result in backend.results) == 1


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_deferred_from_a_deferred(inner: str) -> None:
    def forward(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = logits * 2
        return scaled.square().mean(), scaled

    expected, got = pair(inner=inner)
    for _, loss, logits in (expected, got):
        function = (
            forward if logits is expected[2] else torch.compile(forward, backend=Backend(inner))
        )
        other, scaled = function(logits)
        assert type(scaled) is type(logits)
        (loss + other + scaled.exp().mean()).backward()
    assert_same_gradients(expected[0], got[0])


def test_an_output_that_is_a_view() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(x.sin(), w)[:, 1:].mT
        return logits.square().mean(), logits

    w = torch.randn(VOCAB, WIDTH, requires_grad=True)
    compiled = torch.compile(forward, backend=Backend("aot_eager"), dynamic=True)
    for rows in (4, 6):
        x = torch.randn(rows, WIDTH)
        plain = forward(x, w)[1]
        for use in (lambda t: t, lambda t: t.double(), lambda t: t.detach(), lambda t: t.mT):
            ours = compiled(x, w)[1]
            assert type(ours) is DeferredTensor
            got, expected = use(ours), use(plain)
            assert got.stride() == expected.stride()
            assert got.storage_offset() == expected.storage_offset()
            torch.testing.assert_close(got * 1, expected * 1)
        for tensor in (plain, ours):
            tensor[1:].mul_(2)
        torch.testing.assert_close(ours * 1, plain * 1)


def test_a_frontier_that_is_a_view() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.chunk(x.cos(), 2)[1]
        logits = F.linear(hidden, w)
        return logits.square().mean(), logits

    seen = []
    for function in (forward, torch.compile(forward, backend=Backend("aot_eager"))):
        torch.manual_seed(0)
        x = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
        w = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=True)
        loss, logits = function(x, w)
        (loss + logits.exp().mean()).backward()
        seen.append([loss, logits * 1, x.grad, w.grad])
    assert type(logits) is DeferredTensor
    torch.testing.assert_close(seen[1], seen[0])


def test_passed_to_inductor() -> None:
    expected, got = pair()
    scale = torch.compile(lambda t: (t * 2).square().mean(), fullgraph=True)
    scale(got[2]).backward()
    (expected[2] * 2).square().mean().backward()
    assert_same_gradients(expected[0], got[0])


def test_returned_from_another_compiled_function() -> None:
    expected, got = pair()
    same = torch.compile(lambda t: (t, t.view(-1), t.sum()), backend="aot_eager")
    results = same(got[2])
    torch.testing.assert_close(results[1], expected[2].view(-1))
    torch.stack([r.sum() for r in results]).sum().backward()
    (expected[2].sum() * 3).backward()
    assert_same_gradients(expected[0], got[0])


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_reading_after_an_optimizer_step_is_an_error(kind: Any, options: dict[str, bool]) -> None:
    model, loss, logits = deferred(inner="aot_eager")
    other = logits.detach()
    loss.backward()
    kind(model.parameters(), lr=0.1, **options).step()
    with pytest.raises(DeferredOutputError) as error:
        logits.sum()
    message = str(error.value)
    assert "head.weight, has been changed in place since the forward pass" in message
    assert "before optimizer.step()" in message
    assert "options={'defer_outputs': False}" in message
    assert "test_deferred.py:" in message
    for read in (other.tolist, logits.__repr__, logits.float().double().sum, lambda: logits[0]):
        with pytest.raises(DeferredOutputError):
            read()
    assert logits.shape == (2, 6, VOCAB)


@pytest.mark.parametrize("seen_before", [False, True])
def test_reading_too_late_in_a_compiled_function_says_the_same(seen_before: bool) -> None:
    double = torch.compile(lambda t: t * 2, backend="aot_eager")
    if seen_before:
        double(deferred()[2])
    model, loss, logits = deferred()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"DeferredOutputError: .*has been changed in place"):
        double(logits)


def test_a_compiled_optimizer_step_is_noticed() -> None:
    model, loss, logits = deferred()
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.compile(optimizer.step, backend="aot_eager")()
    with pytest.raises(DeferredOutputError):
        logits.sum()


def test_memory_swapped_or_freed_behind_the_counter_is_noticed() -> None:
    model, _, logits = deferred()
    model.head.weight.data = model.head.weight.data.clone()
    with pytest.raises(DeferredOutputError):
        logits.sum().item()
    model, _, logits = deferred()
    with torch.autograd._unsafe_preserve_version_counter(model.head.weight):
        model.head.weight.untyped_storage().resize_(0)
    with pytest.raises(DeferredOutputError):
        logits.sum().item()


def test_values_read_before_the_step_stay() -> None:
    model, loss, logits = deferred("aot_eager")
    detached = logits.detach()
    values = logits.tolist()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert logits.tolist() == values
    assert detached.tolist() == values
    with pytest.raises(RuntimeError, match="inplace operation"):
        logits.sum().backward()


def test_after_backward_values_can_be_made_and_gradients_cannot() -> None:
    (_, _, plain), (_, loss, logits) = pair(inner="aot_eager")
    loss.backward()
    torch.testing.assert_close(logits.detach().clone(), plain.detach())
    with pytest.raises(RuntimeError, match="second time"):
        logits.sum().backward()


def test_no_grad() -> None:
    model = Model()
    data = batch()
    with torch.no_grad():
        _, logits = torch.compile(model, backend=Backend("aot_eager"))(*data)
    assert not logits.requires_grad
    assert logits.grad_fn is None
    assert not logits.is_materialized
    assert torch.equal(logits, model(*data)[1])
    assert not logits.sum().requires_grad


def test_an_output_made_with_gradients_off() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits = F.linear(x.sin(), w)
        return (logits.mean() * x).sum(), logits

    x, w = torch.randn(4, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH, requires_grad=True)
    loss, logits = torch.compile(forward, backend=Backend("aot_eager"))(x, w)
    assert type(logits) is DeferredTensor
    assert loss.requires_grad
    assert not logits.requires_grad
    assert torch.equal(logits, forward(x, w)[1])
    assert logits.mul_(2).grad_fn is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_read_without_gradients_then_used_with_them(mode: Any) -> None:
    expected, got = pair()
    with mode():
        got[2].argmax()
    for _, _, logits in (expected, got):
        logits[0].mul_(2)
        (logits.mul_(2).square().sum() + logits[1].square().sum()).backward()
    assert_same_gradients(expected[0], got[0])


@pytest.mark.parametrize("read_inside", [True, False])
def test_inference_mode(read_inside: bool) -> None:
    model = Model()
    data = batch()
    expected = model(*data)[1]
    with torch.inference_mode():
        _, logits = torch.compile(model, backend=Backend("aot_eager"))(*data)
        assert type(logits) is DeferredTensor
        assert logits.is_inference()
        if read_inside:
            assert torch.equal(logits, expected)
            assert logits.mul_(1) is logits
            assert torch.ops.aten.mul_.Tensor(logits, 1) is logits
    assert torch.equal(logits, expected)
    with pytest.raises(RuntimeError, match="inference tensor"):
        logits.mul_(2)


def test_inference_tensors_of_the_caller_are_read_at_once() -> None:
    def head(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden, weight)
        return logits.sum(), logits

    with torch.inference_mode():
        hidden, weight = torch.randn(4, WIDTH), torch.randn(VOCAB, WIDTH)
        backend = Backend()
        _, logits = torch.compile(head, backend=backend)(hidden, weight)
        assert backend.results[0].deferred
        assert type(logits) is torch.Tensor
        expected = head(hidden, weight)[1]
        weight.zero_()
        assert torch.equal(logits, expected)


def test_read_under_a_fake_mode_keeps_real_values() -> None:
    (_, _, plain), (_, _, logits) = pair()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert logits.sum().shape == ()
        assert mode.from_tensor(logits).shape == plain.shape
    assert torch.equal(logits, plain)


def test_other_threads() -> None:
    (_, _, plain), (_, _, logits) = pair()
    results: list[Any] = []

    def read() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            results.append(logits.detach().clone())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(r, plain) for r in results)


def test_the_closure_runs_once() -> None:
    backend = Backend()
    _, logits = torch.compile(Model(), backend=backend)(*batch())
    runs: list[int] = []
    backend.results[0].deferred[0].closure.register_forward_hook(lambda *_: runs.append(1))
    for read in (logits.materialize, logits.argmax, logits.detach().max, logits.tolist):
        read()
    assert len(runs) == 1


def test_a_failing_closure_leaves_autocast_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, backend = Model(region=torch.bfloat16), Backend()
    _, logits = torch.compile(model, backend=backend)(*batch())
    (spec,) = backend.results[0].deferred
    assert "_enter_autocast" in spec.closure.code

    def fail(*args: Any) -> Any:
        torch.amp.autocast_mode._enter_autocast("cpu", torch.bfloat16, True, None)
        raise MemoryError

    monkeypatch.setattr(type(spec.closure), "forward", fail)
    with pytest.raises(MemoryError):
        logits.sum()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.autocast_increment_nesting() == 1
    torch.autocast_decrement_nesting()
    monkeypatch.undo()
    assert logits.sum().isfinite()


def test_memory_of_a_training_step() -> None:
    """Neither the output nor AOTAutograd's zero tangent for it is ever there."""
    vocab, rows = 4096, 64
    weight = torch.randn(vocab, WIDTH, requires_grad=True)
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    labels = torch.randint(vocab, (rows,))

    def forward(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden, weight)
        return F.cross_entropy(logits, labels), logits

    def peak(backend: Any) -> int:
        torch._dynamo.reset()
        compiled = torch.compile(forward, backend=backend)

        def step() -> Any:
            loss, logits = compiled(hidden, weight)
            loss.backward()
            return logits

        step()
        return measure_step(step, [hidden, weight]).peak_intermediate_nbytes

    nbytes = rows * vocab * 4
    assert peak(Backend("aot_eager")) <= peak("aot_eager") - 2 * nbytes


def test_what_stays_alive() -> None:
    hidden: list[weakref.ref[torch.Tensor]] = []

    class Watch(Backend):
        def __call__(self, gm: Any, example_inputs: Any) -> Any:
            result = defer_outputs(gm, min_bytes=256)

            def call(*args: Any) -> list[Any]:
                outputs = result.graph_module(*args)
                hidden.append(weakref.ref(outputs[-1]))
                return wrap_outputs(result.deferred, outputs, args, num_outputs=2)

            return call

    gc.disable()
    try:
        with torch.no_grad():
            _, logits = torch.compile(Model(), backend=Watch())(*batch())
        assert hidden[-1]() is not None  # an untouched output holds its frontier
        logits.sum()
        assert hidden[-1]() is None  # a materialized one does not
        loss, logits = torch.compile(Model(), backend=Watch())(*batch())
        cell = weakref.ref(logits._cell)
        del loss, logits
        assert hidden[-1]() is None
        assert cell() is None
    finally:
        gc.enable()


def test_several_outputs_and_dynamic_numbers() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor, scale: float) -> tuple[Any, ...]:
        raw = F.linear(x.cos(), w)
        capped = torch.tanh(raw * scale)
        return raw, capped.mean(), capped, x.cos().sum(-1)

    backend = Backend("aot_eager")
    compiled = torch.compile(forward, backend=backend, dynamic=True)
    for rows, scale in ((4, 0.5), (6, 0.75), (9, 2.5)):
        x, w = torch.randn(rows, WIDTH), torch.randn(VOCAB, WIDTH, requires_grad=True)
        got, expected = compiled(x, w, scale), forward(x, w, scale)
        assert [type(t) is DeferredTensor for t in got] == [True, False, True, False]
        torch.testing.assert_close([t * 1 for t in got], [t * 1 for t in expected])
        grads = [
            torch.autograd.grad(o[0].sum() + o[1] + o[2].square().sum(), w) for o in (got, expected)
        ]
        torch.testing.assert_close(*grads)


def test_a_frontier_that_the_caller_changes_is_noticed() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[Any, ...]:
        hidden = x.cos()
        logits = F.linear(hidden, w)
        return logits.mean(), logits, hidden

    x, w = torch.randn(4, WIDTH), torch.randn(VOCAB, WIDTH)
    _, logits, hidden = torch.compile(forward, backend=Backend("aot_eager"))(x, w)
    hidden.mul_(2)
    with pytest.raises(DeferredOutputError, match="hidden"):
        logits.sum().item()


def test_nothing_deferred_changes_nothing() -> None:
    outputs = [torch.ones(1), None, 3]
    assert wrap_outputs((), outputs, (), num_outputs=3) == outputs


def test_transformers_llama_and_a_mixed_precision_wrapper() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(512, (2, 8))
    outputs = torch.compile(model, backend=Backend("aot_eager"))(input_ids=ids, labels=ids)
    wide = outputs.logits.to(torch.float64)  # as accelerate does with outputs in low precision
    detached = outputs.logits.detach()  # as Trainer does
    assert not outputs.logits.is_materialized
    (outputs.loss + wide.square().mean()).backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    expected = model(input_ids=ids, labels=ids)
    (expected.loss + expected.logits.double().square().mean()).backward()
    torch.testing.assert_close(detached, expected.logits.detach())
    torch.testing.assert_close(grads, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-6)
