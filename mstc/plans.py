"""Plans as files: what was decided for a model, to be made again, and to be compared.

A plan is the loops of a report: of which op and line of the user's code, in which mode, with which
chunk. ``Report.save_plan("plan.json")`` writes one, ``options={"plan": "plan.json"}`` replays it: a
newer planner, another device or an unlucky estimate then change nothing. Chunks are in positions
of the loop axis, so a plan serves other lengths, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from mstc.errors import OptionError
from mstc.version import VERSION
from mstc.whole import whole_file
from passes.records import FixedLoop, Mode

_FIELDS = set(FixedLoop.__dataclass_fields__)


def write_plan(loops: Iterable[FixedLoop], path: str | Path) -> None:
    """Write a plan in one step.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    entry = {"mstc": VERSION, "loops": [asdict(loop) for loop in loops]}
    with whole_file(path) as partial:
        partial.write_text(json.dumps(entry, indent=1) + "\n")


def read_plan(path: str | Path) -> tuple[FixedLoop, ...]:
    """Read a plan.

    Raises:
        OptionError: there is no such file, it is no plan, or another version of mstc made it.
    """
    try:
        entry: Any = json.loads(Path(path).read_text())
    except OSError as error:
        raise OptionError(f"plan {path}: {error.strerror}.") from None
    except ValueError:
        raise OptionError(f"plan {path}: it is no JSON.") from None
    if not isinstance(entry, Mapping) or not isinstance(entry.get("loops"), list):
        raise OptionError(f"plan {path}: it is no plan (Report.save_plan writes one).")
    if entry.get("mstc") != VERSION:
        raise OptionError(
            f"plan {path}: mstc {entry.get('mstc')} made it, and this is {VERSION}. Make it anew."
        )
    return loops_of(entry["loops"], str(path))


def loops_of(entries: Sequence[Any], path: str) -> tuple[FixedLoop, ...]:
    """The loops that a plan lists.

    Raises:
        OptionError: a field is missing, or has no possible value.
    """
    found: list[FixedLoop] = []
    for number, entry in enumerate(entries):
        if not _is_loop(entry):
            raise OptionError(f"plan {path}: loop {number} is not one: {entry!r}.")
        found.append(FixedLoop(**entry))
    return tuple(found)


def _is_loop(entry: Any) -> bool:
    return (
        isinstance(entry, Mapping)
        and {*entry, "along_weights"} == _FIELDS
        and all(isinstance(entry[name], str) for name in ("seed", "source"))
        and all(isinstance(entry[n], int) and entry[n] >= 1 for n in ("axis_length", "chunk"))
        and isinstance(entry.get("along_weights", False), bool)
        and entry["mode"] in get_args(Mode)
    )


@dataclass(frozen=True)
class Change:
    """What two plans do not have in common."""

    loop: str  # "op at file:line"
    before: str  # "" if the first plan has no such loop
    after: str  # "" if the second has none


def differences(before: Sequence[FixedLoop], after: Sequence[FixedLoop]) -> list[Change]:
    """What changed from one plan to another, in the order of the first."""
    old, new = _by_subject(before), _by_subject(after)
    keys = dict.fromkeys([*old, *new])
    found = (Change(str(key), old.get(key, ""), new.get(key, "")) for key in keys)
    return [change for change in found if change.before != change.after]


def _by_subject(loops: Sequence[FixedLoop]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for loop in loops:
        where = " of the weights" * loop.along_weights
        text = f"{loop.mode}, {loop.axis_length}{where} in chunks of {loop.chunk}"
        found.setdefault(str(loop), []).append(text)
    return {subject: "; ".join(sorted(texts)) for subject, texts in found.items()}
