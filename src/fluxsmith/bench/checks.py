"""Is what was measured also right: velocity and gradients against the exact base, bits against the resident model, loss over 50 steps.

A check is `{"value", "limit", "ok"}`; one that cannot be made says why. Limits are those of docs/how-to/benchmark.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

VELOCITY = {"": 1e-2, "fp8": 4e-2, "int8": 4e-2, "nf4": 8e-2, "int4": 8e-2, "int2": 0.5}  # relative L2
COSINE = {"": 0.999, "fp8": 0.99, "int8": 0.99, "nf4": 0.97, "int4": 0.97, "int2": 0.5}  # of gradients
LOSS = 0.01  # relative difference of the mean of the last ten losses
LAST = 10

Check = dict[str, Any]


def relative(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|, in fp64."""
    return float(torch.linalg.vector_norm(found.double() - exact.double()) / torch.linalg.vector_norm(exact.double()).clamp(min=1e-30))


def cosine(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Of all gradients laid end to end."""
    names = sorted(name for name in exact if name.startswith("gradient ") and name in found)
    left, right = (torch.cat([one[name].double() for name in names]) for one in (found, exact))
    return float(torch.dot(left, right) / (left.norm() * right.norm()).clamp(min=1e-30))


def below(value: float, limit: float) -> Check:
    """A value that must not exceed a limit."""
    return {"value": value, "limit": limit, "ok": bool(value <= limit)}


def unchecked(why: str) -> Check:
    """A check that could not be made."""
    return {"value": None, "ok": None, "why": why}


def against_exact(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], quant: str) -> dict[str, Check]:
    """Against the unquantised resident base."""
    made = {"velocity_l2": below(relative(found["velocity"], exact["velocity"]), VELOCITY[quant])}
    if any(name.startswith("gradient ") for name in exact):
        value = cosine(found, exact)
        made["gradient_cosine"] = {"value": value, "limit": COSINE[quant], "ok": value >= COSINE[quant]}
    return made


def same_bits(found: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Check:
    """Equal to the last bit; otherwise the largest relative difference of a tensor."""
    both, missing = other.keys() & found.keys(), sorted(other.keys() ^ found.keys())
    worst = max((relative(found[name], other[name]) for name in both if not torch.equal(found[name], other[name])), default=0.0)
    return {"value": worst, "limit": 0.0, "ok": worst == 0.0 and not missing, **({"why": f"not in both: {missing[:3]}"} if missing else {})}


def loss_curve(found: Sequence[float], exact: Sequence[float]) -> Check:
    """Mean of the last losses."""
    steps = min(len(found), len(exact))
    if steps < LAST:
        return unchecked(f"{steps} steps are too few to compare")
    mean, known = (sum(one[steps - LAST : steps]) / LAST for one in (found, exact))
    return {**below(abs(mean - known) / abs(known), LOSS), "steps": steps}


def finite(values: Sequence[float], tensors: Mapping[str, Tensor]) -> Check:
    """No NaN and no infinity anywhere."""
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    good = all(value == value and abs(value) != float("inf") for value in values) and not bad
    return {"value": len(bad), "limit": 0, "ok": good}
