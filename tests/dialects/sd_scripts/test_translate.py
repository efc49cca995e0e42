"""`fluxsmith translate sd-scripts`: the printed run file loads to the same run; the golden files say what it is."""

import json
from pathlib import Path

import pytest

from fluxsmith.cli.main import run
from fluxsmith.config.load import load_config
from fluxsmith.dialects.sd_scripts.lower import lower

HERE = Path(__file__).parent
PLAIN = """[[datasets]]
resolution = 1024
enable_bucket = true

  [[datasets.subsets]]
  image_dir = "images"
"""
BASE = (
    "--pretrained_model_name_or_path MODELS/flux1-dev.safetensors --clip_l MODELS/clip_l.safetensors --t5xxl MODELS/t5xxl_fp16.safetensors"
)
BASE += " --ae MODELS/ae.safetensors --output_dir output --dataset_config my_flux_dataset_config.toml"
CONDITIONS = " --dataset_config conditions.toml --max_train_epochs 2"
COMMANDS = {
    "lora": (HERE / "examples" / "lora.args").read_text(),
    "chroma": (HERE / "examples" / "chroma.args").read_text(),
    "multi_resolution": (HERE / "examples" / "lora.args").read_text() + " --dataset_config multi_resolution.toml",
    "oft_prodigy": f"flux_train_network.py {BASE}"
    + " --network_module networks.oft_flux --network_dim 8 --optimizer_type Prodigy --learning_rate 1",
    "whole_model": f"flux_train.py {BASE} --blockwise_fused_optimizers --mixed_precision bf16 --full_bf16 --lr_scheduler cosine",
    "controlnet": f"flux_train_control_net.py {BASE} {CONDITIONS}",
}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_flux_dataset_config.toml").write_text(PLAIN)
    (tmp_path / "conditions.toml").write_text(PLAIN + '  conditioning_data_dir = "edges"\n')
    for name in ("multi_resolution.toml", "chroma_prompts.txt"):
        (tmp_path / name).write_text((HERE / "examples" / name).read_text())
    return tmp_path


def translated(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    assert run(["translate", *words]) == 0
    said = capsys.readouterr()
    return said.out, said.err


@pytest.mark.ledger("FS-02")
@pytest.mark.ledger("KS-52")
@pytest.mark.parametrize("name", COMMANDS)
def test_goldens(desk: Path, name: str, capsys: pytest.CaptureFixture[str], update_golden: bool) -> None:
    words = COMMANDS[name].split()
    text, report = translated(["sd-scripts", *words], capsys)
    (desk / "run.toml").write_text(text)
    assert load_config(desk / "run.toml").config == lower(words).config
    found = text + "\n" + "".join(f"# {line}\n" for line in report.splitlines())
    golden = HERE / "golden" / f"{name}.toml"
    if update_golden:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(found)
    assert found == golden.read_text(), "look at the difference, then pytest --update-golden"


@pytest.mark.usefixtures("desk")
def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    text, report = translated(["--json", "sd-scripts", *COMMANDS["lora"].split()], capsys)
    record = json.loads(text)
    assert report == ""
    assert record["script"] == "flux_train_network"
    assert record["config"]["noise"]["prediction"] == "raw"
    assert {"option": "--sdpa", "text": "attention always goes through PyTorch's fused kernel, as this says"} in record["report"]["ignored"]
    assert {"option": "--learning_rate", "text": "see optimizer"} in record["report"]["kept"]


@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["kohya"], "name one of sd-scripts"),
        (["sd-scripts", "resize_lora", "--model", "x"], "trains nothing"),
        (["sd-scripts", "flux_train_network", "--sed", "1", "--network_dim", "x"], "write --seed"),
    ],
)
def test_mistakes(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["translate", *words]) == 2
    assert says in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage: fluxsmith translate" in translated([], capsys)[0]
    assert run(["sd-scripts"]) == 0
    assert "train a ControlNet" in capsys.readouterr().out
    assert run(["sd-scripts", "flux_train_network.py", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--network_dim INT" in text
    assert "[ignored: a switch of Stable Diffusion" in text


@pytest.mark.ledger("KS-51")
def test_output_config(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sd-scripts", *COMMANDS["lora"].split()]
    assert run([*words, "--config_file", "mine", "--output_config"]) == 0
    assert "written: mine.toml" in capsys.readouterr().out
    assert lower([words[1], "--config_file", "mine"]).config == lower(words[1:]).config
    assert not (desk / "output").exists()
