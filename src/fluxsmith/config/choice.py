"""`type = "lora"` means the file `lora.py` of the section's folder: finding it, its `Config`, and later its code.

A check of a config needs the `Config` classes but not torch, so only the light statements of a plug-in file are executed
(docs/decisions/0001-config-class-by-ast.md): `Annotated[PluginConfig, Choice("fluxsmith.adapters")]` in a section, and
`realise(config).build(...)` when the run is built.
"""

import ast
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

from fluxsmith.config.section import PluginConfig
from fluxsmith.errors import ConfigError

LIGHT_IMPORTS = ("typing", "enum", "pathlib", "pydantic", "math", "re", "fluxsmith.config", "fluxsmith.errors")
CONTEXT_KEY = "plugin_files"


class Choice:
    """The validator of a pluggable section; `package` is the dotted name of the folder that holds the plug-ins."""

    def __init__(self, package: str) -> None:
        self.package = package

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True)
        return core_schema.with_info_plain_validator_function(self._validate, serialization=dump)

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        options = []
        for name in plugin_names(self.package):
            option = handler(config_class(self.package, name).__pydantic_core_schema__)
            resolved = handler.resolve_ref_schema(option)
            resolved["properties"]["type"] = {"const": name, "type": "string", "description": "The plug-in."}
            resolved["required"] = ["type", *[key for key in resolved.get("required", []) if key != "type"]]
            options.append(option)
        return {"oneOf": options} if options else {"type": "object"}

    def _validate(self, value: Any, info: core_schema.ValidationInfo) -> PluginConfig:
        if isinstance(value, PluginConfig):
            return value if value.type else value.model_copy(update={"type": type(value).__module__.rpartition(".")[2]})
        if not isinstance(value, Mapping):
            raise PydanticCustomError("plugin_form", 'a table with `type` is expected, for example `type = "{name}"`', self._example())
        if "type" not in value:
            raise PydanticCustomError("plugin_missing_type", "`type` is missing; available: {names}", {"names": self._listing()})
        name = value["type"]
        files = (info.context or {}).get(CONTEXT_KEY, ())
        return self.config_class(name, files).model_validate(dict(value), context=info.context)

    def config_class(self, name: Any, files: Iterable[Path] = ()) -> type[PluginConfig]:
        """The `Config` of plug-in `name`: a file of the folder, or one of the `files` named on the command line."""
        names = plugin_names(self.package)
        if name in names:
            return config_class(self.package, name)
        for file in files:
            if isinstance(name, str) and _names_file(name, file):
                return _light_config(file, self.package, name, file.stat().st_mtime_ns)
        nearest = difflib.get_close_matches(str(name), names, 1, 0.5)
        context = {"given": str(name), "names": self._listing(), "nearest": nearest[0] if nearest else ""}
        raise PydanticCustomError("plugin_unknown", "unknown type '{given}'; available: {names}", context)

    def _listing(self) -> str:
        return ", ".join(plugin_names(self.package)) or "none"

    def _example(self) -> dict[str, Any]:
        return {"name": next(iter(plugin_names(self.package)), "...")}


def _dump(value: PluginConfig, info: core_schema.SerializationInfo) -> dict[str, Any]:
    return value.model_dump(mode=info.mode, exclude_none=info.exclude_none, exclude_unset=info.exclude_unset)


def folder_of(package: str) -> Path:
    """Where the plug-ins of a dotted package lie; the package itself is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not a package")
    return Path(next(iter(spec.submodule_search_locations)))


def plugin_names(package: str) -> list[str]:
    """Names that `type` may have: the files of the folder with a `Config` class, sorted."""
    files = sorted(folder_of(package).glob("*.py"))
    return [file.stem for file in files if "\nclass Config(" in file.read_text(encoding="utf-8")]


def config_class(package: str, name: str) -> type[PluginConfig]:
    """The `Config` class of one plug-in, for checks: its fields and validators, without the plug-in's other imports."""
    file = folder_of(package) / f"{name}.py"
    return _light_config(file, package, name, file.stat().st_mtime_ns)


def realise(config: PluginConfig) -> Any:
    """The same values as the plug-in's real `Config`, whose `build` can be called; imports the plug-in."""
    if not config.type:
        return config
    module = _external(config.file) if config.file else importlib.import_module(f"{config.folder}.{config.type}")
    real = module.Config
    if isinstance(config, real):
        return config
    real.folder, real.file = config.folder, config.file
    return real.model_validate(config.model_dump())


def literal(file: Path, name: str) -> Any:
    """The value of a module-level constant written as plain literals, or None; nothing is executed."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]  # both kinds of assignment have it
    return None


def _names_file(name: str, file: Path) -> bool:
    parts = name.split(".")
    return tuple(parts) == file.resolve().with_suffix("").parts[-len(parts) :]


def _external(file: Path) -> ModuleType:
    name = f"fluxsmith_plugin_{file.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(file):
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError("this is not a Python file", where=str(file), fix="give --plugin a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@lru_cache(maxsize=256)
def _light_config(file: Path, package: str, name: str, changed: int) -> type[PluginConfig]:
    """Executes what `Config` needs; when that is not light, imports the module. `changed` renews the entry of an edited file."""
    outside = file.parent != folder_of(package)
    module = f"{package}.{name}"
    light = _execute_light(
        file, module, f"{package.rpartition('.')[2]} {name.rpartition('.')[2]}".title().replace(" ", "").replace("_", "")
    )
    if light is None:
        light = (_external(file) if outside else importlib.import_module(module)).Config
    light.folder, light.file = package, file if outside else None
    return light


def _execute_light(file: Path, module: str, title: str) -> type[PluginConfig] | None:
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    names: dict[str, Any] = {"__name__": module, "__file__": str(file), "__doc__": ast.get_docstring(tree)}
    names |= {"__annotated__": Annotated, "__field__": Field}
    known = set(names) | set(dir(__builtins__) if isinstance(__builtins__, ModuleType) else __builtins__)
    chosen: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and _is_light_import(node):
            chosen.append(node)
            known |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.ClassDef) and _needed(_without_annotations(node)) <= known:
            chosen.append(node)
            known |= _defined(node)
    config = next((node for node in chosen if isinstance(node, ast.ClassDef) and node.name == "Config"), None)
    if config is None:
        return None
    config.name = title  # every plug-in's class is called Config; the schema needs names that differ
    for node in chosen:
        _describe_fields(node)
    program = compile(ast.Module(chosen, []), str(file), "exec", dont_inherit=True)
    exec(program, names)  # noqa: S102  our own file, or one named by --plugin; only the statements chosen above
    return names[title]


def _is_light_import(node: ast.Import | ast.ImportFrom) -> bool:
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return all(any(module == light or module.startswith(f"{light}.") for light in LIGHT_IMPORTS) for module in modules)


def _without_annotations(node: ast.stmt) -> ast.stmt:
    """Removes the types of plain methods: `build(self, groups: list[Tensor])` must not need torch."""
    for child in ast.walk(node):
        if isinstance(child, ast.FunctionDef) and not child.decorator_list:
            child.returns = None
            for argument in (*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs):
                argument.annotation = None
    return node


def _describe_fields(node: ast.stmt) -> None:
    """Moves the string under a field into its annotation: pydantic looks for the strings in imported modules only."""
    body = node.body if isinstance(node, ast.ClassDef) else []
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            described = ast.parse(
                f"__annotated__[None, __field__(description={inspect.cleandoc(str(text.value.value))!r})]", mode="eval"
            ).body
            described.slice.elts[0] = field.annotation  # type: ignore[attr-defined]  # a subscript with a tuple, as written above
            field.annotation = ast.fix_missing_locations(ast.copy_location(described, field.annotation))


def _needed(node: ast.AST) -> set[str]:
    """Names that a statement reads when it is executed; the bodies of functions run later."""
    if isinstance(node, ast.FunctionDef | ast.Lambda):
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        parts: list[ast.AST | None] = [*node.args.defaults, *node.args.kw_defaults, *[argument.annotation for argument in arguments]]
        if isinstance(node, ast.FunctionDef):
            parts += [*node.decorator_list, node.returns]
        return set().union(*[_needed(part) for part in parts if part is not None])
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Load) else set()
    found = set().union(*[_needed(child) for child in ast.iter_child_nodes(node)])
    if isinstance(node, ast.ClassDef):
        found -= set().union(*[_defined(child) for child in node.body])
    return found


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)}
