"""`fluxsmith version`: what a bug report needs."""

import json
import platform
import sys
from importlib import metadata

import fluxsmith
from fluxsmith.cli.arguments import AsJson

LIBRARIES = ("torch", "numpy", "safetensors", "transformers", "accelerate", "pydantic", "pillow")


def command(as_json: AsJson = False) -> None:
    """Print the versions of fluxsmith, Python and the libraries."""
    versions = {"fluxsmith": fluxsmith.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if as_json:
        json.dump(versions, sys.stdout, indent=1)
        print()
        return
    for name, version in versions.items():
        print(f"{name:<12}  {version}")
