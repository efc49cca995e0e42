"""Options every dataset has, whatever its source; a source's `Config` in `data/sources/` adds where records come from."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from fluxsmith.config.section import PluginConfig, Section

Rate = Field(ge=0, le=1)
Interpolation = Literal["auto", "lanczos", "bicubic", "bilinear", "nearest", "area", "box"]


class CaptionConfig(Section):
    """How a caption file becomes the text of one step."""

    extensions: tuple[str, ...] = (".txt", ".caption")
    """Caption file endings, looked for in this order beside the picture."""
    missing: Literal["error", "skip", "allow"] = "error"
    """A picture without a caption file: stop, leave the picture out, or train it with `trigger` or an empty caption."""
    empty: Literal["error", "skip", "allow"] = "allow"
    """A caption file with no text in it."""
    first_line: bool = False
    """Other lines of a caption file are notes: no warning about them, and `wildcards` do not choose between lines."""
    encoding: str = "utf-8"
    """Text encoding; a byte order mark is always honoured."""
    trigger: str = ""
    """Put in place of `[trigger]` in captions; with `missing = "allow"` it is the caption of pictures that have none."""
    prefix: str = ""
    """Text put before every caption, with a space between."""
    suffix: str = ""
    """Text put after every caption, with a space between."""
    shuffle_affixes: bool = False
    """Count prefix and suffix to the tags: they are split, kept, shuffled and dropped with them; off: they stay where they are."""
    separator: str = ","
    """What separates tags."""
    secondary_separator: str = ""
    """Replaced by `separator` after shuffling, so that a group of tags stays together."""
    shuffle: bool = False
    """Shuffle tags anew for every use of a picture."""
    keep_tokens: NonNegativeInt = 0
    """The first tags that are neither shuffled nor dropped."""
    keep_separator: str = ""
    """What stands before this text is kept in place, a second one begins a fixed ending; `keep_tokens` is for captions without it."""
    wildcards: bool = False
    """Choose one line of a caption file of several lines, and one of `{a|b|c}`."""
    dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of uses trained with an empty caption."""
    dropout_every_epochs: NonNegativeInt = 0
    """Every N-th epoch is trained with empty captions; 0 is off."""
    tag_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of tags left out, beyond the kept ones."""
    warmup_min: PositiveInt = 1
    """Tags used at step 0 while tags are warmed up."""
    warmup_steps: float = Field(default=0.0, ge=0)
    """Steps until all tags are used; below 1 it is a share of the run; 0 is off."""


class BucketConfig(Section):
    """Which sizes pictures are brought to."""

    enabled: bool = True
    """Group pictures by aspect ratio; off: every picture is cropped to `resolution`."""
    min: PositiveInt = 256
    """Shortest side of a bucket, pixels (lowered to the resolution when that is smaller)."""
    max: PositiveInt = 2048
    """Longest side of a bucket, pixels."""
    step: PositiveInt = 64
    """Sides are multiples of this; 16 at least."""
    upscale: bool = True
    """Allow small pictures to be enlarged; off: their own size, rounded down to `step`, is the bucket."""


class DatasetConfig(PluginConfig):
    """What one dataset asks for; sources add their own keys."""

    name: str = ""
    """Name in reports; by default the folder's name."""
    group: str = ""
    """Datasets with the same group share their batches; they must agree in resolution, batch_size and buckets."""
    resolution: PositiveInt | tuple[PositiveInt, PositiveInt] = 1024
    """Area of a picture: one side of a square, or (width, height), pixels."""
    batch_size: PositiveInt = 1
    """Samples in a micro-batch; a batch never mixes sizes, and mixes datasets only within a `group`."""
    repeats: PositiveInt = 1
    """How often each picture is used in an epoch."""
    buckets: BucketConfig = BucketConfig()
    """Aspect ratio buckets."""
    captions: CaptionConfig = CaptionConfig()
    """Caption handling."""
    crop: Literal["center", "random"] = "center"
    """Which part is kept when a picture is larger than its bucket; random crops are drawn once a picture when latents are cached."""
    flip: bool = False
    """Mirror half of the uses (drawn per use), with their masks and condition pictures."""
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Strength of random brightness, contrast and saturation changes; needs `cache.latents = "off"`."""
    color_aug: bool = False
    """A third of the uses get a slight hue shift or gamma change, as in sd-scripts; needs `cache.latents = "off"`."""
    face_crop: tuple[float, float] | None = None
    """Crop around the face of the file name (`_cx_cy_w_h`): the shorter side is the face times a factor between these two; buckets off."""
    alpha_mask: bool = False
    """Use a picture's transparency as its loss mask (where `mask_dir` is not given); a picture without any is learned whole."""
    mask_dir: Path | None = None
    """Folder of loss masks with the pictures' names; white is learned, black is not (red channel). Every picture needs one."""
    condition_dir: Path | None = None
    """Folder of condition pictures with the pictures' names, for the training of a control model. Every picture needs one."""
    interpolation: Interpolation = "auto"
    """Resize filter; auto is area when both sides shrink, else Lanczos."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour under transparent pixels, 0..255."""
    max_pixels: PositiveInt = 64_000_000
    """Pictures with more pixels are refused before they are decoded."""
    regularisation: bool = False
    """These pictures keep what the model knows: they are balanced against the others and weighted by `weight`."""
    preserve: bool = False
    """Train these samples towards the base model's own prediction instead of the picture."""
    validation_share: float | None = Field(default=None, ge=0, le=1)
    """Share of these pictures that is held out; by default `validation.share`; 1 holds out all of them. Copies follow, in every dataset."""
    validation_seed: int | None = Field(default=None, ge=0)
    """Seed of the choice; by default `validation.seed`."""
    weight: float = Field(default=1.0, ge=0)
    """Factor on the loss of these samples."""
    max_skipped: float = Field(default=0.1, ge=0, le=1)
    """Largest share of pictures that may be left out because of problems before the run refuses to start."""
