"""From the text of a caption file to the text of one step: a pure function of the text, the options and a keyed generator.

Order: whole-caption dropout; one line (wildcards) or the first line; `[trigger]`; `{a|b}`; tags kept, warmed up, shuffled,
dropped; prefix and suffix; secondary separator. Prefix and suffix are joined with one space around the finished tags and are no tags
themselves; with `shuffle_affixes` they join the text first, and are split, counted, shuffled and dropped with it (as sd-scripts).
"""

import math
import random
import re

from fluxsmith.config.dataset import CaptionConfig

TRIGGER = "[trigger]"
_CHOICE = re.compile(r"\{([^{}]*)\}")
_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use stand-ins for the escaped braces {{ and }}


def render(caption: str, config: CaptionConfig, *, rng: random.Random, epoch: int, step: int, total_steps: int) -> str:
    """The caption as trained.

    Args:
        caption: text of the caption file, lines separated by newlines.
        config: the dataset's caption options.
        rng: keyed by the use (`python_random(seed, "caption", use.number)`), so workers and restarts do not matter.
        epoch: counted from 0; `dropout_every_epochs = 3` drops in the 3rd, 6th ... epoch.
        step: optimizer step, counted from 0 (tag warm-up).
        total_steps: length of the run, for a warm-up given as a share.
    """
    dropped = rng.random() < config.dropout
    every = config.dropout_every_epochs
    if dropped or (every and (epoch + 1) % every == 0):
        return ""
    text = _one_line(caption, config, rng)
    if config.shuffle_affixes:
        text = _joined(_drawn(config.prefix, config, rng), text, _drawn(config.suffix, config, rng))
    if config.keep_separator and config.keep_separator in text or _changes_tags(config):
        steps = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * total_steps
        text = _tags(text, config, rng, warmup=(step, steps))
    if not config.shuffle_affixes:
        prefix, suffix = (_drawn(_without_mark(end, config), config, rng) for end in (config.prefix, config.suffix))
        text = _joined(prefix, text, suffix)
    return text.replace(config.secondary_separator, config.separator) if config.secondary_separator else text


def varying(config: CaptionConfig) -> tuple[str, ...]:
    """The options in use that make a caption differ from use to use in more ways than being empty; then it cannot be cached."""
    on = {
        "captions.shuffle": config.shuffle,
        "captions.wildcards": config.wildcards,
        "captions.tag_dropout": config.tag_dropout > 0,
        "captions.warmup_steps": config.warmup_steps > 0,
    }
    return tuple(name for name, used in on.items() if used)


def can_be_empty(config: CaptionConfig) -> bool:
    """Whether whole captions are dropped at times, so that the empty caption is needed too."""
    return config.dropout > 0 or config.dropout_every_epochs > 0


def steady(caption: str, config: CaptionConfig) -> str:
    """The caption with nothing dropped, shuffled or warmed up: what is cached, measured, shown and validated with."""
    calm = config.model_copy(update={"dropout": 0.0, "dropout_every_epochs": 0, "shuffle": False, "tag_dropout": 0.0, "warmup_steps": 0.0})
    return render(caption, calm, rng=random.Random(0), epoch=0, step=0, total_steps=1)  # noqa: S311  only wildcards draw from it


def _drawn(text: str, config: CaptionConfig, rng: random.Random) -> str:
    return _choose(_fill_trigger(text, config), config, rng)


def _joined(*parts: str) -> str:
    return " ".join(stripped for part in parts if (stripped := part.strip()))


def _fill_trigger(text: str, config: CaptionConfig) -> str:
    return text.replace(TRIGGER, config.trigger) if config.trigger else text


def _without_mark(text: str, config: CaptionConfig) -> str:
    mark = config.keep_separator
    return " ".join(part.strip() for part in text.split(mark)) if mark and mark in text else text


def _one_line(caption: str, config: CaptionConfig, rng: random.Random) -> str:
    lines = [line.strip() for line in caption.splitlines() if line.strip()]
    if not lines:
        return ""
    line = rng.choice(lines) if config.wildcards and not config.first_line and len(lines) > 1 else lines[0]
    return _drawn(line, config, rng)


def _choose(text: str, config: CaptionConfig, rng: random.Random) -> str:
    """Replace each `{a|b|c}` by one of its parts; `{{` and `}}` stand for plain braces. No nesting, no weights."""
    if not config.wildcards:
        return text
    text = text.replace("{{", _OPEN).replace("}}", _CLOSE)
    text = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")).strip(), text)
    return text.replace(_OPEN, "{").replace(_CLOSE, "}")


def _changes_tags(config: CaptionConfig) -> bool:
    return config.shuffle or config.tag_dropout > 0 or config.warmup_steps > 0


def _split(text: str, separator: str) -> list[str]:
    parts = text.split(separator) if separator else [text]
    return [part.strip() for part in parts if part.strip()]


def _parts(text: str, config: CaptionConfig) -> tuple[list[str], list[str], list[str]]:
    """Fixed beginning, flexible tags, fixed ending."""
    mark = config.keep_separator
    if mark and mark in text:
        head, _, rest = text.partition(mark)
        body, _, tail = rest.partition(mark)
        return _split(head, config.separator), _split(body, config.separator), _split(tail.replace(mark, ""), config.separator)
    tags = _split(text, config.separator)
    return tags[: config.keep_tokens], tags[config.keep_tokens :], []


def _tags(text: str, config: CaptionConfig, rng: random.Random, *, warmup: tuple[int, float]) -> str:
    """Keep, cut to what the warm-up (step, steps) has reached, shuffle, drop, join."""
    first, flexible, last = _parts(text, config)
    step, steps = warmup
    if step < steps:
        count = math.floor(step * (len(flexible) - config.warmup_min) / steps) + config.warmup_min
        flexible = flexible[: max(0, min(len(flexible), count))]
    if config.shuffle:
        rng.shuffle(flexible)
    if config.tag_dropout > 0:
        flexible = [tag for tag in flexible if rng.random() >= config.tag_dropout]
    glue = f"{config.separator.strip()} " if config.separator.strip() else config.separator or " "
    return glue.join(first + flexible + last)
