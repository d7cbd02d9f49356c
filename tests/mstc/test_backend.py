"""`torch.compile(model, backend="mst")` against eager and float64, on small models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mstc
from tests.models import (
    MLP,
    NON_LEAF,
    TinyLM,
    assert_no_fallback,
    assert_same,
    compile_mst,
    counting_loops,
    fresh_compiler,  # noqa: F401  (an autouse fixture)
    has_loops,
    lm_batch,
    three_way,
    tokens,
    train,
)

FUNCTION = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")

# -- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("bias", "tied"), [(False, False), (True, False), (False, True)])
def test_cross_entropy(reduction: str, bias: bool, tied: bool) -> None:
    three_way(TinyLM(reduction=reduction, bias=bias, tied=tied), lm_batch(2, 37, ignored=9))


def test_cross_entropy_without_ignored_labels() -> None:
    three_way(TinyLM(), lm_batch(1, 64))


def test_flat_batch() -> None:
    three_way(TinyLM(), lm_batch(61))


def test_recompute_everywhere() -> None:
    three_way(TinyLM(), lm_batch(2, 37, ignored=9), options={"gradient_in_forward": False})


def test_gradients_are_made_in_the_forward_loop() -> None:
    three_way(TinyLM(), lm_batch(2, 37))
    (graph,) = mstc.last_report().graphs
    assert "gradient-in-forward" in {loop.mode for loop in graph.loops}


def test_all_labels_ignored_gives_nan_as_in_eager() -> None:
    model, batch = TinyLM(), lm_batch(2, 16, ignored=32)
    eager = train(model, model, batch)
    ours = train(model, compile_mst(model), batch)
    assert torch.isnan(eager.loss)
    assert torch.isnan(ours.loss)
    for name, gradient in eager.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, equal_nan=True)


def test_all_labels_ignored_gives_zero_for_a_sum() -> None:
    model, batch = TinyLM(reduction="sum"), lm_batch(2, 16, ignored=32)
    ours = train(model, compile_mst(model), batch)
    assert ours.loss == 0
    assert all(torch.count_nonzero(g) == 0 for g in ours.gradients.values())


def test_unreduced_loss_with_weights() -> None:
    class Model(TinyLM):
        def forward(self, ids: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
            logits = self.head(self.hidden(ids)).flatten(0, 1)
            losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
            return (losses * weights.flatten()).sum() / weights.sum()

    three_way(Model(), (*lm_batch(2, 37), torch.rand(2, 37)))


def test_label_smoothing_and_class_weights() -> None:
    class Model(TinyLM):
        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            logits = self.head(self.hidden(ids)).flatten(0, 1)
            weight = torch.linspace(0.5, 1.5, logits.shape[-1], dtype=logits.dtype)
            return F.cross_entropy(logits, labels.flatten(), weight=weight, label_smoothing=0.1)

    three_way(Model(), lm_batch(2, 37, ignored=5), chunked=True)


def test_z_loss_and_softcap() -> None:
    class Model(TinyLM):
        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            logits = 5 * torch.tanh(self.head(self.hidden(ids)).flatten(0, 1) / 5)
            loss = F.cross_entropy(logits, labels.flatten())
            return loss + 1e-2 * logits.logsumexp(-1).square().mean()

    three_way(Model(), lm_batch(2, 37))


def test_distillation() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = TinyLM(), TinyLM().requires_grad_(False)

        def forward(self, ids: Tensor) -> Tensor:
            student = self.student.head(self.student.hidden(ids)).log_softmax(-1)
            with torch.no_grad():
                teacher = self.teacher.head(self.teacher.hidden(ids)).softmax(-1)
            return F.kl_div(student.flatten(0, 1), teacher.flatten(0, 1), reduction="batchmean")

    three_way(Model(), (tokens(2, 37),))


@pytest.mark.parametrize("frozen", ["head", "embed", "layers"])
def test_frozen_parts(frozen: str) -> None:
    model = TinyLM(layers=2)
    getattr(model, frozen).requires_grad_(False)
    ours = three_way(model, lm_batch(2, 37, ignored=3))
    assert not any(name.startswith(frozen) for name in ours.gradients)


def test_padded_labels_are_shifted_as_in_hugging_face() -> None:
    class Model(TinyLM):
        def forward(self, ids: Tensor) -> Tensor:
            logits = self.head(self.hidden(ids)).float()
            shifted = F.pad(ids, (0, 1), value=-100)[..., 1:].contiguous()
            return F.cross_entropy(logits.view(-1, 96), shifted.view(-1), ignore_index=-100)

    model = Model()
    ids = tokens(2, 37)
    eager = train(model, model, (ids,))
    assert_same(train(model, compile_mst(model), (ids,)), eager)
    assert has_loops([mstc.last_report()])


def test_logits_are_sliced() -> None:
    class Model(TinyLM):
        def forward(self, ids: Tensor) -> Tensor:
            logits = self.head(self.hidden(ids))[:, :-1]
            return F.cross_entropy(logits.reshape(-1, 96), ids[:, 1:].reshape(-1))

    three_way(Model(), (tokens(2, 37),))


def test_two_losses() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.second = TinyLM(), nn.Linear(16, 80)

        def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.body.hidden(ids).flatten(0, 1)
            first = F.cross_entropy(self.body.head(hidden), labels.flatten())
            second = F.cross_entropy(self.second(hidden), labels.flatten() % 80)
            return first, second

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            first, second = self.model(ids, labels)
            return first + 0.3 * second

    three_way(Sum(), lm_batch(2, 37))

    model = Model()
    batch = lm_batch(2, 37)
    call = compile_mst(model)
    for weights in ((1.0, 0.3), (1.0, 0.0), (0.0, 2.0)):

        def both(run: Any, weights: tuple[float, float] = weights) -> Tensor:
            first, second = run(*batch)
            return weights[0] * first + weights[1] * second

        eager = train(model, lambda both=both: both(model))
        assert_same(train(model, lambda both=both: both(call)), eager)
    assert has_loops([mstc.last_report()])


def test_only_one_of_two_losses_is_differentiated() -> None:
    class Model(TinyLM):
        def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.hidden(ids).flatten(0, 1)
            loss = F.cross_entropy(self.head(hidden), labels.flatten())
            return loss, hidden.square().mean()

    model, batch = Model(), lm_batch(2, 37)
    call = compile_mst(model)
    for index in (0, 1):
        eager = train(model, lambda i=index: model(*batch)[i])
        ours = train(model, lambda i=index: call(*batch)[i])
        for name, gradient in eager.gradients.items():
            torch.testing.assert_close(ours.gradients[name], gradient)


# -- what is done with the loss -----------------------------------------------------------------


def test_loss_scaled_before_backward() -> None:
    three_way(TinyLM(), lm_batch(2, 37), backward=lambda loss: (loss * 1024).backward())


def test_backward_with_a_gradient() -> None:
    gradient = torch.tensor(-0.37)
    three_way(
        TinyLM(),
        lm_batch(2, 37),
        backward=lambda loss: loss.backward(gradient=gradient.to(loss.dtype)),
    )


def test_zero_gradient() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    ours = train(model, compile_mst(model), batch, backward=lambda loss: (loss * 0).backward())
    assert all(torch.count_nonzero(g) == 0 for g in ours.gradients.values())


def test_gradient_accumulation_over_micro_batches() -> None:
    model, full = TinyLM(layers=2), lm_batch(8, 21)
    eager = train(model, model, full)
    call = compile_mst(model)
    model.zero_grad()
    for ids, labels in zip(full[0].chunk(4), full[1].chunk(4), strict=True):
        (call(ids, labels) / 4).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, eager.gradients[name])


def test_backward_twice() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    eager = train(model, model, batch)
    call = compile_mst(model)
    model.zero_grad()
    loss = call(*batch)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * eager.gradients[name])


def test_backward_twice_without_retain_graph_says_so() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    loss = compile_mst(model)(*batch)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_of_some_parameters() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    wanted = [model.head.weight, model.layers[0].up.bias]
    eager = torch.autograd.grad(model(*batch), wanted)
    ours = torch.autograd.grad(compile_mst(model)(*batch), wanted)
    for left, right in zip(ours, eager, strict=True):
        torch.testing.assert_close(left, right)


def test_double_backward_is_refused() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    loss = compile_mst(model)(*batch)
    with pytest.raises(RuntimeError, match="double backward"):  # noqa: PT012
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        sum(g.square().sum() for g in gradients).backward()


def test_double_backward_of_an_mlp_is_refused() -> None:
    model, x = MLP(), torch.randn(40, 16, requires_grad=True)
    y = compile_mst(model)(x).sum()
    with pytest.raises(RuntimeError, match="double backward"):  # noqa: PT012
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        gradient.square().sum().backward()


# -- shared, reused, changed --------------------------------------------------------------------


class Scalar(nn.Module):
    """Makes a scalar of a module's output, so that every position has its own weight."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return (y.square() * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum()


def test_one_layer_used_twice() -> None:
    class Twice(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x) + x)

    three_way(Scalar(Twice()), (torch.randn(53, 16, requires_grad=True),))


def test_one_layer_used_on_two_inputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = MLP()

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x[:, ::2]) + self.mlp(x[:, 1::2])

    three_way(Scalar(Model()), (torch.randn(2, 50, 16, requires_grad=True),))


def test_input_with_gradient() -> None:
    three_way(Scalar(MLP()), (torch.randn(3, 29, 16, requires_grad=True),))


@NON_LEAF
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[..., 4:20],
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x[:, :1].expand(-1, 40, -1),
        lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    ],
    ids=["transposed", "strided", "narrowed", "batch-expanded", "token-expanded", "F"],
)
def test_views_as_inputs(view: Any) -> None:
    base = torch.randn(2, 40, 20, requires_grad=True)
    hidden = view(base).shape[-1]

    def prepare(value: Any) -> Any:
        return view(value) if isinstance(value, Tensor) else value

    three_way(Scalar(MLP(hidden, 4 * hidden)), (base,), prepare=prepare)


def test_weights_in_other_layouts() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(64, 16).t() / 4)
            self.down = nn.Parameter(torch.randn(16, 64, 2)[..., 0].t() / 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.up) @ self.down

    three_way(Scalar(Model()), (torch.randn(2, 31, 16, requires_grad=True),))


def test_gain_over_two_dims_of_a_transposed_value() -> None:
    """The gradient of the gain is a sum over tokens whose layout follows the transposed value."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(12, 16))
            self.shift = nn.Parameter(torch.randn(12, 16))
            self.weight = nn.Parameter(torch.randn(16 * 12, 16) / 10)

        def forward(self, x: Tensor) -> Tensor:
            wide = (x @ self.weight.t()).view(-1, 16, 12).transpose(1, 2)
            wide = torch.tanh(wide * self.gain + self.shift)
            return wide.transpose(1, 2).reshape(-1, 16 * 12) @ self.weight

    three_way(Scalar(Model()), (torch.randn(59, 16, requires_grad=True),))


def test_input_changed_in_place_after_it_is_read() -> None:
    """Frozen, so that no gradient needs the old value."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.mlp = MLP().requires_grad_(False), MLP()

        def forward(self, x: Tensor) -> Tensor:
            y = self.frozen(x)
            x.mul_(2)
            return (self.mlp(y) + x).square().sum()

    model = Model()
    x = torch.randn(40, 16)
    theirs, ours = x.clone(), x.clone()
    eager = train(model, model, (theirs,))
    assert_same(train(model, compile_mst(model), (ours,)), eager)
    torch.testing.assert_close(ours, theirs)


def test_input_changed_in_place_before_it_is_read() -> None:
    class Model(MLP):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(1)
            return super().forward(x).square().sum()

    model = Model()
    x = torch.randn(40, 16)
    theirs, ours = x.clone(), x.clone()
    eager = train(model, model, (theirs,))
    assert_same(train(model, compile_mst(model), (ours,)), eager)
    torch.testing.assert_close(ours, theirs)


def test_wide_value_changed_in_place() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            wide = self.up(x)
            wide[:, 3] = 0.5
            wide.mul_(0.7)
            return self.down(wide.relu_())

    three_way(Scalar(Model()), (torch.randn(50, 16, requires_grad=True),))


def test_running_statistics() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = MLP()
            self.register_buffer("mean", torch.zeros(64))

        def forward(self, x: Tensor) -> Tensor:
            wide = F.gelu(self.mlp.up(x))
            with torch.no_grad():
                self.mean.mul_(0.9).add_(wide.mean(0), alpha=0.1)
            return self.mlp.down(wide - self.mean).square().sum()

    model = Model()
    twin = copy.deepcopy(model)
    call = compile_mst(model)
    for seed in range(3):
        x = torch.randn(50, 16, generator=torch.Generator().manual_seed(seed))
        assert_same(train(model, call, (x,)), train(twin, twin, (x,)))
        torch.testing.assert_close(model.mean, twin.mean)


def test_batch_norm_over_tokens() -> None:
    layers = (nn.Linear(16, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))
    model = nn.Sequential(*layers)
    twin = copy.deepcopy(model)
    call = compile_mst(Scalar(model))
    for seed in range(2):
        x = torch.randn(50, 16, generator=torch.Generator().manual_seed(seed))
        assert_same(train(model, call, (x,)), train(twin, Scalar(twin), (x,)), tolerance=1e-4)
        torch.testing.assert_close(model[1].running_var, twin[1].running_var)


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_steps_equal_eager_training(fused: bool) -> None:
    model = TinyLM(layers=2, tied=True)
    twin = copy.deepcopy(model)
    call = compile_mst(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, fused=fused) for m in (model, twin)]
    for seed in range(3):
        batch = (tokens(2, 37, seed=seed), tokens(2, 37, seed=seed + 10))
        assert_same(train(model, call, batch), train(twin, twin, batch), tolerance=1e-4)
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# -- modes, processes, wrappers -----------------------------------------------------------------


def test_no_grad_then_training_then_evaluation() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    eager = train(model, model, batch)
    call = compile_mst(model)
    with torch.no_grad():
        torch.testing.assert_close(call(*batch), eager.loss)
    with torch.inference_mode():
        torch.testing.assert_close(call(*batch), eager.loss)
    assert_same(train(model, call, batch), eager)
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(call(*batch), eager.loss)
    with torch.no_grad():
        assert not call(*batch).requires_grad
    model.train()
    assert_same(train(model, call, batch), eager)


def test_inference_is_chunked_too() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    with torch.no_grad(), counting_loops() as loops:
        ours = compile_mst(model)(*batch)
    torch.testing.assert_close(ours, model(*batch))
    assert loops
    (graph,) = mstc.last_report().graphs
    assert graph.kind == "inference"


def test_dropout_outside_a_region_is_off_in_evaluation() -> None:
    class Model(TinyLM):
        def hidden(self, ids: Tensor) -> Tensor:
            return F.dropout(super().hidden(ids), 0.5, self.training)

    model, batch = Model().eval(), lm_batch(2, 37)
    call = compile_mst(model)
    torch.testing.assert_close(call(*batch), model(*batch))
    model.train()
    torch.manual_seed(3)
    first = train(model, call, batch)
    torch.manual_seed(3)
    assert_same(train(model, call, batch), first, tolerance=0)
    assert not torch.equal(train(model, call, batch).loss, first.loss)


def test_dropout_between_the_layers_of_an_mlp_uses_one_mask_for_both_directions() -> None:
    """With weights of one, a gradient tells the mask that the backward used."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.dropout(torch.tanh(self.up(x)), 0.5)).sum()

    model = Model()
    x = torch.randn(50, 16, requires_grad=True)
    call = compile_mst(model)
    torch.manual_seed(3)
    loss = call(x)
    loss.backward()
    # the output is linear in down.weight, so the gradient's product with it is the output
    product = (model.down.weight.grad * model.down.weight).sum()
    torch.testing.assert_close(product, loss, rtol=1e-4, atol=1e-4)


def test_two_models_in_one_process() -> None:
    models = [TinyLM(), TinyLM(vocab=80, hidden=24), TinyLM()]
    calls = [compile_mst(m) for m in models]
    for _ in range(2):
        for model, call in zip(models, calls, strict=True):
            vocab = model.head.out_features
            batch = lm_batch(2, 37, vocab=vocab)
            assert_same(train(model, call, batch), train(model, model, batch))


def test_two_wrappers_of_one_model() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    eager = train(model, model, batch)
    for rows in (8, 21):
        assert_same(train(model, compile_mst(model, chunk_rows=rows), batch), eager)
        (graph,) = mstc.last_report().graphs
        assert {loop.chunk for loop in graph.loops} == {rows // 2}


def test_model_compile_in_place() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    eager = train(model, model, batch)
    model.compile(backend="mst", options={"lowering": "eager", "min_peak_bytes": 0})
    assert_same(train(model, model, batch), eager)


def test_function_with_the_step_inside() -> None:
    """Losses outside of a module, as a plain function."""
    weight = torch.randn(96, 16, requires_grad=True)

    def loss_fn(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight.t(), labels)

    x = torch.randn(70, 16, requires_grad=True)
    labels = tokens(70)
    eager = torch.autograd.grad(loss_fn(x, labels), (x, weight))
    ours = torch.autograd.grad(compile_mst(loss_fn)(x, labels), (x, weight))
    for left, right in zip(ours, eager, strict=True):
        torch.testing.assert_close(left, right)
    assert has_loops([mstc.last_report()])


# -- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gradient_in_forward", "rows"), [(True, 8), (False, 8), (True, 64)])
def test_bf16_weights(gradient_in_forward: bool, rows: int) -> None:
    three_way(
        TinyLM(bias=True),
        lm_batch(4, 64, ignored=9),
        dtype=torch.bfloat16,
        options={"gradient_in_forward": gradient_in_forward, "chunk_rows": rows},
        slack=2e-3,
    )


def test_bf16_loss_in_float32() -> None:
    class Model(TinyLM):
        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            logits = self.head(self.hidden(ids)).flatten(0, 1)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return F.cross_entropy(logits, labels.flatten(), reduction="sum") / labels.numel()

    three_way(Model(bias=True, tied=True), lm_batch(4, 64), dtype=torch.bfloat16, slack=2e-3)


def test_autocast() -> None:
    three_way(TinyLM(bias=True), lm_batch(4, 64), autocast=True, slack=2e-3)


def test_float64() -> None:
    model, batch = TinyLM().double(), lm_batch(2, 37)
    ours = train(model, compile_mst(model), batch)
    assert_same(ours, train(model, model, batch), tolerance=1e-13)


def test_float16_loss_scaling() -> None:
    three_way(
        TinyLM(bias=True),
        lm_batch(4, 64),
        dtype=torch.float16,
        backward=lambda loss: (loss * 1024).backward(),
        slack=2e-3,
    )


# -- what we know nothing about -----------------------------------------------------------------


def test_nothing_to_chunk_leaves_the_graph_alone() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Tanh(), nn.LayerNorm(16), nn.Sigmoid())
    x = torch.randn(32, 16)

    def loss(run: nn.Module) -> Any:
        return lambda: run(x).sum()

    eager = train(model, loss(model))
    with counting_loops() as loops:
        ours = train(model, loss(compile_mst(model)))
    assert_same(ours, eager)
    assert not loops
    (graph,) = mstc.last_report().graphs
    assert graph.untouched
    assert graph.peak_before == graph.peak_after


def test_small_graphs_are_left_alone_by_default() -> None:
    model, batch = TinyLM(), lm_batch(2, 37)
    call = torch.compile(model, backend="mst", options={"lowering": "eager"})
    with counting_loops() as loops:
        assert_same(train(model, call, batch), train(model, model, batch))
    assert not loops


@torch.library.custom_op("mstc_tests::squash", mutates_args=())
def squash(x: Tensor) -> Tensor:
    return torch.tanh(x) / x.shape[0]


@squash.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _squash_setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _squash_backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return grad * (1 - torch.tanh(x).square()) / x.shape[0]


squash.register_autograd(_squash_backward, setup_context=_squash_setup)


class WithSquash(nn.Module):
    """A custom op at one place of an MLP; it depends on the number of rows, so slices differ."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.mlp, self.place = MLP(), place

    def forward(self, x: Tensor) -> Tensor:
        x = squash(x) if self.place == "before" else x
        wide = F.gelu(self.mlp.up(x))
        wide = squash(wide) if self.place == "inside" else wide
        y = self.mlp.down(wide)
        return squash(y) if self.place == "after" else y


@pytest.mark.parametrize("place", ["before", "inside", "after"])
def test_custom_op(place: str) -> None:
    x = torch.randn(50, 16, requires_grad=True)
    three_way(Scalar(WithSquash(place)), (x,), chunked=place != "inside")
    if place == "inside":
        (graph,) = mstc.last_report().graphs
        assert any("squash" in str(r) and "no rule" in str(r) for r in graph.refusals)


class Clip(torch.autograd.Function):
    """A backward that is not linear in the gradient: it must not be made for a gradient of one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-1e-3, 1e-3)


@FUNCTION
def test_custom_autograd_function_in_an_mlp() -> None:
    class Model(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(Clip.apply(F.gelu(self.up(x))))

    three_way(Scalar(Model()), (torch.randn(50, 16, requires_grad=True),))


@FUNCTION
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_custom_autograd_function_before_a_loss(scale: float) -> None:
    class Model(TinyLM):
        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            logits = Clip.apply(self.head(self.hidden(ids)).flatten(0, 1))
            return F.cross_entropy(logits, labels.flatten())

    three_way(Model(), lm_batch(2, 37), backward=lambda loss: (loss * scale).backward())


@FUNCTION
def test_sign_of_the_gradient() -> None:
    """As used for quantised training; even a factor of two tells a gradient made too early."""

    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return torch.sign(grad)

    class Model(TinyLM):
        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            logits = Sign.apply(self.head(self.hidden(ids)).flatten(0, 1))
            return F.cross_entropy(logits, labels.flatten())

    three_way(Model(), lm_batch(2, 37), backward=lambda loss: (loss * 2).backward())


def test_normalisation_over_tokens_inside_an_mlp() -> None:
    class Model(MLP):
        def forward(self, x: Tensor) -> Tensor:
            wide = self.up(x)
            return self.down(torch.relu(wide - wide.mean(0)) / (1 + wide.amax(0).abs()))

    three_way(Scalar(Model()), (torch.randn(50, 16, requires_grad=True),), chunked=False)


@pytest.mark.parametrize(
    "mix",
    [
        lambda w: w.cumsum(0),
        lambda w: w.softmax(0),
        lambda w: w.flip(0),
        lambda w: w.roll(1, 0),
        lambda w: w.sort(0).values,
        lambda w: w - F.pad(w, (0, 0, 1, 0))[:-1],
        lambda w: w[torch.arange(w.shape[0] - 1, -1, -1)],
        lambda w: torch.cat([w[25:], w[:25]]),
        lambda w: w.view(2, 25, 64).transpose(0, 1).reshape(50, 64),
        lambda w: w.t().reshape(50, 64),
        lambda w: w * torch.arange(50, dtype=w.dtype)[:, None],
        lambda w: w * torch.eye(50, 64, dtype=w.dtype),
        lambda w: torch.tril(w),
    ],
    ids=[
        "cumsum",
        "softmax",
        "flip",
        "roll",
        "sort",
        "shift",
        "index",
        "cat",
        "regroup",
        "transpose",
        "arange",
        "eye",
        "tril",
    ],
)
def test_ops_that_mix_tokens_inside_an_mlp(mix: Any) -> None:
    class Model(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.tanh(mix(torch.tanh(self.up(x)))))

    model = Scalar(Model())
    x = torch.randn(50, 16, requires_grad=True)
    eager = train(model, model, (x,))
    assert_same(train(model, compile_mst(model), (x,)), eager, tolerance=1e-4)
    assert_no_fallback([mstc.last_report()])


def test_mixture_of_experts_by_masks() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(16, 3)
            self.experts = nn.ModuleList(MLP() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            weights = self.gate(x).softmax(-1)
            outputs = torch.stack([e(x) for e in self.experts], -1)
            return (outputs * weights.unsqueeze(-2)).sum(-1)

    three_way(Scalar(Model()), (torch.randn(2, 31, 16, requires_grad=True),))


def test_batched_experts() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 16, 64) / 4)
            self.down = nn.Parameter(torch.randn(3, 64, 16) / 8)

        def forward(self, x: Tensor) -> Tensor:
            wide = torch.relu(torch.einsum("nh,ehf->enf", x, self.up))
            return torch.einsum("enf,efh->nh", wide, self.down)

    three_way(Scalar(Model()), (torch.randn(61, 16, requires_grad=True),))


def test_attention_is_untouched_and_right() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.mlp = MLP()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return x + self.mlp(x)

    three_way(Scalar(Model()), (torch.randn(2, 37, 16, requires_grad=True),))


def test_manual_attention() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(2, 41, 3, 2, 8).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-1, -2)) / 8**0.5
            mask = torch.ones(41, 41, dtype=torch.bool).tril()
            scores = scores.masked_fill(~mask, float("-inf"))
            return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 41, 16))

    model = Scalar(Model())
    x = torch.randn(2, 41, 16, requires_grad=True)
    eager = train(model, model, (x,))
    assert_same(train(model, compile_mst(model), (x,)), eager)
    assert_no_fallback([mstc.last_report()])


def test_checkpointed_layers() -> None:
    from torch.utils.checkpoint import checkpoint

    class Model(TinyLM):
        def hidden(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for layer in self.layers:
                x = x + checkpoint(layer, self.norm(x), use_reentrant=False)
            return x

    three_way(Model(layers=2), lm_batch(2, 37))


def test_convolution_and_pooling() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 32, 3, padding=1)
            self.head = nn.Linear(32, 96)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            y = F.max_pool1d(F.relu(self.conv(x)), 2).transpose(1, 2)
            return F.cross_entropy(self.head(y).flatten(0, 1), labels.flatten())

    three_way(Model(), (torch.randn(2, 8, 300, requires_grad=True), tokens(2, 150)))


@NON_LEAF
def test_graph_break_between_head_and_loss() -> None:
    class Model(TinyLM):
        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            logits = self.head(self.hidden(ids))
            torch._dynamo.graph_break()
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    model, batch = Model(), lm_batch(2, 37)
    eager = train(model, model, batch)
    assert_same(train(model, compile_mst(model), batch), eager)


def test_outputs_that_are_not_read() -> None:
    """Logits beside the loss: deferred, equal to eager's, and their own gradient is right."""

    class Model(TinyLM):
        def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.head(self.hidden(ids))
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    model, batch = Model(), lm_batch(2, 37)
    call = compile_mst(model)
    eager_loss, eager_logits = model(*batch)
    loss, logits = call(*batch)
    assert mstc.last_report().deferred
    torch.testing.assert_close(loss, eager_loss)
    torch.testing.assert_close(logits + 0, eager_logits)

    def both(run: Any) -> Any:
        def step() -> Tensor:
            loss, logits = run(*batch)
            return loss + logits.square().mean()

        return step

    assert_same(train(model, both(call)), train(model, both(model)))


def test_dynamo_resets_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cudagraph_trees

    resets: list[None] = []
    monkeypatch.setattr(cudagraph_trees, "reset_cudagraph_trees", lambda: resets.append(None))
    compiled = torch.compile(lambda x: 2 * x, backend="mst")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    torch._dynamo.reset()
    assert resets
