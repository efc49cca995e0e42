"""The plan against a whole run: host memory of each phase, as the system counts it, beside what `fluxsmith plan` says.

`python bench/plan_truth.py` writes a model whose tensors dominate a process, trains on it on the CPU, each way in a process of its
own, and prints JSON. Peaks are VmHWM, reset as each phase begins, less what the process held before the run; so this needs Linux. The
test on tensors alone (`tests/train/test_plan_truth.py`) repeats exactly; this one does not: the allocator has its say.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "support")]

import torch  # noqa: E402  needs the path above
from tiny_run import LORA, TEXT, config, prepare_files  # noqa: E402

from fluxsmith.bench.sizes import Size, random_dit, tiny_params  # noqa: E402
from fluxsmith.config.dump import to_toml  # noqa: E402
from fluxsmith.config.load import load_config  # noqa: E402
from fluxsmith.events import Bus, CacheProgress, CheckpointSaved, Event, PhaseStarted, RunStarted, SampleReady, StepEnded  # noqa: E402
from fluxsmith.io.safetensors import save_weights  # noqa: E402
from fluxsmith.memory.plan import PROCESS, predict  # noqa: E402
from fluxsmith.train.planning import planned  # noqa: E402
from fluxsmith.train.run import train  # noqa: E402

SIDE, STEPS = 256, 3
RECOMPUTED = {"memory.checkpointing": True}
RUNS: dict[str, dict[str, Any]] = {
    "kept": LORA,
    "recomputed": {**LORA, **RECOMPUTED},
    "streamed": {**LORA, **RECOMPUTED, "memory.stream_blocks": 4},
    "int8": {**LORA, **RECOMPUTED, "quant": {"type": "int8"}},
}
COMPARED = ("load", "train", "sample")


class Peaks:
    """A listener: the highest host memory of each phase."""

    def __init__(self) -> None:
        self.phase, self.found = "start", {}
        self._reset()
        self.before = memory("VmRSS")

    def __call__(self, event: Event) -> None:
        following = self._after(event)
        if following and following != self.phase:
            self.end(following)

    def end(self, following: str = "") -> None:
        """What was held since this phase began."""
        self.found[self.phase] = max(self.found.get(self.phase, 0), memory("VmHWM") - self.before)
        self.phase = following
        self._reset()

    def _after(self, event: Event) -> str:
        if isinstance(event, PhaseStarted):
            return "load" if event.name == "load" and "model" in event.detail else ""
        if isinstance(event, CacheProgress):
            return "encode"
        if isinstance(event, RunStarted | SampleReady | CheckpointSaved):
            return "train"
        return "sample" if isinstance(event, StepEnded) and event.step == STEPS else ""

    def _reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")


def memory(name: str) -> int:
    """Bytes that the system says this process has (VmRSS) or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def child(run: str, warm: str) -> dict[str, Any]:
    """One run in this process: measured and predicted bytes of each phase. A tiny run goes before it, so that libraries are there."""
    settings = load_config(run).config
    predicted = {phase.name: phase.host - PROCESS for phase in predict(planned(settings, on_card=False, rehearses=True).job)}
    predicted["load"] = max(predicted["load"], predicted.get("quantise", 0))  # a run quantises while it loads
    train(load_config(warm).config, bus=Bus())
    peaks = Peaks()
    train(settings, bus=Bus(peaks))
    peaks.end()
    return {
        name: {"measured_mb": round(peaks.found[name] / 1e6, 1), "predicted_mb": round(predicted[name] / 1e6, 1),
               "off": round(predicted[name] / peaks.found[name] - 1, 3)}
        for name in COMPARED if name in peaks.found and name in predicted
    }  # fmt: skip


def truth(hidden: int, names: list[str]) -> dict[str, Any]:
    """All runs."""
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, warm = prepare_files(Path(folder) / "model"), prepare_files(Path(folder) / "warm-model")
        params = replace(tiny_params(hidden, hidden // 64, 2, 4), vec_in_dim=TEXT, context_in_dim=TEXT)
        dit = random_dit(Size("truth", params), None, torch.device("cpu"), dtype=torch.float32)
        save_weights(model / "dit.safetensors", dit.state_dict())
        del dit
        for name in names:
            sample = [{"prompt": "a red circle", "width": SIDE, "height": SIDE, "steps": 2, "every": 0, "first": False}]
            options = {
                **RUNS[name], "train.steps": STEPS, "train.accumulation": 1, "train.ema": None,
                "data.0.resolution": SIDE, "data.0.batch_size": 1,
                "checkpoint.every": 0, "sample": sample, "cache.dir": str(Path(folder) / f"cache-{name}"),
            }  # fmt: skip
            run, first = Path(folder) / f"{name}.toml", Path(folder) / f"{name}-warm.toml"
            run.write_text(to_toml(config(model, Path(folder) / name, options)))
            small = {**options, "cache.dir": str(Path(folder) / f"cache-warm-{name}")}
            first.write_text(to_toml(config(warm, Path(folder) / f"{name}-warm", {**small, "memory.stream_blocks": None})))
            words = [sys.executable, __file__, "--child", str(run), str(first)]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
            made[name] = json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr.strip().splitlines()[-1:]}
    return made


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", default=[*RUNS], help=f"of {', '.join(RUNS)}")
    parser.add_argument("--hidden", type=int, default=1536, help="width of the model")
    parser.add_argument("--child", nargs=2, metavar="RUN.TOML", help="measure the first run in this process, after the second")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(child(*options.child) if options.child else truth(options.hidden, options.runs), indent=1))


if __name__ == "__main__":
    main()
