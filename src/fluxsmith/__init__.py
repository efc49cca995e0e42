"""fluxsmith trains and runs FLUX.1 models.

The names below are the public face; each is imported when it is first used, so `import fluxsmith` is fast and without torch.
Training from Python: `from fluxsmith.train.run import train` (the name `fluxsmith.train` is the folder).
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
    from fluxsmith.events import Bus
    from fluxsmith.generate.pipeline import Pipeline
    from fluxsmith.generate.request import Picture, Request

__version__ = "0.1.0.dev0"
__all__ = [
    "Bus",
    "ConfigError",
    "DataError",
    "FluxsmithError",
    "LoadedConfig",
    "ModelFileError",
    "NumericError",
    "OutOfMemoryError",
    "Picture",
    "Pipeline",
    "Problem",
    "Request",
    "RunConfig",
    "RunLockedError",
    "StopRequested",
    "StorageError",
    "load_config",
]
_HOMES = {  # the others: errors
    "Bus": "events",
    "LoadedConfig": "config.load",
    "Picture": "generate.request",
    "Pipeline": "generate.pipeline",
    "Request": "generate.request",
    "RunConfig": "config.schema",
    "load_config": "config.load",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fluxsmith' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fluxsmith.{_HOMES.get(name, 'errors')}"), name)
