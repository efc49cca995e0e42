"""Optimizers and schedules by name, and their arguments."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.ledger("KS-09")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", ("torch", "adamw", 0.01)),
        ("AdamW", ("torch", "adamw", 0.01)),
        ("adamw8bit", ("bnb", "adamw8bit", 0.01)),
        ("PagedAdamW", ("bnb", "paged_adamw", 0.01)),
        ("PagedAdamW8bit", ("bnb", "paged_adamw8bit", 0.01)),
        ("PagedAdamW32bit", ("bnb", "paged_adamw32bit", 0.01)),
        ("Lion", ("lion", None, 0.0)),
        ("Lion8bit", ("bnb", "lion8bit", 0.0)),
        ("PagedLion8bit", ("bnb", "paged_lion8bit", 0.0)),
        ("SGDNesterov", ("torch", "sgd", 0.0)),
        ("SGDNesterov8bit", ("bnb", "sgd8bit", 0.0)),
        ("DAdaptation", ("dadapt", "adam_preprint", 0.0)),
        ("DAdaptAdaGrad", ("dadapt", "adagrad", 0.0)),
        ("DAdaptAdam", ("dadapt", "adam", 0.0)),
        ("DAdaptAdan", ("dadapt", "adan", 0.02)),
        ("DAdaptAdanIP", ("dadapt", "adan_ip", 0.02)),
        ("DAdaptLion", ("dadapt", "lion", 0.0)),
        ("DAdaptSGD", ("dadapt", "sgd", 0.0)),
        ("Prodigy", ("prodigy", None, 0.0)),
        ("AdaFactor", ("adafactor", None, 0.0)),
        ("RAdamScheduleFree", ("schedulefree", "radam", 0.0)),
        ("AdamWScheduleFree", ("schedulefree", "adamw", 0.0)),
        ("SGDScheduleFree", ("schedulefree", "sgd", 0.0)),
        ("RMSprop", ("torch", "rmsprop", 0.0)),
        ("torch.optim.NAdam", ("torch", "nadam", 0.0)),
        ("bitsandbytes.optim.AdEMAMix8bit", ("bnb", "ademamix8bit", 0.01)),
        ("prodigyplus.ProdigyPlusScheduleFree", ("imported", None, 0.0)),
    ],
)
def test_names(command: Callable, name: str, expected: tuple) -> None:
    made = command("--optimizer_type", name).tree["optim"]
    assert (made["type"], made.get("name"), made["weight_decay"]) == expected
    assert made["lr"] == 2e-6


@pytest.mark.ledger("KS-09")
def test_arguments(command: Callable) -> None:
    made = command(
        "--optimizer_type", "AdamW8bit", "--optimizer_args", "weight_decay=0.1", "betas=(0.9,0.99)", "is_paged=True", "name='x'"
    ).tree["optim"]
    assert made["weight_decay"] == 0.1
    assert made["options"] == {"betas": [0.9, 0.99], "is_paged": True, "name": "x"}
    nesterov = command("--optimizer_type", "SGDNesterov8bit", "--optimizer_args", "momentum=0.8").tree["optim"]
    assert nesterov["options"] == {"nesterov": True, "momentum": 0.8}


@pytest.mark.ledger("KS-09")
def test_the_adafactor_recipe(command: Callable) -> None:
    words = "--optimizer_type adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False --learning_rate 1e-4"
    words += " --lr_scheduler constant_with_warmup --lr_warmup_steps 10 --max_grad_norm 0.0"
    made = command(*words.split())
    assert made.tree["optim"] == {
        "type": "adafactor",
        "lr": 1e-4,
        "weight_decay": 0.0,
        "options": {"relative_step": False, "scale_parameter": False, "warmup_init": False},
    }
    assert made.tree["schedule"] == {"name": "constant", "warmup": 10, "warmup_from": "zero"}
    assert made.tree["train"]["max_grad_norm"] == 0.0


def test_adafactor_with_its_own_rate(command: Callable) -> None:
    made = command("--optimizer_type", "adafactor", "--unet_lr", "1e-3", "--lr_scheduler", "cosine")
    assert made.tree["optim"]["options"]["relative_step"] is True
    assert "dit_lr" not in made.tree["adapter"]
    assert made.tree["schedule"] == {"name": "constant"}
    assert "makes its own rate" in made.noted


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optimizer_type", "AdamW9bit"], "write adamw8bit"),
        (["--optimizer_type", "Foo"], "choose one of"),
        (["--optimizer_args", "betas"], "write it as key=value"),
        (["--optimizer_args", "relative_step=false"], "write relative_step=False"),
        (["--optimizer_args", "mode=fast"], "text needs quotes"),
        (["--use_8bit_adam", "--optimizer_type", "Lion"], "drop --use_8bit_adam"),
        (["--learning_rate", "0"], "give a rate above 0"),
        (["--lr_scheduler", "cosin"], "write cosine"),
        (["--lr_scheduler", "reduce_lr_on_plateau"], "there is no schedule"),
        (["--lr_scheduler", "constant", "--lr_warmup_steps", "10"], "constant_with_warmup"),
        (["--lr_scheduler", "cosine_with_min_lr"], "--lr_scheduler_min_lr_ratio 0.1"),
        (["--lr_scheduler", "piecewise_constant"], "step_rules"),
        (["--lr_scheduler", "warmup_stable_decay"], "--lr_decay_steps 10%"),
        (["--lr_scheduler", "adafactor:1e-4"], "--optimizer_type adafactor"),
        (["--lr_scheduler", "cosine", "--lr_scheduler_args", "foo=1"], "cosine has no argument foo"),
        (["--lr_scheduler_type", "StepLR", "--lr_warmup_steps", "5"], "StepLR has no warm-up"),
    ],
)
def test_mistakes(command: Callable, words: list[str], says: str) -> None:
    assert says in command(*words).refused


def test_code_is_named_on_the_command_line_only(command: Callable, work: Path) -> None:
    (work / "c.toml").write_text('optimizer_type = "my.Optimizer"\nlr_scheduler_type = "my.Schedule"\n')
    refused = command("--config_file", "c.toml").refused
    assert "give it on the command line: --optimizer_type my.Optimizer" in refused
    assert "give it on the command line: --lr_scheduler_type my.Schedule" in refused
    assert command("--optimizer_type", "my.Optimizer").tree["optim"]["class"] == "my.Optimizer"


@pytest.mark.ledger("KS-10")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("linear --lr_warmup_steps 0.1", {"name": "linear", "warmup": 0.1, "warmup_from": "zero"}),
        ("cosine --lr_warmup_steps 5%", {"name": "cosine", "warmup": 0.05, "warmup_from": "zero"}),
        ("cosine_with_restarts --lr_scheduler_num_cycles 3", {"name": "cosine_restarts", "cycles": 3.0}),
        ("polynomial --lr_scheduler_power 2 --learning_rate 1e-4", {"name": "polynomial", "power": 2.0, "min_ratio": 1e-3}),
        ("inverse_sqrt --lr_scheduler_timescale 50", {"name": "inverse_sqrt", "timescale": 50}),
        ("cosine_with_min_lr --lr_scheduler_min_lr_ratio 0.1", {"name": "cosine", "min_ratio": 0.1, "cycles": 1.0}),
        (
            "warmup_stable_decay --lr_decay_steps 20% --lr_scheduler_min_lr_ratio 0.1",
            {"name": "warmup_stable_decay", "decay": 0.2, "min_ratio": 0.1, "cycles": 1.0, "decay_shape": "cosine"},
        ),
        ("piecewise_constant --lr_scheduler_args step_rules='1:10,0.1'", {"name": "piecewise_constant", "rules": "1:10,0.1"}),
    ],
)
def test_schedules(command: Callable, words: str, expected: dict) -> None:
    made = command("--lr_scheduler", *words.split()).tree["schedule"]
    assert {key: pytest.approx(value) if isinstance(value, float) else value for key, value in expected.items()} == made


def test_schedule_free_needs_no_schedule(command: Callable) -> None:
    made = command("--optimizer_type", "AdamWScheduleFree", "--lr_scheduler", "cosine")
    assert made.tree["schedule"] == {"name": "constant"}
    assert "cosine is not used" in made.noted


def test_advice_for_optimizers_that_find_their_rate(command: Callable) -> None:
    assert "--learning_rate 1.0 is advised" in command("--optimizer_type", "Prodigy", "--learning_rate", "1e-4").noted
    assert "is advised, not" not in command("--optimizer_type", "Prodigy", "--learning_rate", "1").noted
