"""The demo model's tokenizer: one word-level vocabulary for both text encoders, unknown words spelled in letters.

`write_tokenizers(folder)` writes `tokenizer/` and `tokenizer_2/`, which transformers' AutoTokenizer loads.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from fluxsmith.demo.scenes import BACKGROUNDS, BASE_SHAPES, COLORS, FILLERS, POSITIONS, RADII, STYLES

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTH = 24  # tokens of every text, padded
SPELLED_LETTERS = 6  # of an unknown word


def words() -> list[str]:
    """The words of the captions, and a few of natural prompts."""
    places = [part for position in POSITIONS for part in position.split()]
    known = ["a", *RADII, *COLORS, *BASE_SHAPES, "at", *places, "on", *BACKGROUNDS, *STYLES, "background", *FILLERS]
    return list(dict.fromkeys(known))


def vocabulary() -> dict[str, int]:
    """Token -> id: pad 0, eos 1, unk 2, words, letters (the article `a` and the letter share a token)."""
    return {token: number for number, token in enumerate(dict.fromkeys([PAD, EOS, UNK, *words(), *LETTERS]))}


def build() -> Tokenizer:
    """The tokenizer: lower-cased, accents and punctuation dropped, known words whole, others as up to six letters, eos at the end."""
    known = "|".join(sorted(words(), key=len, reverse=True))
    # A known word that stands alone; else a letter with fewer than six letters before it; else a run of foreign letters (unk).
    pieces = rf"(?<![a-z])(?:{known})(?![a-z])|(?<![a-z]{{{SPELLED_LETTERS}}})[a-z]|(?:(?![a-z])\p{{L}})+"
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, vocabulary()[EOS])])
    return tokenizer


def write_tokenizers(folder: Path) -> None:
    """Writes `tokenizer/` (CLIP's place) and `tokenizer_2/` (T5's place), equal but for their folder."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": LENGTH,
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,
    }
    for name in ("tokenizer", "tokenizer_2"):
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        build().save(str(target / "tokenizer.json"))
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
