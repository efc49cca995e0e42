"""How far a tool is: one line that is written over, on a terminal only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WIDTH = 100


@contextmanager
def progress_line() -> Iterator[Callable[[int, int, str], None]]:
    """A function of number, total and name; the line is gone afterwards."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return

    def show(number: int, total: int, name: str) -> None:
        print(f"\r{f'{number + 1}/{total} {name}'[:WIDTH]:<{WIDTH}}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print(f"\r{'':<{WIDTH}}\r", end="", file=sys.stderr, flush=True)
