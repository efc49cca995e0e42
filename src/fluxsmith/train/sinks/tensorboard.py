"""Loss, learning rate, validation and samples for TensorBoard: `sinks = [{ type = "tensorboard" }]`."""

from pathlib import Path

import numpy as np
from PIL import Image

from fluxsmith.config.schema import RunConfig
from fluxsmith.config.section import PluginConfig
from fluxsmith.errors import ConfigError
from fluxsmith.events import Event, RunEnded, RunFailed, RunStarted, SampleReady, StepEnded, ValidationEnded


class Config(PluginConfig):
    """Writes event files into `dir`."""

    dir: str = ""
    """Folder of the event files; by default `tensorboard/` in the run folder."""

    def build(self, run: RunConfig) -> "TensorBoardSink":
        """The sink; raises ConfigError if tensorboard is not installed."""
        return TensorBoardSink(self.dir or str(run.run.dir / "tensorboard"))


class TensorBoardSink:
    """Scalars and pictures by step. The file is opened when the run starts, so a resumed run hides the steps it computes again."""

    name = "tensorboard"

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("the tensorboard sink needs tensorboard", fix="pip install 'fluxsmith[tensorboard]'") from None
        self.folder = folder
        self.open = SummaryWriter
        self.writer: SummaryWriter | None = None

    def __call__(self, event: Event) -> None:
        """Write one event."""
        if isinstance(event, RunStarted):
            self.writer = self.open(self.folder, purge_step=event.start_step + 1 if event.start_step else None)
        if self.writer is None:
            return
        if isinstance(event, StepEnded):
            for name, value in {"loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm}.items():
                self.writer.add_scalar(f"train/{name}", value, event.step)
        elif isinstance(event, ValidationEnded):
            self.writer.add_scalar("validation/loss", event.loss, event.step)
        elif isinstance(event, SampleReady):
            with Image.open(event.path) as image:
                picture = np.asarray(image.convert("RGB"))
            tag = Path(event.path).stem.partition("_")[2] or str(event.index)  # prompt and seed, the same at every step
            self.writer.add_image(f"sample/{tag}", picture, event.step, dataformats="HWC")
        elif isinstance(event, RunEnded | RunFailed):
            self.writer.close()
