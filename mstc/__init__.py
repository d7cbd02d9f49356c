"""One line, a fraction of the memory: ``torch.compile(model, backend="mst")``.

Public names: `mst_backend`, `Options`, `explain`, `last_report`, `Report`, `OptionError`,
`DeferredOutputError`, `measure_peak`, `simulate_step`.
"""

from __future__ import annotations

from pathlib import Path

import passes

_expected = Path(__file__).resolve().parent.parent / "passes"
if passes.__file__ is None or Path(passes.__file__).resolve().parent != _expected:
    raise ImportError(
        f"mstc needs its own package `passes` ({_expected}), but `import passes` found "
        f"{passes.__file__}, which hides it. "
        "Rename that module, or take its folder off sys.path."
    )

from torch._dynamo import list_backends, register_backend  # noqa: E402  (the check above comes first)

from mstc.backend import mst_backend  # noqa: E402
from mstc.errors import DeferredOutputError, OptionError  # noqa: E402
from mstc.explain import explain  # noqa: E402
from mstc.history import last_report  # noqa: E402
from mstc.options import Options  # noqa: E402
from mstc.report import Report  # noqa: E402
from mstc.runtime.memory import measure_peak  # noqa: E402
from mstc.simulate import simulate_step  # noqa: E402
from mstc.version import VERSION  # noqa: E402

__all__ = [
    "DeferredOutputError",
    "OptionError",
    "Options",
    "Report",
    "explain",
    "last_report",
    "measure_peak",
    "mst_backend",
    "simulate_step",
]
__version__ = VERSION

if "mst" not in list_backends(exclude_tags=()):
    register_backend(mst_backend, name="mst")
