"""What a ControlNet is shown: the condition picture as pixels or latents, and for inpainting the mask as one channel more.

Also what can be said about it before weights are read, from the header of the network's file.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fluxsmith.controls.base import Scene
from fluxsmith.controls.controlnet_model import ControlNet
from fluxsmith.controls.pictures import cover, opened, shapes_differ, unreadable
from fluxsmith.controls.pictures import pixels as to_pixels
from fluxsmith.controls.processors import is_learned, processed, processor_problems
from fluxsmith.errors import ModelFileError, Problem
from fluxsmith.io.identify import Identity, identify, require_role
from fluxsmith.io.sources import resolve

if TYPE_CHECKING:
    from fluxsmith.controls.controlnet import Config

PATCH = 4  # latent cells in a token
PLAIN_FEATURES, MASKED_FEATURES = 16 * PATCH, 17 * PATCH


def condition_of(config: "Config", net: ControlNet, scene: Scene) -> Tensor:
    """Latents (1, 16 or 17, h, w) or pixels (1, 3, H, W), as the network's layout wants."""
    image = cover(opened(config.image), scene.width, scene.height)
    if is_learned(config.processor):
        scene.work()  # the annotator is on the device alone
    image = processed(config.processor, image, thresholds=config.thresholds, weights=config.annotators, device=scene.device)
    if net.control.layout == "pixels":
        return to_pixels(image).to(scene.device)
    if net.control.condition_channels != MASKED_FEATURES:
        return scene.encode(to_pixels(image))
    mask = shaped(opened(config.mask), scene.width, scene.height)
    latents = scene.encode(to_pixels(without(image, mask)))
    return torch.cat((latents, kept(mask, latents.shape[-2], latents.shape[-1]).to(latents)), dim=1)


def shaped(mask: Image.Image, width: int, height: int) -> Image.Image:
    """Cropped at its centre to a shape, in its own size."""
    wide, high = mask.size
    size = (min(wide, max(1, round(high * width / height))), min(high, max(1, round(wide * height / width))))
    left, top = (wide - size[0]) // 2, (high - size[1]) // 2
    return mask.crop((left, top, left + size[0], top + size[1]))


def without(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture, black where the mask (scaled to it) is more white than black."""
    holes = to_pixels(mask.resize(image.size)).mean(dim=1)[0] > 0
    return Image.composite(Image.new("RGB", image.size), image, Image.fromarray(holes.numpy()))


def kept(mask: Image.Image, height: int, width: int) -> Tensor:
    """(1, 1, height, width): 1 where the picture is kept, 0 where it is drawn anew; grey stays between."""
    brightness = to_pixels(mask).add(1).div(2).mean(dim=1, keepdim=True)
    return 1 - F.interpolate(brightness, size=(height, width))


def network_problems(config: "Config") -> Iterator[Problem]:
    """What is wrong with the file."""
    try:
        if config.path:
            require_role(resolve(config.path, "controlnet"), "controlnet")
    except ModelFileError as error:
        yield from error.problems


def picture_problems(config: "Config") -> Iterator[Problem]:
    """What is missing of picture, mask and mode."""
    name = f"control {config.name or config.type}"
    if config.image is None:
        yield Problem(f"{name} has no condition picture", fix="give it an image")
    found = [*unreadable((config.image, config.mask))]
    yield from found
    if config.start > config.end:
        yield Problem(f"{name} starts at {config.start} and ends at {config.end}", fix="start before the end, such as 0 and 0.6")
    yield from processor_problems(config.processor)
    identity = _known(config)
    if identity is None:
        return
    yield from _mask_problems(config, name, identity)
    yield from _mode_problems(config, name, int(identity.sizes.get("modes") or 0))
    if not found and config.image is not None and config.mask is not None:
        yield from shapes_differ("mask", config.mask, "image", config.image)


def _known(config: "Config") -> Identity | None:
    """What the header of its file tells; None for a new network, and for a file of which `network_problems` tells."""
    if not config.path:
        return None
    try:
        return identify(resolve(config.path, "controlnet"))
    except ModelFileError:
        return None


def _mask_problems(config: "Config", name: str, identity: Identity) -> Iterator[Problem]:
    takes_mask = identity.sizes.get("condition_channels") == MASKED_FEATURES
    if takes_mask and config.mask is None:
        yield Problem(f"{name} is an inpainting network and has no mask", fix="give it a mask, white where the image is drawn anew")
    if not takes_mask and config.mask is not None:
        yield Problem(
            f"{name} takes no mask", why="it is not an inpainting network", fix="leave the mask out, or use an inpainting network"
        )


def _mode_problems(config: "Config", name: str, modes: int) -> Iterator[Problem]:
    mode = config.mode_number()
    if not modes:
        if config.mode is not None:
            yield Problem(f"{name} has no modes", why="it is not a union network", fix="leave mode out")
    elif mode is None:
        yield Problem(f"{name} is a union network and has no mode", fix='set mode = "canny", tile, depth, blur, pose, gray or low_quality')
    elif mode >= modes:
        yield Problem(f"{name} has modes 0 to {modes - 1}", why=f"mode is {mode}", fix="set one of these")
