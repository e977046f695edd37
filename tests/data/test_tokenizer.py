import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from hyperllama.data.tokenizer import Tokenizer, train_tokenizer
from hyperllama.errors import HyperLlamaError

SENTENCES = {
    "eng": "The old boat lay on the shore, and nobody knew who had left it there in 1987.",
    "est": "Vana paat lebas kaldal ja keegi ei teadnud, kes selle sinna jättis; õhtul sõudsime koju.",
    "fao": "Gamli báturin lá á strondini, og eingin visti, hvør hevði lagt hann har. Ærligt talað, ikki eg.",
    "fas": "قایق کهنه کنار ساحل بود و هیچ‌کس نمی‌دانست چه کسی آن را ۳۵ سال پیش آنجا گذاشته است؟",
    "isl": "Gamli báturinn lá í fjörunni og enginn vissi hver hafði skilið hann þar eftir; það var ég.",
    "swe": "Den gamla båten låg på stranden, och ingen visste vem som hade lämnat den där för 35 år sedan.",
}


def write_texts(folder: Path) -> list[Path]:
    files = []
    for language, sentence in SENTENCES.items():
        words = sentence.split(" ")
        generator = random.Random(language)
        lines = [" ".join(generator.sample(words, len(words))) for _ in range(40)]
        file = folder / language / "train.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("\n".join(json.dumps({"text": "\n".join(lines[i : i + 4])}) for i in range(0, 40, 4)))
        files.append(file)
    return files


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def trained(texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), 600)


def byte_level(folder: Path, eos: str = "</s>") -> Path:
    """A byte-level BPE of the tokenizers library, as Hugging Face folders hold it."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = byte_level
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", eos],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(SENTENCES.values(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    return folder


def assert_lossless(tokenizer: Tokenizer) -> None:
    texts = list(SENTENCES.values())
    texts += [
        f"{texts[0]}\n\n{texts[3]}\n",
        "  two  spaces   and\t\ttabs ",
        "\n",
        " ",
        "",
        "\r\n x",
        "a\u200cb می‌خواهم",
    ]
    texts += ["😀 👩‍👩‍👧 🏳️‍🌈", "e\u0301 é ﬁ ① ｶ ½", "\x00\x7f\ufeff\ufffd\u2028\u3000", "<s></s><unk><0x0A> 12345"]
    for seed in range(50):
        generator = random.Random(seed)
        alphabet = [chr(c) for c in generator.choices([*range(0xD800), *range(0xE000, 0x110000)], k=20) if c != 0x2581]
        texts.append("".join(generator.choices([*alphabet, *" \n\tabcæð0"], k=100)))
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids


def test_a_trained_tokenizer_is_lossless_and_adds_nothing(trained: Tokenizer) -> None:
    assert_lossless(trained)


def test_a_trained_tokenizer_has_unk_0_bos_1_eos_2_and_its_vocabulary_size(trained: Tokenizer) -> None:
    assert (trained.bos_id, trained.eos_id, trained.vocab_size) == (1, 2, 600)
    assert trained.decode([1, *trained.encode("a b"), 2]) == "a b"
    assert trained.fingerprint == hashlib.sha256(trained.path.read_bytes()).hexdigest()


def test_digits_are_split(trained: Tokenizer) -> None:
    assert len(trained.encode("1987")) == 4


def test_runs_of_spaces_become_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one:\n        two\n" * 500)
    tokenizer = train_tokenizer([tmp_path / "a.txt"], tmp_path / "t.model", 276)
    assert len(tokenizer.encode(" " * 8)) == 1


def test_training_again_gives_the_same_bytes_in_another_process(
    trained: Tokenizer, texts: list[Path], tmp_path: Path
) -> None:
    code = "import sys; from hyperllama.data.tokenizer import *; train_tokenizer(sys.argv[2:], sys.argv[1], 600)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "again.model", *texts], check=True)
    assert (tmp_path / "again.model").read_bytes() == trained.path.read_bytes()


def test_the_seed_decides_which_lines_are_sampled(texts: list[Path], tmp_path: Path) -> None:
    sampled = [
        train_tokenizer(texts, tmp_path / f"{i}.model", 500, seed=seed, bytes_per_language=1500).fingerprint
        for i, seed in enumerate((0, 0, 1))
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_languages_weigh_the_same_whatever_their_size(tmp_path: Path) -> None:
    def words(count: int, alphabet: str) -> list[str]:
        generator = random.Random(alphabet)
        return ["".join(generator.choices(alphabet, k=8)) for _ in range(count)]

    large, small = words(400, "abcdefgh"), words(20, "mnopqrst")
    for language, vocabulary, lines in (("eng", large, 400), ("fao", small, 2)):
        (tmp_path / language).mkdir()
        generator = random.Random(0)
        text = "\n".join(" ".join(generator.choices(vocabulary, k=20)) for _ in range(lines))
        (tmp_path / language / "a.txt").write_text(text)
    tokenizer = train_tokenizer([tmp_path], tmp_path / "t.model", 480)
    present = (tmp_path / "fao" / "a.txt").read_text().split()
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in present)  # 1 of 200 parts of the text by bytes


def test_long_lines_are_not_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(["filler"] * 10_000 + ["ultimate"] * 2000))
    tokenizer = train_tokenizer([tmp_path / "a.txt"], tmp_path / "t.model", 283)
    assert len(tokenizer.encode(" ultimate")) == 1


def test_vocabulary_limits_are_named_and_exact(texts: list[Path], tmp_path: Path) -> None:
    for vocab_size, word, step in ((100_000, "largest", 1), (100, "smallest", -1)):
        with pytest.raises(HyperLlamaError, match=f"the {word} possible is") as error:
            train_tokenizer(texts, tmp_path / "t.model", vocab_size)
        limit = int(str(error.value).split(f"the {word} possible is ")[1].split(",")[0])
        with pytest.raises(HyperLlamaError, match=f"the {word} possible is {limit}"):
            train_tokenizer(texts, tmp_path / "t.model", limit + step)
        assert train_tokenizer(texts, tmp_path / f"{word}.model", limit).vocab_size == limit
    assert not (tmp_path / "t.model").exists()


def test_an_existing_tokenizer_is_not_overwritten(trained: Tokenizer, texts: list[Path]) -> None:
    with pytest.raises(HyperLlamaError, match="already exists"):
        train_tokenizer(texts, trained.path, 600)


def test_training_reports_progress_over_both_passes(texts: list[Path], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    train_tokenizer(texts, tmp_path, 600, progress=lambda done, total: calls.append((done, total)))
    total = 2 * sum(file.stat().st_size for file in texts)
    assert calls == sorted(calls) and calls[-1] == (total, total)


def test_tokenizer_json_is_lossless_and_adds_nothing(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_level(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 400)
    assert_lossless(tokenizer)  # "</s>" in a text is not EOS


@pytest.mark.parametrize("eos", ["</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>"])
def test_eos_of_tokenizer_json_is_found_by_its_usual_names(tmp_path: Path, eos: str) -> None:
    assert Tokenizer.load(byte_level(tmp_path, eos)).eos_id == 1


def test_eos_of_tokenizer_json_is_what_its_config_says(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, "<end>")
    assert Tokenizer.load(folder).eos_id is None
    for named in ("<end>", {"content": "<end>", "special": True}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": named, "bos_token": None}))
        assert Tokenizer.load(folder).eos_id == 1
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<stop>"}))
    with pytest.raises(HyperLlamaError, match="eos_token is '<stop>'"):
        Tokenizer.load(folder)


def test_a_copy_is_the_same_tokenizer(trained: Tokenizer, tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "json", "<end>")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    for number, tokenizer in enumerate((trained, Tokenizer.load(folder))):
        tokenizer.copy_to(tmp_path / str(number))
        copy = Tokenizer.load(tmp_path / str(number))
        assert (copy.fingerprint, copy.eos_id) == (tokenizer.fingerprint, tokenizer.eos_id)
        assert copy.encode(SENTENCES["fas"]) == tokenizer.encode(SENTENCES["fas"])


def test_missing_and_damaged_tokenizers_are_errors(tmp_path: Path) -> None:
    (tmp_path / "text.model").write_text("no model")
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "text.json").write_text("[1]")
    for name, message in (
        ("none.model", "does not exist"),
        ("", "holds neither"),
        ("text.model", "is not a sentencepiece model"),
        ("empty.model", "is not a sentencepiece model"),
        ("text.json", "is not a tokenizer"),
    ):
        with pytest.raises(HyperLlamaError, match=message):
            Tokenizer.load(tmp_path / name)
    with pytest.raises(HyperLlamaError, match=r"must be a \.model"):
        (tmp_path / "a.txt").write_text("x")
        Tokenizer.load(tmp_path / "a.txt")


def test_decoding_an_id_outside_the_vocabulary_is_an_error(trained: Tokenizer) -> None:
    for wrong in (600, -1):
        with pytest.raises(HyperLlamaError, match=f"token id {wrong} is not in"):
            trained.decode([5, wrong])
    assert trained.decode([]) == ""
