"""One class per user mistake, and per thing that a user should hear of."""

from __future__ import annotations


class OptionError(ValueError):
    """``options=`` or ``mode=`` of ``torch.compile`` has an unknown key, a wrong type or an
    impossible value."""


class BudgetError(RuntimeError):
    """``options["memory_budget"]`` is less than a graph takes at least."""


class BudgetWarning(UserWarning):
    """As `BudgetError`, where ``options["over_budget"]`` is "warn"."""


class DeferredOutputError(RuntimeError):
    """A deferred output was read, or a gradient asked for that would be made by a second run, after
    what it is made from had changed in place."""


class SimulationError(RuntimeError):
    """A step cannot be simulated: it depends on values, or there is no loss."""


class BodyCompilationWarning(UserWarning):
    """Inductor could not compile a loop's body, which runs op by op instead."""


class FallbackWarning(UserWarning):
    """A graph could not be rewritten and was compiled as `torch.compile` would without this
    backend."""
