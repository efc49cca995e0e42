"""Loss, learning rate, validation and samples for TensorBoard: `sinks = [{ type = "tensorboard" }]`."""

import numpy as np
from PIL import Image

from fluxsmith.config.schema import RunConfig
from fluxsmith.config.section import PluginConfig
from fluxsmith.errors import ConfigError
from fluxsmith.events import Event, RunEnded, SampleReady, StepEnded, ValidationEnded


class Config(PluginConfig):
    """Writes event files into `dir`."""

    dir: str = ""
    """Folder of the event files; by default `tensorboard/` in the run folder."""

    def build(self, run: RunConfig) -> "TensorBoardSink":
        """The sink; raises ConfigError if tensorboard is not installed."""
        return TensorBoardSink(self.dir or str(run.run.dir / "tensorboard"))


class TensorBoardSink:
    """Scalars and pictures by step."""

    name = "tensorboard"

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("the tensorboard sink needs tensorboard", fix="pip install 'fluxsmith[tensorboard]'") from None
        self.writer = SummaryWriter(folder)

    def __call__(self, event: Event) -> None:
        """Write one event."""
        if isinstance(event, StepEnded):
            for name, value in {"loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm}.items():
                self.writer.add_scalar(f"train/{name}", value, event.step)
        elif isinstance(event, ValidationEnded):
            self.writer.add_scalar("validation/loss", event.loss, event.step)
        elif isinstance(event, SampleReady):
            picture = np.asarray(Image.open(event.path).convert("RGB"))
            self.writer.add_image(f"sample/{event.index}", picture, event.step, dataformats="HWC")
        elif isinstance(event, RunEnded):
            self.writer.close()
