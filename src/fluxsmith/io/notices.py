"""What is said aloud where there is no run to report to: a download, a conversion. One line each on the error stream.

`say("ip-adapter.bin is converted once")`; callers that have somewhere better to report to pass their own function.
"""

import sys
from collections.abc import Callable

Say = Callable[[str], None]


def say(text: str) -> None:
    """One line on stderr, so that results on stdout stay clean."""
    sys.stderr.write(f"fluxsmith: {text}\n")
