"""The transformer stays as it is, only text encoders are quantised. `quant = { type = "none", text_encoders = "int8" }`."""

import torch

from fluxsmith.config.quant import QuantConfig


class Config(QuantConfig):
    """No quantised transformer: for text encoders of a kind of their own."""

    def require(self, device: torch.device) -> str:
        """What will be done there, in words."""
        return f"text encoders in {self.text_encoders}" if isinstance(self.text_encoders, str) else "only text encoders in few bits"
