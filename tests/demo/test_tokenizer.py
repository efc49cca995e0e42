"""The demo tokenizer: words whole, unknown words as letters, loadable by transformers."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fluxsmith.demo.tokenizer import EOS, LENGTH, build, vocabulary, words, write_tokenizers


def test_vocabulary() -> None:
    known = vocabulary()
    assert [known["<pad>"], known["</s>"], known["<unk>"]] == [0, 1, 2]
    assert sorted(known.values()) == list(range(len(known)))
    assert 40 <= len(words()) <= 48
    assert "heart" not in known


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a large red circle", ["a", "large", "red", "circle"]),
        ("A Large, RED circle!", ["a", "large", "red", "circle"]),
        ("zibbo", ["z", "i", "b", "b", "o"]),
        ("extraordinary red", ["e", "x", "t", "r", "a", "o", "red"]),
        ("redder", ["r", "e", "d", "d", "e", "r"]),
        ("café", ["c", "a", "f", "e"]),
        ("красный red", ["<unk>", "red"]),
        ("", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert build().encode(text).tokens == [*tokens, EOS]


def test_transformers_loads_both_folders(tmp_path: Path) -> None:
    write_tokenizers(tmp_path)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / name), local_files_only=True)
        assert (tokenizer.model_max_length, tokenizer.pad_token_id, tokenizer.eos_token_id) == (LENGTH, 0, 1)
        encoded = tokenizer(["a red star", "a " * 40], padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
        assert [len(ids) for ids in encoded] == [LENGTH, LENGTH]
        assert encoded[0][3:6] == [1, 0, 0]
        assert encoded[1][-1] == 1
