"""The verbs that make and change adapter files: what they write and print, and how they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lora_files import deltas_of, diffusers_folder, merged_by_hand, tensors_of, write_lora

from fluxsmith.cli.main import run
from fluxsmith.tools.inspect import inspect


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bare file names are used throughout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def base(fixtures_root: Path) -> Path:
    return fixtures_root / "flux-dev-tiny/weights.safetensors"


@pytest.fixture
def lora(base: Path) -> str:
    return write_lora(Path("a.safetensors"), base, seed=1, rank=3, alpha=3.0).name


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = run([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.ledger("KS-45")
@pytest.mark.ledger("KS-47")
def test_merge_then_extract(base: Path, lora: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "lora", "merge", f"{lora}:0.5", "--into", base, "-o", "merged.safetensors")
    assert code == 0
    assert "4 layers of a.safetensors" in out
    code, out, _ = call(capsys, "lora", "extract", base, "merged.safetensors", "-o", "out.safetensors", "--rank", "3", "--dtype", "fp32")
    assert code == 0
    assert "4 layers, rank 3" in out
    assert "holds 100.0000% of the squared difference" in out
    assert "loads in sd-scripts, ComfyUI" in out
    expected, made = deltas_of(Path(lora)), deltas_of(Path("out.safetensors"))
    assert max(float((made[name] - 0.5 * expected[name]).abs().max()) for name in expected) < 1e-4


def test_extract_options(base: Path, lora: str, capsys: pytest.CaptureFixture[str]) -> None:
    merged_by_hand(base, Path("tuned.safetensors"), {Path(lora): 1.0})
    words = ("lora", "extract", base, "tuned.safetensors", "-o", "out.safetensors", "--overwrite", "--json")
    code, out, _ = call(capsys, *words, "--energy", "0.8", "--max-rank", "2", "--layers", "single_blocks", "--format", "comfy")
    record = json.loads(out)
    assert code == 0
    assert {layer["rank"] for layer in record["layers"]} <= {1, 2}
    assert all("single_blocks" in layer["path"] for layer in record["layers"])
    assert inspect("out.safetensors").format == "comfy_bfl"
    assert record["left_out"]
    assert call(capsys, *words, "--ratio", "1.01")[0] == 0
    assert call(capsys, "lora", "extract", base, "tuned.safetensors", "-o", "no.safetensors", "--dry-run")[0] == 0
    assert not Path("no.safetensors").exists()


@pytest.mark.ledger("KS-47")
def test_merge_adapters(base: Path, lora: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_lora(Path("b.safetensors"), base, seed=2, rank=2)
    code, out, _ = call(capsys, "lora", "merge", f"{lora}:0.5", "b.safetensors:-1", "-o", "ab.safetensors")
    assert code == 0
    assert "4 of rank 5" in out
    expected = {name: 0.5 * value - deltas_of(Path("b.safetensors"))[name] for name, value in deltas_of(Path(lora)).items()}
    made = deltas_of(Path("ab.safetensors"))
    assert max(float((made[name] - expected[name]).abs().max()) for name in expected) < 1e-6
    code, out, _ = call(capsys, "lora", "merge", lora, "b.safetensors", "-o", "cut.safetensors", "--rank", "2", "--json")
    assert json.loads(out)["ranks"] == {"2": 4}
    assert call(capsys, "lora", "merge", lora, "b.safetensors", "-o", "full.safetensors", "--full")[0] == 0
    assert inspect("full.safetensors").kind == "full"


@pytest.mark.ledger("KS-46")
def test_convert_resize_weights(lora: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "lora", "convert", lora, "--to", "peft", "-o", "peft.safetensors")
    assert code == 0
    assert "kohya -> peft" in out
    assert call(capsys, "lora", "convert", "peft.safetensors", "--to", "kohya", "-o", "back.safetensors")[0] == 0
    before, after = tensors_of(Path(lora)), tensors_of(Path("back.safetensors"))
    assert all((before[name] == after[name]).all() for name in before)
    code, out, _ = call(capsys, "lora", "resize", lora, "--rank", "2", "-o", "small.safetensors", "-v")
    assert code == 0
    assert "rank 2; keeps" in out
    assert "rank 3 -> 2, sum kept" in out
    code, out, _ = call(capsys, "lora", "weights", "small.safetensors")
    assert out.count("mean") == 8
    code, out, _ = call(capsys, "lora", "weights", "small.safetensors", "--all", "--json")
    assert len(json.loads(out)) == 12


@pytest.mark.ledger("KS-46")
def test_model_convert_and_merge(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diffusers_folder(base, Path("folder"))
    code, out, _ = call(capsys, "model", "convert", "folder", "-o", "one.safetensors")
    assert code == 0
    assert f"{len(tensors_of(base))} tensors" in out
    assert call(capsys, "model", "merge", f"{base}:0.5", "one.safetensors:0.5", "-o", "half.safetensors", "--json")[0] == 0
    made, expected = tensors_of(Path("half.safetensors")), tensors_of(base)
    assert max(float((made[name] - expected[name]).abs().max()) for name in expected) < 1e-6


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("lora extract {base} -o x.safetensors", 2, "give the original and the tuned one"),
        ("lora extract -o x.safetensors", 2, "no pair of models"),
        ("lora extract {base} {base} -o x.safetensors", 4, "do not differ"),
        ("lora merge a.safetensors --into {base}", 2, "add -o FILE.safetensors"),
        ("lora merge a.safetensors --into {base} -o x.safetensors --rank 4", 2, "--rank is for merging adapters with each other"),
        ("lora merge a.safetensors -o x.safetensors --skip-unmatched", 2, "--skip-unmatched is for merging adapters into a model"),
        ("lora merge a.safetensors:nan -o x.safetensors", 2, "not a number"),
        ("lora merge a.safetensors -o x.safetensors --rank 2 --full", 2, "exclude each other"),
        ("lora merge none.safetensors -o x.safetensors", 4, "no such file"),
        ("lora convert a.safetensors --to kohia -o x.safetensors", 2, "kohia"),
        ("lora convert a.safetensors --to xlabs -o x.safetensors", 4, "has no layer"),
        ("lora convert a.safetensors --to peft -o a.safetensors", 2, "add --overwrite"),
        ("lora resize a.safetensors --rank 2 --method sum -o x.safetensors", 2, "come together"),
        ("lora resize a.safetensors --rank 2 -o x.pt", 2, "write to x.safetensors"),
        ("model convert a.safetensors -o x.safetensors", 4, "FLUX transformer was expected"),
        ("model merge {base} -o x.safetensors", 2, "give two or more"),
    ],
)
def test_mistakes(base: Path, lora: str, words: str, code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, _, err = call(capsys, *words.format(base=base).split())
    assert (found, says in err) == (code, True), err
    assert not Path("x.safetensors").exists()


@pytest.mark.parametrize("verb", ["lora extract", "lora merge", "lora convert", "lora resize", "model convert", "model merge"])
def test_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, *verb.split(), "--help")
    assert code == 0
    assert f"fluxsmith {verb} " in " ".join(out.replace("│", " ").split()).partition("Usage")[2].partition("Example")[2]


def test_help_needs_no_torch() -> None:
    names = ["lora inspect", "lora extract", "lora merge", "lora convert", "lora resize", "lora weights", "model merge"]
    words = [[*name.split(), "--help"] for name in names]
    code = f"import sys; from fluxsmith.cli.main import run; [run(words) for words in {words!r}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
