"""What a run says about itself in the metadata of its weights: settings, counts, captions (facts for io/metadata.py)."""

import hashlib
import time
from collections.abc import Mapping
from typing import Any

from fluxsmith.config.schema import as_plain
from fluxsmith.io.metadata import ModelSpec, TrainingFacts
from fluxsmith.optim.schedules import span
from fluxsmith.train.dataset_facts import caption_options, dataset_entries, tags
from fluxsmith.train.precision import resolved
from fluxsmith.train.setup import Parts, family

MODULES = {"lora": "networks.lora_flux", "oft": "networks.oft_flux"}  # adapter -> the module that sd-scripts has for it


def training_facts(parts: Parts, step: int, name: str) -> TrainingFacts:
    """The ss_* block of this step's file. The session id follows from run, data and seed, so a resumed run keeps it."""
    config, train = parts.config, parts.config.train
    adapter = config.adapter.model_dump() if config.adapter is not None else {}
    chosen = config.adapter.model_dump(mode="json", exclude_defaults=True) if config.adapter is not None else {}
    optim = config.optim.model_dump(mode="json")
    session = hashlib.sha256(f"{config.run.dir.name}|{parts.data.digest}|{train.seed}".encode()).hexdigest()
    return TrainingFacts(
        output_name=name,
        base_model_version="chroma" if family(config).name == "chroma" else "flux1",
        session_id=str(int(session[:8], 16)),
        started_at=parts.started_at,
        finished_at=time.time(),
        adapter_args={key: value for key, value in chosen.items() if key not in ("type", "rank", "alpha", "init_from")},
        rank=adapter.get("rank", "Dynamic"),
        alpha=adapter.get("alpha") or adapter.get("rank", "Dynamic"),
        dropout=adapter.get("dropout") or None,
        learning_rate=optim.get("lr"),
        dit_lr=adapter.get("dit_lr"),
        text_encoder_lr=[lr for lr in (adapter.get("clip_l_lr"), adapter.get("t5xxl_lr")) if lr is not None] or None,
        optimizer=f"{optim['type']}.{optim.get('name', optim['type'])}({_arguments(optim)})",
        lr_scheduler=config.schedule.name,
        lr_warmup_steps=span(config.schedule.warmup, parts.total_steps),
        max_grad_norm=train.max_grad_norm,
        comment=config.checkpoint.comment,
        adapter_module=MODULES.get(str(adapter.get("type")), "lycoris.kohya"),
        num_train_images=parts.data.uses_per_epoch,
        num_validation_images=sum(len(spec.uses) for spec in parts.data.validation_batches()),
        num_batches_per_epoch=parts.plan.per_epoch,
        num_epochs=-(-parts.total_steps * parts.plan.per_step // parts.plan.per_epoch),
        epoch=parts.plan.epoch_of(max(0, step - 1)) + 1,
        max_train_steps=parts.total_steps,
        steps=step,
        accumulation=parts.plan.per_step,
        mixed_precision=resolved(train.precision, parts.world.device),
        seed=train.seed,
        dit_file=parts.files.path("dit"),
        ae_file=parts.files.path("ae"),
        num_reg_images=sum(len(one.items) for one in parts.data.sets if one.config.regularisation),
        datasets=dataset_entries(parts.data.sets),
        tag_frequency={one.name: tags(one) for one in parts.data.sets},
        dataset_dirs={one.name: {"n_repeats": one.config.repeats, "img_count": len(one.items)} for one in parts.data.sets},
        options=_options(parts),
    )


def model_spec(parts: Parts, adapter: str = "lora") -> ModelSpec:
    """The modelspec block."""
    settings, sets, noise = parts.config.checkpoint, parts.data.sets, parts.config.noise
    side = sets[0].config.resolution
    levels = (round(1000 * noise.min_sigma), round(1000 * noise.max_sigma))
    return ModelSpec(
        title=settings.title or parts.config.run.name or parts.config.run.dir.name,
        variant=family(parts.config).variant,
        adapter=adapter,
        resolution=side if isinstance(side, tuple) else (side, side),
        date=parts.started_at,
        author=settings.author,
        license=settings.license,
        trigger_phrase=settings.trigger_phrase,
        timestep_range=levels if levels != (0, 1000) else None,
        extra=settings.modelspec,
    )


def _arguments(optim: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in optim.items() if key not in ("type", "name", "lr") and value not in ({}, None))


def _options(parts: Parts) -> dict[str, Any]:
    """ss_ values that come straight from the config."""
    noise, train, plain = parts.config.noise, parts.config.train, as_plain(parts.config)
    adapter, quant, validation = plain["adapter"] or {}, plain["quant"] or {}, parts.config.validation
    is_fp8 = quant.get("type") == "fp8"
    return {
        "guidance_scale": plain["noise"]["guidance"],
        "timestep_sampling": noise.sampling,
        "sigmoid_scale": noise.sigmoid_scale,
        "discrete_flow_shift": noise.shift,
        "model_prediction_type": noise.prediction,
        "weighting_scheme": "uniform" if noise.weighting == "none" else noise.weighting,
        "logit_mean": noise.logit_mean,
        "logit_std": noise.logit_std,
        "mode_scale": noise.mode_scale,
        "ip_noise_gamma": noise.input_noise or None,
        "ip_noise_gamma_random_strength": noise.input_noise_random,
        "apply_t5_attn_mask": parts.models.mask_text,
        "gradient_checkpointing": parts.config.memory.checkpointing,
        "fp8_base": is_fp8,
        "fp8_base_unet": is_fp8 and not quant.get("text_encoders"),
        "model_type": "chroma" if family(parts.config).name == "chroma" else "flux",
        "cache_latents": parts.config.cache.latents != "off",
        "full_bf16": train.weights_dtype == "bf16",
        "full_fp16": train.weights_dtype == "fp16",
        "scale_weight_norms": adapter.get("max_norm"),
        **(validation_options(parts) if validation.every or validation.every_epochs else {}),
        **loss_options(plain["objective"]),
        **caption_options(parts.data.sets),
        **parts.config.checkpoint.ss,
    }


def validation_options(parts: Parts) -> dict[str, Any]:
    """What is held out and measured; the share is that of the run, or the only one a dataset has of its own."""
    validation = parts.config.validation
    shares = {one.config.validation_share for one in parts.data.sets} - {None}
    return {
        "validation_split": shares.pop() if len(shares) == 1 and not validation.share else validation.share,
        "validation_seed": validation.seed,
        "max_validation_steps": validation.max_batches,
        "validate_every_n_steps": validation.every or None,
        "validate_every_n_epochs": validation.every_epochs or None,
    }


def loss_options(objective: Mapping[str, Any]) -> dict[str, Any]:
    """How a difference became a loss; thresholds where there are any."""
    loss = objective.get("loss", "l2")
    names = ("huber_schedule", "huber_c", "huber_scale") if loss in ("huber", "smooth_l1") else ()
    return {"loss_type": loss, **{name: objective[name] for name in names}}
