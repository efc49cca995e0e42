"""Fills the caches of a request, as a training does before its first step."""

import torch

from fluxsmith.data.dataset import prepare
from fluxsmith.data.types import Encoders
from fluxsmith.dialects.sd_scripts.cache_tool import LATENTS, CacheRequest
from fluxsmith.events import Bus
from fluxsmith.models.files import locate
from fluxsmith.models.loading import LazyModels


def fill_caches(request: CacheRequest, bus: Bus) -> int:
    """Encode what is not there yet; returns the number of pictures. Raises DataError, ModelFileError."""
    config = request.config
    lazy = LazyModels(locate(config.model), config.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if request.kind == LATENTS:
        lazy.files.check(["ae"])
        encoders = Encoders(lazy.encode_pixels, lazy.latents_digest(), None, "")
    else:
        lazy.files.check(lazy.facts.text_roles)
        encoders = Encoders(None, "", lazy.encode_text, lazy.text_digest(), lazy.token_counts)
    data = prepare(config.data, cache=config.cache, seed=config.train.seed, encoders=encoders, bus=bus, run_dir=config.run.dir)
    return sum(len(one.items) for one in data.sets)
