"""Several runs one after the other in a group of processes that is started once: `torchrun ... group_runs.py runs.json`.

runs.json is a list of [config file, resume?]; what went wrong with a run is written beside its config as `error-RANK.txt`.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fluxsmith.config.load import load_config
from fluxsmith.errors import FluxsmithError
from fluxsmith.events import Bus, Event, Warned
from fluxsmith.train.run import train


def main(runs: Path) -> None:
    """All runs; the first process keeps its warnings in `warnings.txt` beside the config."""
    torch.set_num_threads(1)
    for path, resume in json.loads(runs.read_text()):
        said: list[str] = []

        def listen(event: Event, said: list[str] = said) -> None:
            if isinstance(event, Warned):
                said.append(event.message)

        try:
            train(load_config(Path(path)).config, resume=resume, bus=Bus(listen))
        except FluxsmithError as error:
            rank = dist.get_rank() if dist.is_initialized() else 0
            Path(path).with_name(f"error-{rank}.txt").write_text("\n".join(error.lines()))
        if said:
            Path(path).with_name("warnings.txt").write_text("\n".join(said))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
