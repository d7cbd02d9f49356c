"""What is saved for the backward goes to the host and comes back: the same numbers, less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import mstc
import passes.offload
from mstc import budget, partition
from mstc.budget import LADDER, OFFLOADED
from mstc.driver import ChunkPass
from mstc.inductor import CustomPartitionerFn, compile_outer
from mstc.options import Options, Setting
from mstc.report import Report
from mstc.runtime.memory import measure_step
from mstc.watch import Watch
from passes.offload import offload_saved_values
from tests.models import (
    EAGER,
    INDUCTOR,
    NON_LEAF,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
)

WITHOUT = Setting(tightness=1.0, least_divisor=4)


class Layer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.down(nn.functional.gelu(self.up(x)))


class Decoder(nn.Module):
    """Attention and MLPs below a vocabulary projection."""

    def __init__(self, vocab: int = 64, hidden: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Layer(hidden) for _ in range(layers))
        self.head = nn.Linear(hidden, vocab, bias=False)
        self.checkpointed = False

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def batch(*shape: int, vocab: int = 64, device: str = "cpu") -> tuple[Tensor, Tensor]:
    ids = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(1))
    return ids.to(device), ids.roll(-1, 1).to(device)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The CPU is taken for an accelerator, whose every saved value moves; the graphs made so."""
    found: list[tuple[str, str]] = []

    def offload(*args: Any) -> Any:
        done = offload_saved_values(*args, min_nbytes=64)
        if done is not None:
            found.append((str(done.forward), str(done.backward)))
        return done

    monkeypatch.setattr(passes.offload, "is_far", lambda device: True)
    monkeypatch.setattr(partition, "offload_saved_values", offload)
    return found


def chosen(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    """Every budget ends at this setting."""
    monkeypatch.setattr(budget, "_search", lambda *_: (setting, 1))
    monkeypatch.setattr(budget, "_kept", lambda key: None)


def gradients(
    model: nn.Module, call: Callable[..., Tensor], given: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    model.zero_grad()
    call(*given).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# -- numbers


@NON_LEAF
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("shape", [(1, 64), (3, 37), (2, 1)], ids=str)
@pytest.mark.parametrize("setting", OFFLOADED, ids=str)
def test_numbers_are_those_without(
    setting: Setting,
    shape: tuple[int, int],
    checkpointed: bool,
    graphs: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen(monkeypatch, setting)
    torch.manual_seed(0)
    model = Decoder().double()
    expected = gradients(model, model, batch(*shape))
    model.checkpointed = checkpointed
    options = EAGER | {"memory_budget": "1GiB"}
    compiled = torch.compile(model, backend="mst", options=options)
    for _ in range(2):  # the second on what the first has left
        found = gradients(model, compiled, batch(*shape))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14, msg=name)
    ((forward, backward),) = graphs
    sent = forward.count("torch.ops.prims.device_put.default")
    assert sent == backward.count("torch.ops.prims.device_put.default") > 3
    (note,) = [n for n in mstc.last_report().notes if "goes to the host:" in n]
    assert "what is saved for the backward goes to the host" in note


@NON_LEAF
def test_numbers_through_inductor(
    graphs: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(monkeypatch, OFFLOADED[0])
    model = Decoder()
    expected = gradients(model, model, batch(2, 37))
    compiled = torch.compile(model, backend="mst", options=INDUCTOR | {"memory_budget": "1GiB"})
    found = gradients(model, compiled, batch(2, 37))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    assert graphs


def test_nested_regions_stay(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is compiled by itself was traced with what is saved on the device."""
    chosen(monkeypatch, OFFLOADED[0])
    torch.manual_seed(0)
    model, given = Decoder(layers=2).double(), batch(2, 33)
    expected = gradients(model, model, given)
    marked = torch.compiler.nested_compile_region(Layer.forward)
    monkeypatch.setattr(Layer, "forward", marked)
    options = {"memory_budget": 1, "over_budget": "warn"}
    found = gradients(model, torch.compile(model, backend="mst", options=EAGER | options), given)
    assert not graphs
    assert "nested_compile_region" in str(mstc.last_report())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_mistake_of_ours(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The step runs with everything where it was, and says so."""

    def fail(*args: Any) -> None:
        raise ZeroDivisionError("of ours")

    chosen(monkeypatch, OFFLOADED[0])
    monkeypatch.setattr(partition, "offload_saved_values", fail)
    model = Decoder()
    compiled = torch.compile(model, backend="mst", options=EAGER | {"memory_budget": "1GiB"})
    with pytest.warns(mstc.errors.FallbackWarning, match="ZeroDivisionError: of ours"):
        assert gradients(model, compiled, batch(1, 16))


# -- caches


@NON_LEAF
def test_caches_tell_it_apart(
    graphs: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model with, without, and with again: two compilations, and a hit with its report."""
    options = INDUCTOR | {"memory_budget": "1GiB"}
    model = Decoder(layers=1)
    hits: list[tuple[int, int]] = []
    for setting in (OFFLOADED[0], WITHOUT, OFFLOADED[0], WITHOUT):
        chosen(monkeypatch, setting)
        torch._dynamo.reset()
        counters.clear()
        gradients(model, torch.compile(model, backend="mst", options=options), batch(1, 16))
        assert any("to the host:" in n for n in mstc.last_report().notes) == setting.offload
        hits.append((counters["aot_autograd"]["autograd_cache_hit"], len(graphs)))
    assert hits == [(0, 1), (0, 1), (1, 1), (1, 1)]


def test_keys() -> None:
    settings = (WITHOUT, OFFLOADED[0], Setting())
    keys = {str(ChunkPass(Options(setting=s), Report()).uuid()) for s in settings}
    assert len(keys) == 3


class Users(CustomPartitionerFn):
    """A partitioner of the user's."""

    def __init__(self) -> None:
        self.calls = 0

    def uuid(self) -> object:
        return None

    def __call__(self, gm: GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return torch._functorch.partitioners.min_cut_rematerialization_partition(
            gm, joint_inputs, **kwargs
        )


def test_a_partitioner_of_the_users_goes_first() -> None:
    users, after = Users(), []
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def compiler(gm: GraphModule, inputs: Any) -> Any:
        return compile_outer(
            gm,
            inputs,
            ChunkPass(Options(), Report()),
            {"custom_partitioner_fn": users},
            after_partition=[lambda *args: after.append(args[2])],
        )

    for _ in range(2):  # not cached: the user's partitioner does not say what it does
        torch._dynamo.reset()
        torch.compile(model, backend=compiler)(torch.ones(2, 4)).sum().backward()
    assert users.calls == 2
    assert after == [1, 1]


# -- the ladder


def ends_of_the_search(monkeypatch: pytest.MonkeyPatch, device: str, peaks: Any) -> Setting:
    """What is chosen for a budget of 10 bytes where settings have these peaks."""
    monkeypatch.setattr(budget, "graph_peak", lambda g, i, options, c: peaks(options.setting))
    inputs = [torch.empty(2, requires_grad=True)]
    parts = budget._parts(inputs, torch.device(device))
    return budget._search(None, inputs, Options(), None, 10, parts)[0]  # type: ignore[arg-type]


def test_a_cpu_has_no_such_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [torch.empty(2, requires_grad=True)]
    on_cpu = budget._parts(inputs, torch.device("cpu"))
    assert [s for part in on_cpu for s in part] == list(LADDER)
    assert not any(s.offload for s in LADDER)
    assert budget._parts(inputs, torch.device("cuda")) == (*on_cpu, OFFLOADED)
    with torch.no_grad():
        assert OFFLOADED not in budget._parts(inputs, torch.device("cuda"))
    small = lambda s: 5 if s.offload else 20 - s.least_divisor  # noqa: E731
    assert ends_of_the_search(monkeypatch, "cpu", small) == LADDER[-1]


def test_it_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks(setting: Setting) -> int:
        return 12 if not setting.offload else 9

    assert ends_of_the_search(monkeypatch, "cuda", peaks) == OFFLOADED[0]
    smallest = lambda s: 16 if not s.offload else 25 - s.least_divisor  # noqa: E731
    assert ends_of_the_search(monkeypatch, "cuda", smallest) == OFFLOADED[-1]
    fits_before = lambda s: 9 if s == LADDER[-1] or s.offload else 12  # noqa: E731
    assert ends_of_the_search(monkeypatch, "cuda", fits_before) == LADDER[-1]


def test_a_setting_says_so() -> None:
    assert str(OFFLOADED[0]).endswith("what is saved goes to the host")


# -- bytes


def test_only_the_devices_memory_counts() -> None:
    with FakeTensorMode():
        weight = torch.empty(4, device="cuda")
        watch, on_host = Watch([weight]), Watch([weight.to("cpu")])
        with watch:
            moved = torch.empty(1000, device="cuda").to("cpu")
            back = torch.empty(10, device="cuda")
        with on_host:
            kept = moved + 1
        del moved, back, kept
        assert watch.summary([]).peak_nbytes == 4000
        assert on_host.summary([]).peak_nbytes == 4000


# -- on a GPU


@pytest.mark.gpu
@NON_LEAF
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_on_a_gpu(checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are those without, and the allocator's peak falls."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Decoder(vocab=1024, hidden=256, layers=4)
    model.checkpointed = checkpointed
    given = batch(2, 4099, vocab=1024, device="cuda")
    peaks: list[int] = []
    found: list[dict[str, Tensor]] = []
    for setting in (WITHOUT, OFFLOADED[0]):
        chosen(monkeypatch, setting)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="mst", options={"memory_budget": "60GiB"})
        for _ in range(3):  # buffers are used again, and pinned memory too
            found.append(gradients(model, compiled, given))
            found[-1] = {name: g.clone() for name, g in found[-1].items()}
        model.zero_grad()
        step = lambda: compiled(*given).backward()  # noqa: B023, E731
        peaks.append(measure_step(step, model.parameters(), "cuda").peak_nbytes)
    assert peaks[1] < (0.9 if checkpointed else 0.7) * peaks[0]
    for later in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(later[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
