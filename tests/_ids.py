"""Names of parametrized tests."""

import re


def plain(value):
    """A value as text without the address of an object, so that every process gives a test the same name."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
