"""The command ``mstc``: what the backend would do to a model, without running it."""

import sys


def main() -> None:
    """``mstc ...``; ends the process."""
    try:
        from mstc.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"mstc: the command needs {error.name}: pip install 'mstc[cli]'")
    sys.exit(run(sys.argv[1:]))
