"""A command behind accelerate's launcher, on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import write_model

from fluxsmith.io.safetensors import open_weights


@pytest.mark.ledger("KS-51")
def test_accelerate_launch(work: Path, base_words: list[str]) -> None:
    model = write_model(work / "model")
    files = {"pretrained_model_name_or_path": "dit", "clip_l": "clip_l", "t5xxl": "t5xxl", "ae": "ae"}
    words = [*base_words, *[word for name, file in files.items() for word in (f"--{name}", str(model / f"{file}.safetensors"))]]
    (work / "data.toml").write_text((work / "data.toml").read_text().replace("resolution = 512", "resolution = 32\nbucket_reso_steps = 16"))
    words += ["--t5xxl_max_token_length", "32", "--max_train_steps", "2", "--network_dim", "2", "--network_train_unet_only"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "fluxsmith", "sd-scripts"]
    source = str(Path(__file__).resolve().parents[3] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, env=environment, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("--seed: not given") == 1
    assert done.stdout.count("weights: out/cats.safetensors") == 1
    with open_weights(work / "out" / "cats.safetensors") as weights:
        assert weights.metadata["ss_steps"] == "2"
