"""A Qwen2.5-VL of a few thousand weights with its files: weights in the published layout, config.json, a byte-level tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.qwen_vl import QwenParams, QwenVL

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
HIDDEN, VOCAB = 32, 700


def params(prefill: int = 0) -> QwenParams:
    return QwenParams(VOCAB, HIDDEN, 48, 2, 2, 1, (2, 3, 3), 32, 40, 2, 2, (1,), prefill=prefill)


def random_qwen(prefill: int = 0, seed: int = 0) -> QwenVL:
    """Every weight drawn, so that everything does something."""
    net, generator = QwenVL(params(prefill)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * (0.3 if param.dim() > 1 else 1.0))
    return net.eval().requires_grad_(False)


def file_key(memory_key: str) -> str:
    return memory_key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write_qwen(folder: Path, *, prefill: int = 0, texts: Sequence[str] = ()) -> Path:
    """The model's folder; the tokenizer learns the words of `texts`."""
    folder.mkdir(parents=True, exist_ok=True)
    net = random_qwen(prefill)
    tensors = {file_key(key): value for key, value in net.state_dict().items()}
    save_weights(folder / "model.safetensors", {**tensors, "lm_head.weight": torch.zeros(VOCAB, HIDDEN)})
    p = net.params
    vision = {"num_heads": p.vision_heads, "fullatt_block_indexes": list(p.whole_layers)}
    rope = {"type": "mrope", "mrope_section": list(p.sections)}
    config = {
        "model_type": "qwen2_5_vl",
        "num_attention_heads": p.heads,
        "rope_scaling": rope,
        "rope_theta": p.theta,
        "rms_norm_eps": p.eps,
        "vision_config": vision,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, texts)
    return folder


def write_tokenizer(folder: Path, texts: Sequence[str] = ()) -> None:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB - 100, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(list(SPECIALS))
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": SPECIALS[0], "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
