"""Results of a benchmark in one JSON file, which an interrupted run leaves whole.

A file is a header (what a figure depends on beside the code) and `records` by key.
"""

import json
from pathlib import Path
from typing import Any

from mstc.whole import whole_file


def load(path: Path, header: dict[str, Any], force: bool = False) -> dict[str, Any]:
    """Earlier records, if they were made under the same header; its date may differ. A note that
    somebody wrote beside them stays.

    Raises:
        SystemExit: another header, and not `force`, with which the records are dropped.
    """
    if not path.exists():
        return header | {"records": {}}
    earlier = json.loads(path.read_text())
    changed = [key for key in header if key != "date" and earlier.get(key) != header[key]]
    if not changed:
        return earlier | header
    if force:
        return header | {"records": {}}
    raise SystemExit(f"{path} was measured with other {', '.join(changed)}: --force or --out")


def save(path: Path, results: dict[str, Any]) -> None:
    """Replace the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")
