"""Text to tokens and back: one face for sentencepiece and `tokenizers`, and training of a sentencepiece BPE."""

import io
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from hyperllama.data.text import Document, Progress, iter_documents, language_of, text_files
from hyperllama.errors import HyperLlamaError
from hyperllama.files import atomic_file, read_json, sha256_file

_CONFIG = "tokenizer_config.json"
_BOS_NAMES = ("<s>", "<|begin_of_text|>")
_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>")
_LINE_CHARACTERS = 4096  # longer lines are fed to the trainer in pieces: it drops what is over its limit


class Tokenizer:
    """A tokenizer file of either kind. Nothing adds BOS or EOS: who needs them writes them.

    Attributes: `path` (the file), `fingerprint` (hex SHA-256 of the file), `vocab_size` (largest id + 1),
    `bos_id`, `eos_id` (None where the tokenizer has none).
    """

    path: Path
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    _encode: Callable[[list[str]], list[list[int]]]
    _decode: Callable[[list[int]], str]
    _tokens: list[str | None]
    _space: str | None  # what tokens write for the space, where decoding one token alone would drop it

    @classmethod
    def load(cls, path: str | Path, threads: int | None = None) -> "Tokenizer":
        """Load `*.model` (sentencepiece), `*.json` (tokenizers), or a folder with tokenizer.model or tokenizer.json.

        A folder with both is read as sentencepiece. threads: of encode_batch, for sentencepiece (the tokenizers library reads
        TOKENIZERS_PARALLELISM); default: all cores. Raises HyperLlamaError when there is no such file or it is damaged.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
            if not found:
                raise HyperLlamaError(f"{path} holds neither tokenizer.model nor tokenizer.json")
            path = found[0]
        if not path.is_file():
            raise HyperLlamaError(f"tokenizer {path} does not exist")
        if path.suffix not in (".model", ".json"):
            raise HyperLlamaError(f"tokenizer {path} must be a .model (sentencepiece) or .json (tokenizers) file")
        self = cls()
        self.path = path
        self.fingerprint = sha256_file(path)
        if path.suffix == ".model":
            self._load_sentencepiece(threads)
        else:
            self._load_json()
        return self

    def _load_sentencepiece(self, threads: int | None) -> None:
        try:
            model: Any = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise HyperLlamaError(f"{self.path} is not a sentencepiece model: {error}") from None
        if model.get_piece_size() == 0:
            raise HyperLlamaError(f"{self.path} is not a sentencepiece model: it has no pieces")
        self.vocab_size = model.get_piece_size()
        self.bos_id, self.eos_id = (None if i < 0 else i for i in (model.bos_id(), model.eos_id()))
        self._tokens = [model.id_to_piece(i) for i in range(self.vocab_size)]
        self._space = "\u2581"
        self._encode = lambda texts: model.encode(texts, num_threads=threads or -1)
        self._decode = model.decode

    def _load_json(self) -> None:
        try:
            model = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exception
            raise HyperLlamaError(f"{self.path} is not a tokenizer of the tokenizers library: {error}") from None
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True  # text that spells "</s>" is text: no document can end itself early
        vocabulary = model.get_vocab(with_added_tokens=True)
        config = self.path.with_name(_CONFIG)
        settings = read_json(config) if config.is_file() else {}

        def find(key: str, names: tuple[str, ...]) -> int | None:
            named = settings.get(key)
            if named is None:
                return next((vocabulary[name] for name in names if name in vocabulary), None)
            token = named.get("content") if isinstance(named, dict) else named
            if token not in vocabulary:
                raise HyperLlamaError(f"{config}: {key} is {token!r}, which {self.path.name} does not contain")
            return vocabulary[token]

        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id, self.eos_id = find("bos_token", _BOS_NAMES), find("eos_token", _EOS_NAMES)
        self._tokens = [None] * self.vocab_size
        for token, i in vocabulary.items():
            self._tokens[i] = token
        self._space = None
        self._encode = lambda texts: [e.ids for e in model.encode_batch_fast(texts, add_special_tokens=False)]
        self._decode = lambda ids: model.decode(ids, skip_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without BOS and EOS; uses all cores, the result does not depend on how many."""
        return self._encode(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; BOS and EOS decode to nothing.

        For tokenizers made by `train_tokenizer`, decode(encode(s)) == s for every s without U+2581, which
        sentencepiece uses inside for the space. Raises HyperLlamaError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise HyperLlamaError(f"token id {wrong[0]} is not in {self.path}, which has {self.vocab_size} tokens")
        return self._decode(ids)

    def tokens(self) -> list[str | None]:
        """The tokens by id, as the file writes them; None for an id that is not used."""
        return self._tokens

    def text_of(self, i: int) -> str:
        """The text that token `i` stands for, a leading space included; empty for BOS and EOS."""
        text = self.decode([i])
        return (self._tokens[i] or "").replace(self._space, " ") if self._space and text else text

    def copy_to(self, folder: str | Path) -> None:
        """Write the tokenizer into `folder` as tokenizer.model, or tokenizer.json (with tokenizer_config.json)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        copies = {self.path: f"tokenizer{self.path.suffix}"}
        config = self.path.with_name(_CONFIG)
        if self.path.suffix == ".json" and config.is_file():
            copies[config] = _CONFIG
        for source, name in copies.items():
            with atomic_file(folder / name) as temporary:
                shutil.copyfile(source, temporary)


def train_tokenizer(
    texts: Iterable[str | Path],
    out: str | Path,
    vocab_size: int,
    *,
    seed: int = 0,
    character_coverage: float = 0.9995,
    bytes_per_language: int = 10_000_000,
    progress: Progress | None = None,
) -> Tokenizer:
    """Train a lossless sentencepiece BPE on `texts` and write it to `out` (a `.model` file, or a folder for one).

    Every language weighs the same: it is sampled, or repeated, to the bytes of the largest one, at most
    `bytes_per_language` (UTF-8). Documents without a known language count as one language per file.
    Ids: unk 0, bos 1, eos 2, then 256 bytes; digits are split; white space is kept as it is. The same texts, order,
    seed and sentencepiece version give the same bytes. Memory grows with languages x `bytes_per_language`.

    Raises HyperLlamaError when `out` exists, when a text is bad (see iter_documents), and when `vocab_size` is
    larger than the text supports or smaller than its characters need, naming the limit.
    """
    out = Path(out)
    out = out if out.suffix == ".model" else out / "tokenizer.model"
    if out.exists():
        raise HyperLlamaError(f"{out} already exists: name a new file, or remove this one first")
    files = text_files(texts)
    halves = [progress and (lambda done, total, half=half: progress(half * total + done, 2 * total)) for half in (0, 1)]
    sizes: dict[str, int] = {}
    for document in iter_documents(files, progress=halves[0]):
        group = _group(document)
        sizes[group] = sizes.get(group, 0) + document.num_bytes
    share = min(bytes_per_language, max(sizes.values()))
    copies = {group: share / size for group, size in sizes.items()}

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sample(iter_documents(files, progress=halves[1]), copies, seed),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _LINE_CHARACTERS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # the number is written into the model, so it must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise HyperLlamaError(_training_mistake(str(error), vocab_size)) from None
    with atomic_file(out) as temporary:
        temporary.write_bytes(model.getvalue())
    return Tokenizer.load(out)


def _group(document: Document) -> str:
    language = language_of(document)
    return str(document.path) if language == "und" else language


def _sample(documents: Iterable[Document], copies: dict[str, float], seed: int) -> Iterator[str]:
    """Yield the lines of the documents, each as often as its language's `copies`, rounded up or down by chance."""
    generator = random.Random(seed)
    for document in documents:
        wanted = copies[_group(document)]
        for line in document.text.split("\n"):
            for start in range(0, len(line), _LINE_CHARACTERS):
                for _ in range(int(wanted + generator.random())):
                    yield line[start : start + _LINE_CHARACTERS]


def _training_mistake(message: str, vocab_size: int) -> str:
    """A sentence for the user from sentencepiece's own, which names the limit."""
    if found := re.search(r"value <= (\d+)", message):
        return f"vocab_size {vocab_size} is too large for this text: the largest possible is {found[1]}"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small for this text's characters: the smallest possible is {found[1]}, "
            "or less with a lower character_coverage"
        )
    return f"sentencepiece could not train a tokenizer: {message}"
