"""Start-up streams the weights: host memory while loading is the model plus the largest tensor, from every kind of file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fluxsmith.io.safetensors import Lazy, save_weights
from fluxsmith.models.fill import meta
from fluxsmith.models.flux import FluxDiT, FluxParams, axes_for_head

SOURCE = Path(__file__).resolve().parents[2] / "src"
MARGIN = 10 << 20  # header, module objects

MEASURE = """
import sys, torch
from fluxsmith.models.load import load_dit
torch.set_num_threads(1)
torch.zeros(1).to(torch.float8_e4m3fn).to(torch.bfloat16)

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here (getrusage would give that of the parent)
before = status("VmHWM")
model = load_dit(sys.argv[1], dtype=torch.bfloat16)
sizes = [p.numel() * p.element_size() for p in model.parameters()]
print(status("VmHWM") - before, sum(sizes), max(sizes))
"""


def write_large(path: Path, dtype: torch.dtype, prefix: str = "") -> None:
    """A transformer of 145 M weights; values do not matter, pages do."""
    params = FluxParams(64, 64, 768, 1024, 1024, 4096, 8, 2, 4, axes_for_head(128))
    shapes = {key: tuple(value.shape) for key, value in meta(lambda: FluxDiT(params)).state_dict().items()}
    tensors = {prefix + key: Lazy(dtype, shape, lambda shape=shape: torch.ones(shape).to(dtype)) for key, shape in shapes.items()}
    save_weights(path, tensors)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
@pytest.mark.ledger("ST-39")
@pytest.mark.ledger("ST-31")
@pytest.mark.parametrize(
    ("dtype", "prefix"),
    [(torch.bfloat16, ""), (torch.float8_e4m3fn, ""), (torch.float16, "model.diffusion_model."), (torch.float32, "")],
)
def test_loading_holds_the_model_and_one_tensor_more(tmp_path: Path, dtype: torch.dtype, prefix: str) -> None:
    path = tmp_path / "large.safetensors"
    write_large(path, dtype, prefix)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    grown, held, largest = map(int, done.stdout.split())
    assert 250e6 < held < grown
    assert grown < held + largest + MARGIN, f"{grown / 1e6:.0f} MB for {held / 1e6:.0f} MB and a largest tensor of {largest / 1e6:.0f} MB"
