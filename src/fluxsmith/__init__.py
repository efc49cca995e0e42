"""fluxsmith trains and runs FLUX.1 models.

The names below are the public face; each is imported when it is first used, so `import fluxsmith` is fast and without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxsmith.config.load import LoadedConfig, load_config
    from fluxsmith.config.schema import RunConfig
    from fluxsmith.errors import (
        ConfigError,
        DataError,
        FluxsmithError,
        ModelFileError,
        NumericError,
        OutOfMemoryError,
        Problem,
        RunLockedError,
        StopRequested,
        StorageError,
    )

__version__ = "0.1.0.dev0"
__all__ = [
    "ConfigError",
    "DataError",
    "FluxsmithError",
    "LoadedConfig",
    "ModelFileError",
    "NumericError",
    "OutOfMemoryError",
    "Problem",
    "RunConfig",
    "RunLockedError",
    "StopRequested",
    "StorageError",
    "load_config",
]
_HOMES = {"LoadedConfig": "config.load", "RunConfig": "config.schema", "load_config": "config.load"}  # the others: errors


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fluxsmith' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fluxsmith.{_HOMES.get(name, 'errors')}"), name)
