"""fluxsmith's own folder. Environment: FLUXSMITH_HOME.

`home() / "models"` is where model files are looked for, `home() / "converted"` where conversions go that cannot lie beside their file.
"""

import os
from pathlib import Path


def home() -> Path:
    """FLUXSMITH_HOME, else `~/.fluxsmith`."""
    return Path(os.environ.get("FLUXSMITH_HOME") or Path.home() / ".fluxsmith")
