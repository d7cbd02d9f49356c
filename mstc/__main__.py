"""``python -m mstc`` is the command ``mstc``."""

from mstc.cli import main

if __name__ == "__main__":
    main()
