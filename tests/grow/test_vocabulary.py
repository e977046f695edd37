"""The pieces of new tokens under the old tokenizer, and a folder grown by them."""

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM

from hyperllama.data.tokenizer import Tokenizer, train_tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.files import read_json
from hyperllama.grow.folder import grow_folder
from hyperllama.grow.operators import Deepen, GrowVocabulary
from hyperllama.grow.vocabulary import token_pieces
from hyperllama.names import EMBEDDING
from tests.reference import random_model, read, shape, write

TEXT = "the cat sat on the mat and the dog sat on the cat because the mat was warm and the dog was cold\n" * 40


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(TEXT)
    train_tokenizer([folder / "text.txt"], folder / "old.model", 290)
    train_tokenizer([folder / "text.txt"], folder / "new.model", 310)
    return Tokenizer.load(folder / "old.model"), Tokenizer.load(folder / "new.model")


def test_pieces_spell_the_tokens(tokenizers):
    old, new = tokenizers
    pieces = token_pieces(old, new)
    assert len(pieces) == new.vocab_size
    longer = 0
    for i, (token, ids) in enumerate(zip(new.tokens(), pieces, strict=True)):
        if token in old.tokens():
            assert ids == (old.tokens().index(token),)
        else:
            longer += 1
            assert "".join(map(old.text_of, ids)) == new.text_of(i)
            assert len(ids) > 1
    assert longer == new.vocab_size - old.vocab_size
    assert any(token.startswith("\u2581") for token in new.tokens() if token not in old.tokens())


def byte_level(path, merges):
    vocabulary = {token: i for i, token in enumerate(["<s>", *"abc", "\u0120", *("".join(pair) for pair in merges)])}
    library = Library(models.BPE(vocabulary, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.save(str(path))
    return Tokenizer.load(path)


def test_pieces_of_a_tokenizer_json(tmp_path):
    old = byte_level(tmp_path / "old.json", [("a", "b")])
    new = byte_level(tmp_path / "new.json", [("a", "b"), ("\u0120", "c"), ("ab", "c")])
    assert token_pieces(old, new) == (*((i,) for i in range(6)), (4, 3), (5, 3))
    with pytest.raises(HyperLlamaError, match="lacks 2 tokens"):
        token_pieces(new, old)


def test_a_folder_grows_by_tokens_and_then_in_depth(tokenizers, tmp_path):
    old, new = tokenizers
    config = shape(vocab_size=384, unpadded_vocab_size=290)
    path = write(random_model(config, torch.float32), tmp_path / "small", tokenizer_from=old.path)
    pieces = token_pieces(old, new)
    result = grow_folder(path, tmp_path / "big", [GrowVocabulary(pieces), Deepen("identity")], tokenizer=new.path)
    assert result["verified"]["preserved"] and result["verified"]["claimed"]
    assert Tokenizer.load(tmp_path / "big").fingerprint == new.fingerprint
    growth = read_json(tmp_path / "big" / "hyperllama.json")["growth"]
    assert [step["method"] for step in growth] == ["vocabulary", "identity"]
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "big")
    table, i = theirs.model.embed_tokens.weight, next(i for i, ids in enumerate(pieces) if len(ids) == 2)
    small = read(path, torch.float32).arena.logical("weights")[EMBEDDING]
    assert torch.equal(table[i], small[list(pieces[i])].mean(0))
