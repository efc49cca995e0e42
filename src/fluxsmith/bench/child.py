"""The process that measures one scenario: `python -m fluxsmith.bench.child ORDER.json ANSWER.json`.

Whatever happens to it, the session goes on. An answer is `{"row": ...}`, `{"skipped": why}` or `{"failed": why}`.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from fluxsmith.bench.job import Order, measure
from fluxsmith.errors import ConfigError, FluxsmithError


def answer(order: Order) -> dict[str, Any]:
    """Measure; say what was in the way instead of raising."""
    try:
        return {"row": measure(order)}
    except ConfigError as error:
        return {"skipped": "; ".join(map(str, error.problems))}
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory: {str(error).splitlines()[0]}"}
    except FluxsmithError as error:
        return {"failed": "; ".join(map(str, error.problems))}
    except Exception as error:  # noqa: BLE001  one scenario must not end the others
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"failed": f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"}


def main(words: list[str]) -> None:
    """Command line of the process."""
    order = Order(**json.loads(Path(words[0]).read_text(encoding="utf-8")))
    Path(words[1]).write_text(json.dumps(answer(order)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
