"""What a user may ask for, and what he hears when he asks for something else."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import mstc
from mstc.backend import mst_backend
from mstc.errors import OptionError
from mstc.options import Options, parse_options
from tests.models import fresh_compiler  # noqa: F401  (an autouse fixture)

ROOT = Path(__file__).resolve().parents[2]


# -- what is known ------------------------------------------------------------------------------


def test_defaults() -> None:
    assert parse_options(None, None) == Options() == parse_options({}, "default")


def test_own_options() -> None:
    given = {
        "lowering": "eager",
        "chunk_rows": 7,
        "min_chunk_rows": None,
        "min_peak_bytes": 0,
        "min_region_bytes": 1,
        "gradient_in_forward": False,
        "defer_outputs": False,
        "min_deferred_bytes": 2,
    }
    options = parse_options(given, None)
    assert {name: getattr(options, name) for name in given} == given
    assert options.inductor == {}


def test_options_of_inductor_stand_beside_ours() -> None:
    options = parse_options({"chunk_rows": 7, "epilogue-fusion": True, "max_autotune": False}, None)
    assert options.chunk_rows == 7
    assert options.inductor == {"epilogue_fusion": True, "max_autotune": False}


def test_mode() -> None:
    options = parse_options(None, "max-autotune-no-cudagraphs")
    assert options.inductor == torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    assert options.inductor["max_autotune"] is True


def test_options_go_over_a_mode() -> None:
    options = parse_options({"max_autotune": False}, "max-autotune-no-cudagraphs")
    assert options.inductor["max_autotune"] is False


def test_bodies_record_no_graph_of_their_own() -> None:
    """Nor do they run the passes that a user gave for the whole graph."""

    def note(graph: torch.fx.Graph) -> None:
        pass

    options = parse_options({"joint_custom_post_pass": note}, "reduce-overhead")
    assert options.inductor["triton.cudagraphs"] is True
    assert options.inductor["joint_custom_post_pass"] is note
    assert options.body_config() == {"triton.cudagraphs": False}


def test_every_option_is_documented_with_its_unit() -> None:
    source = (ROOT / "mstc" / "options.py").read_text()
    for name in Options.__dataclass_fields__:
        assert re.search(rf'\n    {name}: [^\n]*\n    """[A-Z"]', source), name


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "mode", "words"),
    [
        ({"chunk_rwos": 3}, None, ["'chunk_rwos'", "Did you mean 'chunk_rows'", "min_peak_bytes"]),
        ({"epilogue_fusoin": True}, None, ["Did you mean 'epilogue_fusion'"]),
        ({"zzzzzz": True}, None, ["'zzzzzz'", "Known options: lowering, chunk_rows"]),
        ({3: 4}, None, ["unknown option 3", "Known options"]),
        ({"inductor": {}}, None, ["unknown option 'inductor'"]),
        ({"chunk_rows": "3"}, None, ['options["chunk_rows"]', "'3'", "int or None"]),
        ({"chunk_rows": True}, None, ['options["chunk_rows"]', "True", "int or None"]),
        ({"chunk_rows": 2.0}, None, ['options["chunk_rows"]', "int or None"]),
        ({"gradient_in_forward": 1}, None, ['options["gradient_in_forward"]', "bool"]),
        ({"lowering": None}, None, ['options["lowering"]', "str"]),
        ({"chunk_rows": 0}, None, ['options["chunk_rows"] is 0', "at least 1"]),
        ({"min_chunk_rows": -4}, None, ['options["min_chunk_rows"] is -4', "at least 1"]),
        ({"min_peak_bytes": -1}, None, ['options["min_peak_bytes"] is -1', "negative"]),
        ({"lowering": "triton"}, None, ["'triton'", '"inductor" or "eager"']),
        ({"max_autotune": "yes"}, None, ['options["max_autotune"]', "'yes'", "bool"]),
        ({"joint_custom_pre_pass": print}, None, ["joint_custom_pre_pass", "itself uses"]),
        ([("lowering", "eager")], None, ["must be a dict"]),
        (None, "fast", ["mode='fast'", "max-autotune-no-cudagraphs"]),
    ],
)
def test_refused(options: Any, mode: str | None, words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options(options, mode)
    for word in words:
        assert word in str(caught.value)


def test_a_user_sees_our_text_first() -> None:
    model = torch.compile(nn.Linear(4, 4), backend="mst", options={"chunk_rwos": 3})
    with pytest.raises(BackendCompilerFailed) as caught:
        model(torch.randn(2, 4))
    assert isinstance(caught.value.inner_exception, OptionError)
    first, second = str(caught.value).splitlines()[:2]
    assert "mst" in first
    assert second.startswith("OptionError: unknown option 'chunk_rwos' of backend=\"mst\". Did you")


def test_a_refused_call_can_be_repeated_with_other_options() -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    with pytest.raises(BackendCompilerFailed, match="at least 1"):
        torch.compile(model, backend="mst", options={"chunk_rows": 0})(x)
    ours = torch.compile(model, backend="mst", options={"lowering": "eager"})(x)
    torch.testing.assert_close(ours, model(x))


def test_options_cannot_be_changed_later() -> None:
    with pytest.raises(AttributeError):
        Options().chunk_rows = 3  # type: ignore[misc]


# -- a user's own graph pass --------------------------------------------------------------------


class CountNodes:
    """A graph pass as Inductor takes it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.calls += 1


def test_a_graph_pass_of_the_user_does_not_stop_ours() -> None:
    from tests.models import MLP, compile_mst, has_loops

    model, note = MLP(), CountNodes()
    x = torch.randn(50, 16)
    compile_mst(model, post_grad_custom_post_pass=note)(x).sum().backward()
    assert has_loops([mstc.last_report()])
    assert not mstc.last_report().notes


# -- the name -----------------------------------------------------------------------------------


def test_the_name_is_registered() -> None:
    assert "mst" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("mst") is mst_backend


def _resolve(path: str) -> Callable[..., Any]:
    module, name = path.split(":")
    return getattr(__import__(module, fromlist=[name]), name)


def test_the_name_is_an_entry_point() -> None:
    """So that an installed package needs no import: torch looks this group up."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group = project["entry-points"]["torch_dynamo_backends"]
    assert _resolve(group["mst"]) is mst_backend
    installed = [e for e in metadata.entry_points(group="torch_dynamo_backends") if e.name == "mst"]
    assert all(e.load() is mst_backend for e in installed)


def test_public_names() -> None:
    assert len(mstc.__all__) <= 10
    assert all(hasattr(mstc, name) for name in mstc.__all__)
    assert mstc.OptionError is OptionError
