"""Command lines read as argparse reads them, with every mistake found at once."""

import pytest

from fluxsmith.dialects.arguments import coerce, nearest, parse
from fluxsmith.dialects.base import Row
from fluxsmith.errors import ConfigError


def row(name: str, kind: str = "str", **more: object) -> Row:
    return Row(name, "group", kind, ("x",), "kept", "help", **more)  # type: ignore[arg-type]


ROWS = {
    made.name: made
    for made in (
        row("pretrained_model_name_or_path"),
        row("network_args", nargs="*"),
        row("network_alpha", "float"),
        row("seed", "int"),
        row("lowram", "flag"),
        row("warmup", "length"),
        row("loss", choices=("l1", "l2", "huber")),
        row("file", "positional"),
        row("show", "flag", short="-s"),
    )
}


def values(*words: str) -> dict[str, object]:
    given, problems = parse(ROWS, words, title="x")
    assert problems == []
    return {name: one.value for name, one in given.items()}


def test_forms_of_argparse() -> None:
    assert values("--seed=3", "--lowram", "--network_args", "a=1", "b=2", "--loss", "l1") == {
        "seed": 3,
        "lowram": True,
        "network_args": ["a=1", "b=2"],
        "loss": "l1",
    }


def test_abbreviations_and_the_last_of_several() -> None:
    assert values("--pretrained_model", "a", "--pretrained", "b", "--network_al=-1") == {
        "pretrained_model_name_or_path": "b",
        "network_alpha": -1.0,
    }


def test_positional_and_short_options() -> None:
    assert values("f.safetensors", "-s") == {"file": "f.safetensors", "show": True}


def test_lists_may_be_empty() -> None:
    assert values("--network_args", "--lowram") == {"network_args": [], "lowram": True}


@pytest.mark.parametrize("words", [("--network", "1"), ("--seed",), ("--lowram=1",)])
def test_what_argparse_stops_at(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        parse(ROWS, words, title="x")


def test_all_mistakes_at_once_with_the_nearest_name() -> None:
    _, problems = parse(ROWS, ["--sed", "3", "--loss", "l3", "--network_alpha", "big", "--learn-rate", "1"], title="x")
    texts = [str(problem) for problem in problems]
    assert len(texts) == 4
    assert "--sed is not an option. Fix: write --seed" in texts[0]
    assert "leave it out" in texts[1]
    assert any("--loss has no choice 'l3'. Fix: choose one of l1, l2, huber" in text for text in texts)
    assert any("--network_alpha = 'big' is not a number" in text for text in texts)


def test_a_value_without_its_option() -> None:
    _, problems = parse(ROWS, ["a", "b"], title="x")
    assert "'b' belongs to no option" in str(problems[0])


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [("length", "10%", 0.1), ("length", "100", 100), ("length", 0.05, 0.05), ("int", 3.0, 3), ("float", "1e-4", 1e-4), ("str", 5, "5")],
)
def test_values(kind: str, given: object, expected: object) -> None:
    assert coerce(row("a", kind), given, "here") == (expected, None)


@pytest.mark.parametrize(
    ("kind", "given"),
    [("length", "-1"), ("length", "100%"), ("int", "1.5"), ("int", True), ("float", True), ("flag", "yes"), ("str", ["a"]), ("str", True)],
)
def test_values_that_do_not_fit(kind: str, given: object) -> None:
    value, problem = coerce(row("a", kind), given, "here")
    assert value is None
    assert problem is not None
    assert problem.where == "here"
    assert problem.fix


def test_nearest_name_ignores_case_and_dashes() -> None:
    assert nearest("Learning-Rate", ["learning_rate"]) == "learning_rate"
    assert nearest("xyz", ["learning_rate"]) == ""
