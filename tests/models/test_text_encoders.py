"""Both encoders: the pooled vector of the first end of text, padding seen or hidden, file names, and tokens counted and cut."""

from pathlib import Path

import pytest
import tiny_run
import torch
from transformers import CLIPTextModel, T5EncoderModel

from fluxsmith.demo.tokenizer import EOS, vocabulary
from fluxsmith.errors import ModelFileError
from fluxsmith.models.linear import Linear
from fluxsmith.models.load import load_clip_l, load_t5xxl
from fluxsmith.models.text_encoders import ClipParams, ClipText, T5Params, T5Text, Tokenizers, load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizers(model: Path) -> Tokenizers:
    return Tokenizers(load_tokenizer(model / "tokenizer"), load_tokenizer(model / "tokenizer_2"), clip_length=77, t5_length=16)


@torch.no_grad()
@pytest.mark.ledger("KS-03")
def test_clip_pools_at_the_first_end_of_text(model: Path) -> None:
    clip, eos = load_clip_l(model / "clip_l.safetensors"), vocabulary()[EOS]
    ids = torch.tensor([[5, 6, eos, eos, eos], [5, 6, 7, 8, eos]])
    pooled = clip(ids)
    torch.testing.assert_close(pooled[0], clip.hidden_states(ids)[0, 2])
    torch.testing.assert_close(pooled[1], clip.hidden_states(ids)[1, 4])
    later = clip(torch.tensor([[5, 6, eos, 9, 9]]))
    torch.testing.assert_close(later[0], pooled[0], msg="what follows the end of text is not seen")


@torch.no_grad()
@pytest.mark.ledger("KS-03")
def test_clip_equals_transformers_own(model: Path) -> None:
    clip = load_clip_l(model / "clip_l.safetensors")
    plain = CLIPTextModel(clip.model.config).eval()
    plain.load_state_dict(clip.model.state_dict())
    ids = torch.randint(2, 40, (2, 7))
    torch.testing.assert_close(clip.hidden_states(ids), plain(input_ids=ids).last_hidden_state)
    assert all(isinstance(module, Linear) for module in clip.modules() if isinstance(module, torch.nn.Linear))


@torch.no_grad()
@pytest.mark.ledger("KS-04")
def test_t5_equals_transformers_own_and_the_mask_hides_padding(model: Path) -> None:
    t5 = load_t5xxl(model / "t5xxl.safetensors")
    plain = T5EncoderModel(t5.model.config).eval()
    plain.load_state_dict(t5.model.state_dict())
    ids = torch.randint(2, 40, (1, 9))
    torch.testing.assert_close(t5(ids), plain(input_ids=ids).last_hidden_state)
    mask = torch.tensor([[True] * 6 + [False] * 3])
    other = ids.clone()
    other[:, 6:] = 3
    torch.testing.assert_close(t5(ids, mask)[:, :6], t5(other, mask)[:, :6])
    assert not torch.allclose(t5(ids)[:, :6], t5(other)[:, :6])
    assert t5.model.encoder.embed_tokens.weight is t5.model.shared.weight


def test_sizes_that_cannot_be_read() -> None:
    with pytest.raises(ModelFileError, match="token_embedding"):
        ClipParams.from_shapes({})
    with pytest.raises(ModelFileError, match="T5"):
        T5Params.from_shapes({})
    shapes = {
        "text_model.embeddings.token_embedding.weight": (10, 48),
        "text_model.embeddings.position_embedding.weight": (77, 48),
        "text_model.encoder.layers.0.mlp.fc1.weight": (96, 48),
    }
    with pytest.raises(ModelFileError, match="num_attention_heads"):
        ClipParams.from_shapes(shapes)
    assert ClipParams.from_shapes(shapes, 3).eos == 9


def test_names_in_files_and_in_memory() -> None:
    assert ClipText.memory_key("text_model.encoder.layers.0.mlp.fc1.weight") == "encoder.layers.0.mlp.fc1.weight"
    assert T5Text.memory_key("encoder.embed_tokens.weight") == "shared.weight"
    assert T5Text.memory_key("encoder.final_layer_norm.weight") == "encoder.final_layer_norm.weight"


@pytest.mark.ledger("KS-27")
def test_prompts_are_padded_cut_and_counted(tokenizers: Tokenizers) -> None:
    ids = tokenizers(["a red circle", "a red circle " * 20])
    assert ids.clip.shape == (2, 24), "the tokenizer's own limit is below CLIP's 77"
    assert ids.t5.shape == (2, 16)
    assert ids.t5_mask.sum(dim=1).tolist() == [4, 16]
    counts = tokenizers.counts("a red circle " * 20)
    assert counts == {"clip_l": (61, 24), "t5xxl": (61, 16)}


def test_a_tokenizer_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelFileError, match="tokenizer"):
        load_tokenizer(tmp_path)
