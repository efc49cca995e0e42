"""Names of other systems: each is a section that loads, or an error with the nearest kind."""

import pytest

from fluxsmith.config.choice import Choice, config_class
from fluxsmith.errors import ConfigError
from fluxsmith.quant.names import SYSTEMS, Named, named, options_of, with_encoders

ALL = [(system, name) for system, table in SYSTEMS.items() for name in table]


@pytest.mark.ledger("ST-05")
@pytest.mark.ledger("KS-20")
@pytest.mark.ledger("DS-07")
@pytest.mark.parametrize(("system", "name"), ALL)
def test_every_name_is_a_section_or_an_error_with_the_nearest(system: str, name: str) -> None:
    if not isinstance(SYSTEMS[system][name], Named):
        with pytest.raises(ConfigError, match="comes nearest"):
            named(name, system)
        return
    options = options_of(name, system)
    if options is not None:
        config = Choice("fluxsmith.quant").config_class(options["type"]).model_validate(options)
        assert config.model_dump(exclude_unset=True) == options


def test_the_promised_names() -> None:
    kinds = {name: (options_of(name, "simpletuner") or {}).get("type") for name in SYSTEMS["simpletuner"] if "sdnq" not in name}
    promised = ("int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb", "int8-torchao", "fp8-torchao", "no_change")
    assert [kinds[name] for name in promised] == ["int8", "int4", "int2", "fp8", "nf4", "int8", "fp8", None]


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ConfigError, match="write int8-quanto"):
        named("int8-quant", "simpletuner")


def test_text_encoders_apart() -> None:
    assert with_encoders("no_change", {"clip_l": "no_change"}, "simpletuner") is None
    both = with_encoders("int8-quanto", {"clip_l": "no_change", "t5xxl": "int4-quanto"}, "simpletuner")
    assert both == {"type": "int8", "compute": "weight_only", "text_encoders": {"t5xxl": "int4"}}
    only = with_encoders("no_change", {"t5xxl": "nf4-bnb"}, "simpletuner")
    assert only is not None
    config = config_class("fluxsmith.quant", "none").model_validate(only)
    assert config.kind_of_encoder("t5xxl") == "nf4"
    assert config.kind_of_encoder("clip_l") is None


def test_a_wrong_pattern_is_named() -> None:
    with pytest.raises(ValueError, match="is no regular expression"):
        config_class("fluxsmith.quant", "int8").model_validate({"type": "int8", "exclude": ["("]})
