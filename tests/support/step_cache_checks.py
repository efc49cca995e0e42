"""Checks of fixtures on step caches, for tests/parity."""

from collections.abc import Callable

import torch
from fixture import Fixture
from torch import Tensor

from fluxsmith.generate.guidance import guided
from fluxsmith.generate.samplers import euler
from fluxsmith.generate.step_cache import CachedDiT, TeaCache, relative_change, rescaled
from fluxsmith.models.assembly import Level, Predictor, TextStates, velocity
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.shift import apply_shift

LOWEST, SHIFT = 0.003 / 1.002, 3.0  # DiffSynth's schedule


class Traced(TeaCache):
    """Notes the sum after each decision."""

    def __init__(self, threshold: float) -> None:
        super().__init__(threshold)
        self.sums: list[float] = []

    def skips(self, probe: Tensor, *, must_compute: bool) -> bool:
        answer = super().skips(probe, must_compute=must_compute)
        self.sums.append(self.accumulated)
        return answer


@torch.no_grad()
def check_teacache(f: Fixture) -> None:
    """Decisions and sums on given inputs, and whole pictures of a transformer behind the cache."""
    for branch in ("positive", "negative"):
        check_trace(f, branch)
    dit = f.dit()
    for threshold in ("none", *map(str, f.meta["params"]["run_thresholds"])):
        for scale, name in ((1.0, "run_cfg1"), (float(f.meta["params"]["cfg_scale"]), "run_cfg2_own")):
            check_run(f, dit, scale, f"{name.removesuffix('_own') if threshold == 'none' else name}/{threshold}")


def check_trace(f: Fixture, branch: str) -> None:
    steps = f.i[f"modulated_{branch}"]
    changes = [0.0, *(relative_change(now, before) for before, now in zip(steps[:-1], steps[1:], strict=True))]
    f.close(torch.tensor(changes, dtype=torch.float64), f"relative/{branch}", "relative")
    estimates = [0.0, *(rescaled(change) for change in changes[1:])]
    f.close(torch.tensor(estimates, dtype=torch.float64), f"rescaled/{branch}", "accumulated")
    for threshold in f.meta["params"]["thresholds"]:
        rule = Traced(threshold)
        skipped = [rule.skips(probe, must_compute=number in (0, len(steps) - 1)) for number, probe in enumerate(steps)]
        compare(f, f"own/{branch}/{threshold}", skipped, rule.sums)


def compare(f: Fixture, name: str, skipped: list[bool], sums: list[float]) -> None:
    assert skipped == f.e[f"skip_{name}"].bool().tolist(), name
    f.close(torch.tensor(sums, dtype=torch.float64), f"accumulated_{name}", "accumulated")


def check_run(f: Fixture, dit: FluxDiT, scale: float, name: str) -> None:
    """Latents and decisions of `run_cfg1/0.35` (a threshold) or `run_cfg1/none`."""
    threshold = name.partition("/")[2]
    line = torch.linspace(1, LOWEST, f.meta["params"]["run_steps"])
    levels = torch.cat((apply_shift(line, SHIFT), torch.zeros(1)))
    rules = [Traced(0.0 if threshold == "none" else float(threshold)) for _ in range(2 if scale != 1 else 1)]
    branches = [CachedDiT(dit, rule, last=float(levels[-2])) for rule in rules]
    calls = [caller(f, branch, row) for row, branch in enumerate(branches)]
    f.close(euler(guided(calls[0], calls[1] if scale != 1 else None, scale), f.i["latents"], levels), f"{name}/latents", "latents")
    if threshold == "none":
        assert not any(any(branch.skipped) for branch in branches)
        return
    for branch, rule, label in zip(branches, rules, ("positive", "negative"), strict=False):
        compare(f, f"{name}/{label}", branch.skipped, rule.sums)


def caller(f: Fixture, dit: Predictor, row: int) -> Callable[[Tensor, float], Tensor]:
    txt = f.i["txt"][row : row + 1]
    text = TextStates(txt, f.i["y"][row : row + 1], torch.ones(txt.shape[:2], dtype=torch.bool))
    return lambda x, sigma: velocity(dit, x, text, Level(torch.full((1,), sigma), f.i["guidance"]))
