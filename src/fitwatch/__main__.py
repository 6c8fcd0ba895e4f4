"""``python -m fitwatch``."""

import sys

from fitwatch.cli import main

if __name__ == "__main__":  # some tools import every module
    sys.exit(main())
