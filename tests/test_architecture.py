"""The house rules, read from the source: layers, sizes, names, forbidden calls, and who may import what."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src" / "fluxsmith"
FILES = sorted(SRC.rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_ARGUMENTS = 400, 60, 6

LAYERS = {
    "ground": ("config", "io", "events", "errors", "randomness"),
    "models": ("models",),
    "parts": ("adapters", "controls", "quant", "memory", "optim", "data"),
    "verbs": ("train", "generate", "tools", "bench"),
    "faces": ("cli", "server", "dialects", "demo", "bundle"),
}
ORDER = list(LAYERS)
SIBLINGS = {
    ("controls", "adapters"),
    ("train", "generate"),
    ("bench", "train"),
    ("bench", "generate"),
    ("cli", "dialects"),
    ("server", "dialects"),
    ("cli", "demo"),
    ("cli", "server"),
}
SAME_LAYER_IS_FREE = ("ground",)  # the modules of the ground know each other

# Only these files import the library; a library with no file is never imported by src.
DOORS: dict[str, set[str]] = {
    "transformers": {"models/text_encoders.py", "models/vision_encoders.py", "models/qwen_vl.py"},
    "accelerate": {"train/distributed.py"},
    "diffusers": set(),
    "peft": set(),
    "lycoris": set(),
    "pickle": {"io/pickle_reader.py"},  # a process of its own, where no name but a tensor's is known
    "gguf": {"io/gguf_values.py"},
    "torchvision": set(),
    "tensorboard": {"train/sinks/tensorboard.py"},
    "wandb": {"train/sinks/wandb.py"},
    "prodigyopt": set(),
    "lion_pytorch": set(),
    "bitsandbytes": {"optim/bnb.py", "quant/nf4.py", "quant/int8.py"},
    "torchao": {"quant/fp8.py", "quant/int8.py", "quant/int4.py", "memory/checkpoint.py"},
    "triton": {"models/kernels/norm.py", "models/kernels/heads.py"},
    "controlnet_aux": {"controls/annotators.py"},
    "insightface": {"controls/faces.py"},
    "facexlib": {"controls/faces.py"},
    "huggingface_hub": {"io/sources.py", "io/hub.py", "train/sinks/hub.py", "data/sources/hub.py"},
}
FUNCTION_IMPORTS = {  # optional-dependency doors
    "train/distributed.py",
    "train/sinks/tensorboard.py",
    "train/sinks/wandb.py",
    "train/sinks/hub.py",
    "io/sources.py",
    "io/hub.py",
    "io/gguf_values.py",
}
FORBIDDEN_WORDS = ("utils", "common", "misc", "manager", "process", "network", "unet")
ENVIRONMENT = {"io/sources.py", "io/home.py", "io/launcher.py"}  # the last: what `accelerate launch` says
FORBIDDEN_CALLS = {"torch.load", "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads"}
ALLOWED_CALLS = {("config/choice.py", "exec")}  # docs/decisions/0001


def relative(file: Path) -> str:
    return file.relative_to(SRC).as_posix()


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(node: ast.AST) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module or ""
            yield from (f"{child.module}.{alias.name}" for alias in child.names if child.module == "fluxsmith")


def functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (child for child in ast.walk(node) if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def layer_of(module: str) -> str | None:
    return next((layer for layer, members in LAYERS.items() if module in members), None)


def may_import(source: str, target: str) -> bool:
    """The one rule: own folder, lower layers, and the few pairs that DESIGN names."""
    here, there = layer_of(source), layer_of(target)
    if source == target or here is None or there is None:
        return True
    if source == "server" and target == "train":
        return False
    if here == there:
        return here in SAME_LAYER_IS_FREE or (source, target) in SIBLINGS
    return ORDER.index(there) < ORDER.index(here)


def test_the_rule_itself() -> None:
    assert may_import("train", "models")
    assert may_import("train", "generate")
    assert not may_import("generate", "train")
    assert not may_import("models", "adapters")
    assert not may_import("adapters", "memory")
    assert not may_import("config", "models")
    assert not may_import("server", "train")


def imports_point_down(file: Path) -> Iterator[str]:
    source = relative(file).removesuffix(".py").partition("/")[0]
    for name in imports(tree(file)):
        parts = name.split(".")
        if parts[0] == "fluxsmith" and len(parts) > 1 and not may_import(source, parts[1]):
            yield f"may not import {name}: {source} is in {layer_of(source)}"


def libraries_have_doors(file: Path) -> Iterator[str]:
    for name in imports(tree(file)):
        library = name.partition(".")[0]
        doors = DOORS.get(library)
        if library == "fastapi" and not relative(file).startswith("server/"):
            yield "fastapi belongs to server/"
        if doors is not None and relative(file) not in doors:
            yield f"{library} may be imported in {sorted(doors)} only"


def imports_stand_at_the_top(file: Path) -> Iterator[str]:
    for function in functions(tree(file)):
        inside = [name for name in imports(function) if name]
        if relative(file).startswith("cli/"):  # a verb loads torch after its options and its run file are checked
            inside = [name for name in inside if not name.startswith("fluxsmith.")]
        if inside and relative(file) not in FUNCTION_IMPORTS:
            yield f"{function.name} imports {inside} inside"


def files_are_short(file: Path) -> Iterator[str]:
    lines = file.read_text(encoding="utf-8").count("\n")
    if lines > MAX_FILE:
        yield f"{lines} lines: it has two subjects, split it by noun"


def functions_are_short(file: Path) -> Iterator[str]:
    for function in functions(tree(file)):
        length = (function.end_lineno or 0) - function.lineno + 1
        if length > MAX_FUNCTION:
            yield f"line {function.lineno}: {function.name} has {length} lines"


def arguments_are_few(file: Path) -> Iterator[str]:
    for function in functions(tree(file)):
        spec = function.args
        names = [argument.arg for argument in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > MAX_ARGUMENTS and not relative(file).startswith("cli/"):  # a verb has as many as it has options
            yield f"line {function.lineno}: {function.name} has {count} arguments"


def names_say_the_subject(file: Path) -> Iterator[str]:
    parts = {part for step in relative(file).removesuffix(".py").split("/") for part in step.split("_")}
    if parts & set(FORBIDDEN_WORDS):
        yield "name the file after its subject"
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", node.name)}
            if words & {"utils", "common", "misc", "manager", "unet"}:
                yield f"line {node.lineno}: {node.name}"


def calls_are_safe(file: Path) -> Iterator[str]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_CALLS and (relative(file), name) not in ALLOWED_CALLS:
                yield f"line {node.lineno}: calls {name}"
            for keyword in node.keywords:
                is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("shell", "trust_remote_code") and not is_off:
                    yield f"line {node.lineno}: {keyword.arg}"


def environment_is_read_in_one_place(file: Path) -> Iterator[str]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.getenv") and relative(file) not in ENVIRONMENT:
            yield f"line {node.lineno}: reads the environment"


def modules_say_what_they_are(file: Path) -> Iterator[str]:
    if file.read_text(encoding="utf-8").strip() and not ast.get_docstring(tree(file)):
        yield "has no docstring"


def modules_hold_no_state(file: Path) -> Iterator[str]:
    """A module-level list, dict or set that some function changes is hidden state."""
    module = tree(file)
    held = set().union(*[stored(node) for node in module.body if isinstance(node, ast.Assign | ast.AnnAssign)])
    changing = {"append", "extend", "add", "update", "setdefault", "pop", "clear", "insert", "remove"}
    for function in functions(module):
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                yield f"line {node.lineno}: uses `global`"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in changing:
                name = dotted(node.func.value)
                if name in held - stored(function):
                    yield f"line {node.lineno}: changes the module's {name}"


def stored(node: ast.AST) -> set[str]:
    """Names that are assigned or are arguments inside `node`."""
    names = {child.id for child in ast.walk(node) if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)}
    return names | {child.arg for child in ast.walk(node) if isinstance(child, ast.arg)}


RULES = (
    imports_point_down,
    libraries_have_doors,
    imports_stand_at_the_top,
    files_are_short,
    functions_are_short,
    arguments_are_few,
    names_say_the_subject,
    calls_are_safe,
    environment_is_read_in_one_place,
    modules_say_what_they_are,
    modules_hold_no_state,
)


@pytest.mark.parametrize("rule", RULES, ids=[rule.__name__ for rule in RULES])
def test_rule(rule: Callable[[Path], Iterator[str]]) -> None:
    broken = [f"{relative(file)}: {text}" for file in FILES for text in rule(file)]
    assert not broken, "\n".join(broken)


BAD = """
import peft
from fluxsmith.train import trainer
STATE = {}
def many(a, b, c, d, e, f, g):
    import torch
    STATE.update(a=1)
    os.environ["X"]
    subprocess.run("ls", shell=True)
    return torch.load("x"), eval("1")
class DataManager: ...
"""


@pytest.mark.parametrize("rule", RULES, ids=[rule.__name__ for rule in RULES])
def test_rule_can_fail(rule: Callable[[Path], Iterator[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "io" / "utils.py"
    file.parent.mkdir()
    file.write_text(BAD + "def long():\n" + "    pass\n" * MAX_FILE)
    monkeypatch.setitem(globals(), "SRC", tmp_path)
    assert list(rule(file))
