"""One scenario measured in this process: a row of the result, and what others compare themselves with.

`measure(order)` returns a JSON-ready row; tensors and losses of its probe go into the session's folder under `order.key`.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxsmith.bench import checks, drawing, meter, micro, training
from fluxsmith.bench.scenarios import FULL, SCENARIOS, Scenario
from fluxsmith.bench.sizes import SIZES, Size
from fluxsmith.errors import ConfigError
from fluxsmith.io.safetensors import open_weights, save_weights
from fluxsmith.memory.plan import Job, peak, traffic
from fluxsmith.memory.rate import Card, card_named, ceiling, forward_flops, moved_bytes, step_work
from fluxsmith.train.planning import planned

BUSES = (25.0, 12.5)  # GB/s: PCIe 4.0 and 3.0, 16 lanes
EMULATED_STEPS = 10
WARM_UP = 3


@dataclass(frozen=True)
class Order:
    """What to measure, and how."""

    name: str
    size: str
    device: str
    folder: str
    """Of the session: probes lie here."""
    repeats: int = 20
    loss_steps: int = 50
    card: float = 0.0
    """GiB to emulate; 0 for none."""
    peak_tflops: float = 0.0
    """The device's ceiling in 16 bits; 0: from the table of cards."""
    reference: str = ""
    """"exact" or "resident": measure what this scenario is compared with, instead of itself."""

    @property
    def scenario(self) -> Scenario:
        """The row, or what it is compared with."""
        own = next(one for one in SCENARIOS if one.name == self.name)
        return compared(own, self.reference) if self.reference else own

    @property
    def key(self) -> str:
        """Equal for scenarios that compute the same."""
        one = self.scenario
        what = [self.size, self.device, self.loss_steps, one.kind, one.side, one.text, one.batch, one.run, one.options]
        return blake2b(json.dumps(what, sort_keys=True, default=dict).encode(), digest_size=8).hexdigest()


def compared(scenario: Scenario, reference: str) -> Scenario:
    """The same with everything resident ("resident"), and on the unquantised base ("exact")."""
    run = {name: section for name, section in scenario.run.items() if reference == "resident" or name != "quant"}
    if scenario.kind == "train":
        memory = {} if "adapter" in scenario.run else FULL  # without an adapter, kept activations leave no room
        return replace(scenario, run={**run, "memory": memory})
    return replace(scenario, run=run, options={name: value for name, value in scenario.options.items() if name in ("steps", "what")})


def measure(order: Order) -> dict[str, Any]:
    """The row. Raises ConfigError where the device cannot do it, and whatever goes wrong."""
    device, scenario, size = torch.device(order.device), order.scenario, SIZES[order.size]
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device", fix="use --device cpu")
    if order.card and device.type != "cuda":
        raise ConfigError("a smaller card can only be emulated on a card", fix="leave --card out")
    if order.card:
        training.emulate(order.card, device)
    kinds: Mapping[str, Callable[[Order, Scenario, Size, torch.device], dict[str, Any]]] = {
        "train": _train, "draw": _draw, "micro": _micro,
    }  # fmt: skip
    about = {"name": scenario.name, "kind": scenario.kind, "about": scenario.about, "size": size.name}
    return {**about, **kinds[scenario.kind](order, scenario, size, device)}


def _train(order: Order, scenario: Scenario, size: Size, device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fluxsmith-bench-") as folder:
        made = training.ready(scenario, size, Path(folder), device, card=order.card)
        job = planned(made.parts.config, on_card=device.type == "cuda", shapes=size.shapes).job
        job = replace(job, tokens=size.text(scenario.text) + (size.side(scenario.side) // 16) ** 2)
        tensors = training.probe(made)
        again = training.probe(made)
        row: dict[str, Any] = {"side": size.side(scenario.side), "tokens": job.tokens, "batch": scenario.batch, "memory": _told(made)}
        losses: list[float] = []
        if order.reference:
            losses = [made.trainer.go() for _ in range(order.loss_steps)]
        else:
            row |= _steps(order, made, losses, device)
            row |= _rates(order, row, job, scenario, device)
    _keep(order, tensors, losses)
    found = {"finite": checks.finite(losses, tensors), "repeatable": checks.same_bits(again, tensors)}
    return {**row, "checks": {**found, **_compare(order, scenario, tensors, losses)}}


def _steps(order: Order, made: training.Training, losses: list[float], device: torch.device) -> dict[str, Any]:
    """Times of steps after the first ones, memory of all of them, and counts of one more."""
    first, loss = meter.timed(made.trainer.go, device)
    losses.append(loss)
    meter.begin_memory(device)
    seconds: list[float] = []
    for number in range(max(WARM_UP - 1 + order.repeats, order.loss_steps - 1)):
        one, loss = meter.timed(made.trainer.go, device)
        losses.append(loss)
        if number >= WARM_UP - 1:
            seconds.append(one)
    row: dict[str, Any] = {**meter.spread(seconds), "memory_bytes": meter.memory(device), "first_loss": losses[0], "last_loss": losses[-1]}
    if made.parts.config.memory.compile:
        row["compile_s"] = first - row["median_s"]
    else:
        row["counts"] = meter.counted(made.trainer.go, device, static=training.static_bytes(made))
    if order.card:
        row["emulated"] = {"card_gib": order.card, "steps": len(losses), "ok": len(losses) >= EMULATED_STEPS}
    return row


def _rates(order: Order, row: Mapping[str, Any], job: Job, scenario: Scenario, device: torch.device) -> dict[str, Any]:
    """Pictures a second, model FLOP utilisation, predicted peak, and what a slower bus would allow."""
    blocks = len(job.counts.blocks)
    again = (blocks - job.kept - job.selective) / blocks
    work = step_work(job.counts, job.tokens, job.batch, trains_base=job.is_full, recomputed=again)
    found: dict[str, Any] = {"images_per_s": scenario.batch / row["median_s"], "model_tflop": work.model / 1e12}
    top = _ceiling(order, job.quant, device)
    found["mfu"] = work.model / (row["median_s"] * top) if top and "control" not in scenario.run else None
    found["predicted_bytes"] = peak(job, "train") if device.type == "cuda" else None
    moved = row.get("counts", {}).get("bus_bytes") if device.type == "cuda" else None
    bus = moved_bytes(*traffic(job)) if moved is None else moved
    return {**found, "bus_bytes": bus, "bus_limited_s": {f"{speed:g}": bus / (speed * 1e9) for speed in BUSES}}


def _ceiling(order: Order, quant: str, device: torch.device) -> float:
    if order.peak_tflops:
        return ceiling(Card(order.peak_tflops, 2 * order.peak_tflops), quant)
    card = card_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return ceiling(card, quant) if card is not None else 0.0


def _told(made: training.Training) -> dict[str, Any]:
    """Settings of memory that are not those of a fresh config."""
    return made.parts.config.memory.model_dump(mode="json", exclude_defaults=True)


def _draw(order: Order, scenario: Scenario, size: Size, device: torch.device) -> dict[str, Any]:
    made = drawing.ready(scenario, size, device)
    first = drawing.draw(made)
    row: dict[str, Any] = {"side": made.request.width, "steps": made.request.steps}
    tensors = {"velocity": first.latents}
    if not order.reference:
        meter.begin_memory(device)
        pictures = max(1, -(-order.repeats // len(first.steps)))
        drawn = [drawing.draw(made) for _ in range(pictures)]
        times = [one for picture in drawn for one in picture.steps]
        row |= {**meter.spread(times), "picture_s": sorted(one.seconds for one in drawn)[len(drawn) // 2], "notes": dict(first.notes)}
        row |= {"memory_bytes": meter.memory(device), "images_per_s": 1 / row["picture_s"]}
        if scenario.options.get("compile"):
            row["compile_s"] = first.seconds - row["picture_s"]
        tokens = size.text(scenario.text) + (made.request.width // 16) ** 2
        top, counts = _ceiling(order, scenario.run.get("quant", {}).get("type", ""), device), size.counts
        flops = forward_flops(counts, tokens)
        row |= {"tokens": tokens, "model_tflop": flops / 1e12, "mfu": flops / (row["median_s"] * top) if top else None}
        tensors["again"] = drawn[-1].latents
    _keep(order, {"velocity": first.latents}, [])
    found = {"finite": checks.finite([], tensors)}
    if "again" in tensors:
        found["repeatable"] = checks.same_bits({"velocity": tensors["again"]}, {"velocity": first.latents})
    return {**row, "checks": {**found, **_compare(order, scenario, {"velocity": first.latents}, [])}}


def _micro(order: Order, scenario: Scenario, size: Size, device: torch.device) -> dict[str, Any]:
    tokens = size.text(scenario.text) + (size.side(scenario.side) // 16) ** 2
    piece = micro.piece(scenario.options["what"], size, tokens, device)
    for _ in range(WARM_UP):
        piece.work()
    row: dict[str, Any] = meter.spread([meter.timed(piece.work, device)[0] for _ in range(order.repeats)])
    rates = {"gb_per_s": piece.bytes / row["median_s"] / 1e9, "tflops": piece.flops / row["median_s"] / 1e12}
    return {**row, **rates, "tokens": tokens, "checks": {}}


def _keep(order: Order, tensors: Mapping[str, Tensor], losses: list[float]) -> None:
    """For those who compare themselves with this."""
    path = Path(order.folder) / f"{order.key}.safetensors"
    save_weights(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, {"losses": json.dumps(losses)})


def _known(order: Order) -> tuple[dict[str, Tensor], list[float]] | None:
    path = Path(order.folder) / f"{order.key}.safetensors"
    if not path.is_file():
        return None
    with open_weights(path) as file:
        return {name: file.tensor(name) for name in file.keys()}, json.loads(file.metadata["losses"])  # noqa: SIM118  no dict


def _compare(order: Order, scenario: Scenario, tensors: Mapping[str, Tensor], losses: list[float]) -> dict[str, checks.Check]:
    """Against the exact base, and against the same base with everything resident."""
    if order.reference:
        return {}
    exact, resident = replace(order, reference="exact"), replace(order, reference="resident")
    found: dict[str, checks.Check] = {}
    quant = str(scenario.run.get("quant", {}).get("type", ""))
    if exact.key == order.key:
        found["exact"] = checks.unchecked("this is what the others are compared with")
    elif (known := _known(exact)) is None:
        found["exact"] = checks.unchecked("what it is compared with could not be measured")
    elif "cache" not in scenario.options:
        found |= checks.against_exact(tensors, known[0], quant)
        if losses:
            found["loss"] = checks.loss_curve(losses, known[1])
    if keeps_bits(scenario) and resident.key != order.key:
        known = _known(resident)
        missing = checks.unchecked("the resident model could not be measured")
        found["same_bits"] = missing if known is None else checks.same_bits(tensors, known[0])
    return found


def keeps_bits(scenario: Scenario) -> bool:
    """Should it compute the same bits as the resident model? Not where it is compiled, or a cache leaves steps out."""
    return not (scenario.options.get("compile") or scenario.options.get("cache") or scenario.run.get("memory", {}).get("compile"))


def references(order: Order) -> list[Order]:
    """What has to be measured before this one, each once."""
    if order.scenario.kind == "micro":
        return []
    wanted = [replace(order, reference=name, card=0.0) for name in ("exact", "resident")]
    return [one for one in {one.key: one for one in wanted}.values() if one.key != order.key]


def as_json(order: Order) -> str:
    """An order on its way to another process."""
    return json.dumps(asdict(order))
