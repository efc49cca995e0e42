"""`fluxsmith bench` on a tiny model: the table of scenarios, rows with their checks, what is skipped or fails, and the command."""

import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxsmith.bench import checks, micro, session
from fluxsmith.bench.job import Order, compared, keeps_bits, references
from fluxsmith.bench.meter import counted, spread
from fluxsmith.bench.scenarios import MICROS, SCENARIOS, chosen
from fluxsmith.bench.session import Wish, run, table
from fluxsmith.bench.sizes import SIZES, random_dit
from fluxsmith.cli import main as cli
from fluxsmith.errors import ConfigError
from fluxsmith.models.layers import Modulation


def wish(*patterns: str, **changes: Any) -> Wish:
    return Wish(tuple(chosen(patterns)), "tiny", "cpu", **{"repeats": 1, "loss_steps": 0, "apart": False, **changes})


@pytest.mark.ledger("FS-08")
def test_the_table_has_every_scenario_that_was_promised() -> None:
    names = {one.name for one in SCENARIOS}
    assert len(names) == len(SCENARIOS)
    every = product(("bf16", "fp8", "int8", "nf4"), (512, 768, 1024), (1, 4), ("none", "selective", "full"))
    loras = {f"lora-{base}-{side}-b{batch}-{how}" for base, side, batch, how in every}
    assert len(loras) == 72
    assert loras <= names
    assert {f"text-{n}" for n in (128, 256, 512)} <= names
    assert {f"streamed-{side}-{n}" for side in (512, 1024) for n in (10, 20, 35, 57)} <= names
    assert {"full-8bit", "full-fused", "lokr", "loha", "dora", "controlnet", "loader-512"} <= names
    drawings = ("bf16", "compiled", "fp8", "nf4", "streamed-8gib", "streamed-6gib", "streamed-4gib", "cache", "lora")
    assert {f"draw-{name}" for name in drawings} <= names
    assert {f"micro-{name}" for name in MICROS} <= names


def test_names_are_chosen_by_glob() -> None:
    assert [one.name for one in chosen(["lora-int8-512-b1-*"])] == [f"lora-int8-512-b1-{how}" for how in ("none", "selective", "full")]
    with pytest.raises(ConfigError, match="did you mean lokr"):
        chosen(["lork"])


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return run(wish("streamed-512-57", "draw-streamed-4gib", "micro-dx-int8", "micro-host-copy", loss_steps=10))


def row(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in result["rows"] if one["name"] == name)


@pytest.mark.ledger("FS-08")
def test_a_row_has_times_counts_and_checks(measured: dict[str, Any]) -> None:
    found = row(measured, "streamed-512-57")
    assert found["median_s"] > 0
    assert found["p90_s"] >= found["median_s"]
    assert found["images_per_s"] == pytest.approx(1 / found["median_s"])
    assert found["mfu"] is None, "nobody knows this CPU's ceiling"
    assert found["counts"]["operations"] > 500
    assert found["counts"]["allocated"] > 1_000_000
    assert found["bus_bytes"] > 0
    assert found["bus_limited_s"]["12.5"] == 2 * found["bus_limited_s"]["25"]
    assert found["memory"]["stream_blocks"] == 6
    names = ("finite", "repeatable", "velocity_l2", "gradient_cosine", "loss", "same_bits")
    assert {name: found["checks"][name]["ok"] for name in names} == dict.fromkeys(names, True)
    assert 0 < found["checks"]["velocity_l2"]["value"] < 0.04, "int8 against the exact base"
    assert found["checks"]["same_bits"]["value"] == 0.0


def test_a_drawing_and_an_operation_have_theirs(measured: dict[str, Any]) -> None:
    drawn = row(measured, "draw-streamed-4gib")
    assert drawn["checks"]["same_bits"]["ok"]
    assert drawn["repeats"] == drawn["steps"] - 1
    assert row(measured, "micro-dx-int8")["tflops"] > 0
    assert "no bus" in row(measured, "micro-host-copy")["skipped"]
    assert measured["size"] == "tiny"
    assert measured["versions"]["torch"] == torch.__version__
    text = table(measured)
    assert "| streamed-512-57 |" in text
    assert "| micro-host-copy | skipped: there is no bus to a device" in text


def test_a_scenario_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = micro.piece

    def broken(what: str, *rest: Any) -> micro.Piece:
        if what == "adapter":
            raise RuntimeError("no such kernel")
        return piece(what, *rest)

    monkeypatch.setattr(micro, "piece", broken)
    skipped = run(wish("lora-bf16-512-b1-none", card=12.0, checked=False))
    assert "only be emulated on a card" in row(skipped, "lora-bf16-512-b1-none")["skipped"]
    result = run(wish("micro-adapter", "micro-unpack-int8", checked=False))
    assert "RuntimeError: no such kernel" in row(result, "micro-adapter")["failed"]
    assert row(result, "micro-unpack-int8")["median_s"] > 0
    assert "| micro-adapter | failed: RuntimeError" in table(result)


def test_a_process_that_dies_is_a_failed_row(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import sys; sys.exit('killed by a test')"]
    assert "killed by a test" in session._asked(words, tmp_path / "none.json", 60)["failed"]
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert session._asked(words, tmp_path / "none.json", 0.2)["failed"] == "not finished after 0.2 s"


@pytest.mark.ledger("FS-08")
def test_checks_can_fail() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = {"velocity": torch.randn(64, generator=generator), "gradient a": torch.randn(64, generator=generator)}
    near = {name: value + 0.001 * torch.randn(64, generator=generator) for name, value in exact.items()}
    far = {name: value + torch.randn(64, generator=generator) for name, value in exact.items()}
    assert all(check["ok"] for check in checks.against_exact(near, exact, "").values())
    assert not any(check["ok"] for check in checks.against_exact(far, exact, "nf4").values())
    assert checks.same_bits(exact, exact)["ok"]
    assert not checks.same_bits(near, exact)["ok"]
    assert not checks.same_bits({}, exact)["ok"]
    assert checks.loss_curve([1.0] * 20, [1.005] * 20)["ok"]
    assert not checks.loss_curve([1.0] * 20, [1.02] * 20)["ok"]
    assert checks.loss_curve([1.0], [1.0])["ok"] is None
    assert not checks.finite([float("nan")], {})["ok"]
    assert not checks.finite([], {"x": torch.tensor([float("inf")])})["ok"]


def test_what_a_row_is_compared_with() -> None:
    streamed = chosen(["streamed-512-57"])[0]
    assert compared(streamed, "resident").run == {"adapter": streamed.run["adapter"], "quant": {"type": "int8"}, "memory": {}}
    assert "quant" not in compared(streamed, "exact").run
    assert keeps_bits(streamed)
    assert not any(keeps_bits(one) for one in chosen(["compiled-512", "draw-cache", "draw-compiled"]))
    plain = Order("lora-bf16-512-b1-none", "tiny", "cpu", "")
    assert references(plain) == []
    assert {one.reference for one in references(replace(plain, name="streamed-512-57"))} == {"exact", "resident"}
    assert references(replace(plain, name="micro-modulate")) == []


def test_random_models_are_like_trained_ones() -> None:
    cpu = torch.device("cpu")
    dit, again = (random_dit(SIZES["tiny"], None, cpu, dtype=torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(dit.parameters(), again.parameters(), strict=True))
    weight = dit.single_blocks[0].get_submodule("linear1").weight
    assert float(weight.std()) == pytest.approx(0.7 * weight.shape[1] ** -0.5, rel=0.05)  # type: ignore[operator,index]  # a tensor
    vec = dit.conditioning(torch.tensor([0.5]), torch.tensor([3.5]), torch.randn(1, dit.params.vec_in_dim))
    gates = [out.gate.abs().mean() for module in dit.modules() if isinstance(module, Modulation) for out in module(vec)]
    assert 0.03 < float(torch.stack(gates).mean()) < 0.2
    assert SIZES["full"].counts.total == 11_901_408_320
    assert SIZES["half"].total == 28


def test_meters() -> None:
    assert spread([3.0, 1.0, 2.0, *[1.0] * 7]) == {"median_s": 1.0, "p90_s": 2.0, "repeats": 10}
    x = torch.randn(1000)
    found = counted(lambda: float((x + 1).sum()), torch.device("cpu"), static={"cpu": 7})
    assert found["allocated"] == 4000 + 4 + 7
    assert found["waits"] == 1


@pytest.mark.ledger("FS-08")
def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(["bench", "--list", "micro-forward-*"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert cli.run(["bench", "--device", "cpu"]) == 2
    assert "name some" in capsys.readouterr().err
    assert cli.run(["bench", "nothing-like-it", "--device", "cpu"]) == 2
    assert cli.run(["bench", "micro-unpack-nf4", "--device", "cpu", "--card", "large"]) == 2
    assert cli.run(["bench", "lokr", "--device", "cpu", "--against", "nowhere.py"]) == 2
    capsys.readouterr()
    out, markdown = tmp_path / "results.json", tmp_path / "table.md"
    words = ["micro-unpack-nf4", "--device", "cpu", "--in-process", "--repeats", "2", "--out", str(out), "--markdown", str(markdown)]
    assert cli.run(["bench", *words]) == 0
    assert "| micro-unpack-nf4 |" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["rows"][0]["repeats"] == 2
    assert {"commit", "date", "command", "device", "versions"} <= found.keys()
    assert markdown.read_text() == table(found)
