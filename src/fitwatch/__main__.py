"""``python -m fitwatch``."""

import sys

from fitwatch.cli import main

sys.exit(main())
