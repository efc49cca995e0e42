"""Modulation look-ahead in training: may the weights leave the device, and which inputs come next.

Noise levels, guidance and cached text of all steps are known from the seed and the plan of batches, so the rows of the next steps are
evaluated together, while the steps before them run. `choose` says why where that cannot be.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from fluxsmith.adapters.additive import Additive
from fluxsmith.adapters.rows import LayerAdapter
from fluxsmith.config.schema import RunConfig
from fluxsmith.data.dataset import PreparedData
from fluxsmith.data.types import Batch
from fluxsmith.memory.modulation import ROWS, Conditioning, LookAhead
from fluxsmith.models.assembly import Models
from fluxsmith.models.layers import Modulation
from fluxsmith.train.distributed import World
from fluxsmith.train.objectives.flow import Flow, batch_latents, batch_text
from fluxsmith.train.plan import BatchPlan
from fluxsmith.train.trained import Trained

NAMES = ("steps, one", "steps, other")  # of the two tables
EMBEDDERS = ("dit.time_in.", "dit.vector_in.", "dit.guidance_in.")


def obstacle(config: RunConfig, models: Models, trained: Trained, objective: Any) -> str:
    """Why the modulation weights have to stay on the device; empty if they need not."""
    dit = models.dit
    if dit is None or not any(isinstance(module, Modulation) for module in dit.modules()):
        return "the transformer has no modulation layers of its own"
    if config.adapter is None and any(name.startswith("dit.") for name in trained.params):
        return "the transformer itself is trained"
    if config.cache.text == "off" or models.is_clip_live:
        return "text is encoded at each step, so pooled text is not known ahead"
    if not isinstance(objective, Flow):
        return "the objective does not tell its noise levels ahead"
    if trained.adapters is None:
        return ""
    bases = {id(module.lin) for module in dit.modules() if isinstance(module, Modulation)}
    for path, adapter in trained.adapters.adapters.items():
        if path.startswith(EMBEDDERS):
            return f"{path} is adapted, so the conditioning vector changes while training"
        if id(trained.adapters.bases[path]) in bases and not is_additive(adapter):
            return f"the adapter of {path} needs the weight, not only its product"
    return ""


def is_additive(adapter: Any) -> bool:
    """True if an adapter adds something of its own, without looking at the base weight."""
    if not isinstance(adapter, LayerAdapter):
        return False
    return all(isinstance(part, Additive) and part.magnitude is None and getattr(part, "ggpo", None) is None for part in adapter.members())


class Refill:
    """Has the rows of each step ready; called before each step.

    Two tables take turns. While one is used the other is made, a few layers before each step, so that copies of weights hide behind it.
    """

    def __init__(self, lookahead: LookAhead, models: Models, objective: Flow, data: PreparedData, world: World) -> None:
        self.lookahead = lookahead
        self.models = models
        self.objective = objective
        self.data = data
        self.world = world
        self.known: range = range(0)
        self.name = ""
        self.coming: Iterator[None] = iter(())
        self.next: range = range(0)

    def __call__(self, step: int, plan: BatchPlan, total_steps: int) -> None:
        """Make sure that the rows of `step` are there. To be called under the autocast of the forward pass."""
        if step not in self.known:
            if step not in self.next:  # the first one, or one that was jumped to
                self.coming = self._prepare(step, plan, total_steps)
            for _ in self.coming:
                pass
            self.known, self.name = self.next, NAMES[self.name == NAMES[0]]
            self.lookahead.trusted = self.name
            self.coming = self._prepare(self.known.stop, plan, total_steps) if self.known.stop < total_steps else iter(())
        portion = -(-(len(self.known) + len(self.lookahead.layers)) // max(1, len(self.known) - 1))
        for _ in islice(self.coming, portion):
            pass
        self.lookahead.lane.drop()

    def confirm(self) -> None:
        """After the gradients, before weights change: raise RuntimeError if a row was taken for an input that was not announced."""
        self.lookahead.confirm()

    def _prepare(self, first: int, plan: BatchPlan, total_steps: int) -> Iterator[None]:
        """Make the other table, for as many steps as it holds."""
        coming: list[Conditioning] = []
        rows, last = 0, first
        while last < total_steps and (rows < ROWS // 2 or last == first):
            for _, spec in plan.micro_batches(last, self.world.rank):
                batch = self.data.load(spec, step=last, total_steps=total_steps)
                coming.append(self.conditioning(batch))
                rows += len(batch.indices)
            last += 1
            self.next = range(first, last)
            yield
        yield from self.lookahead.sweeping(coming, name=NAMES[self.name == NAMES[0]])

    def conditioning(self, batch: Batch) -> Conditioning:
        """What the forward pass of a batch will give the transformer, to the bit."""
        device, dit = self.world.device, self.models.dit
        if dit is None:
            raise ValueError("the transformer is not loaded")
        draws = self.objective.draws(batch_latents(self.models, batch, device), batch)
        guidance = draws.guidance.to(device) if dit.params.guidance_embed else None
        return Conditioning(draws.sigma.to(device), guidance, batch_text(self.models, batch, device).pooled)
