"""Text for a terminal."""

import re
from typing import TextIO


def with_links(text: str, stream: TextIO) -> str:
    """Hide the long addresses in a text behind short links (OSC 8), if the stream is a terminal that may show them."""
    if not stream.isatty():
        return text
    return re.sub(r"https?://(\S+)", lambda found: _link(found.group(), found.group(1).split("?")[0]), text)


def _link(address: str, shown: str) -> str:
    return f"\x1b]8;;{address}\x1b\\{shown}\x1b]8;;\x1b\\"
