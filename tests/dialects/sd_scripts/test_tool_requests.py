"""Arguments of the adapter tools as requests."""

import pytest

from fluxsmith.dialects.sd_scripts.options import read_options
from fluxsmith.dialects.sd_scripts.scripts import split_command
from fluxsmith.dialects.sd_scripts.tool_requests import (
    CheckRequest,
    ConvertRequest,
    ExtractRequest,
    MergeRequest,
    Request,
    ResizeRequest,
    tool_request,
)
from fluxsmith.errors import ConfigError


def request(line: str) -> Request:
    script, rest, _ = split_command(line.split())
    return tool_request(read_options(script, rest))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "networks/flux_extract_lora.py --model_org a --model_tuned b --save_to c --dim 8 --save_precision bf16 --device cuda",
            ExtractRequest("a", "b", "c", 8, 0.99, "bf16", "cuda", has_metadata=True),
        ),
        (
            "networks/flux_merge_lora.py --flux_model m --clip_l c --save_to o --clip_l_save_to p --models a b --ratios 0.5 1 --concat",
            MergeRequest(
                {"dit": "m", "clip_l": "c"},
                {"dit": "o", "clip_l": "p"},
                (("a", 0.5), ("b", 1.0)),
                "fp32",
                "cpu",
                keeps_ranks=False,
                has_metadata=True,
            ),
        ),
        (
            "flux_merge_lora --save_to o --models a b --ratios 0.5 1 --concat --save_precision fp8 --no_metadata",
            MergeRequest({}, {"dit": "o"}, (("a", 0.5), ("b", 1.0)), "fp8", "cpu", keeps_ranks=True, has_metadata=False),
        ),
        ("convert_flux_lora --src_path a --dst_path b", ConvertRequest("a", "b", "ai_toolkit", "kohya")),
        ("convert_flux_lora --src sd-scripts --dst ai-toolkit --src_path a --dst_path b", ConvertRequest("a", "b", "kohya", "ai_toolkit")),
        (
            "resize_lora --model a --save_to b.safetensors --new_rank 8 --dynamic_method sv_fro --dynamic_param 0.9 --verbose",
            ResizeRequest("a", "b.safetensors", 8, "energy", 0.9, None, "cpu", is_verbose=True),
        ),
        ("check_lora_weights f.safetensors -s", CheckRequest("f.safetensors", shows_all=True)),
    ],
)
def test_requests(line: str, expected: Request) -> None:
    assert request(line) == expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("flux_extract_lora --model_org a", "add --model_tuned.*add --save_to"),
        ("flux_merge_lora --flux_model m --models a --ratios 1 2", "give one ratio.*add --save_to"),
        ("flux_merge_lora --save_to a", "add --models"),
        ("flux_merge_lora --save_to a --models b --ratios 1 --save_precision fp8_e5m2", "write fp8_e4m3fn"),
        ("convert_flux_lora --src sd-scripts --src_path a --dst_path b", "give --dst the other one"),
        ("resize_lora --model a --save_to b.pt --dynamic_method sv_ratio", "ends in .safetensors.*give both"),
        ("resize_lora --model a --save_to b.safetensors --dynamic_method sv_ratio --dynamic_param 1", "give 2 or more"),
        ("resize_lora --model a --save_to b.safetensors --dynamic_method sv_fro --dynamic_param 2", "a share above 0"),
        ("check_lora_weights", "add file"),
        ("resize_lora --modle a", "write --model"),
    ],
)
def test_mistakes(line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        request(line)
