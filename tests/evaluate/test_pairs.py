"""Minimal pairs: log-probabilities of whole sentences, ties count one half, bad files are named."""

import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate import evaluate_pairs, load_folder
from hyperllama.evaluate.pairs import Pair, read_pairs, score_pairs, up_to_the_difference
from hyperllama.evaluate.statistics import wilson
from tests.evaluate.conftest import WORDS, log_probability, sentence


def write(file: Path, pairs: list[tuple[str, str, str]]) -> Path:
    file.write_text("\n".join(json.dumps(dict(zip(Pair._fields, pair, strict=True))) for pair in pairs))
    return file


def test_accuracy_equals_that_of_transformers(make_folder, tokenizer, tmp_path):
    folder = make_folder()
    theirs = LlamaForCausalLM.from_pretrained(folder)
    pairs = [(sentence(2 * i, 1 + i % 4), sentence(2 * i + 1, 1 + i % 3), f"kind {i % 3}") for i in range(60)]
    right: dict[str, list[bool]] = {}
    for good, bad, kind in pairs:
        sums = [log_probability(theirs, [tokenizer.eos_id, *tokenizer.encode(s)]) for s in (good, bad)]
        right.setdefault(kind, []).append(sums[0] > sums[1])
    got = evaluate_pairs(*load_folder(folder), write(tmp_path / "pairs.jsonl", pairs))
    assert got["pairs"] == 60
    assert got["accuracy"] == sum(map(sum, right.values())) / 60
    assert 0 < got["accuracy"] < 1
    assert got["by_phenomenon"] == {
        kind: {
            "pairs": len(points),
            "accuracy": sum(points) / len(points),
            "interval": list(wilson(sum(points), len(points))),
        }
        for kind, points in sorted(right.items())
    }


def test_by_length_and_by_word_are_those_sums_of_transformers(make_folder, tokenizer, tmp_path):
    folder = make_folder()
    theirs = LlamaForCausalLM.from_pretrained(folder)
    frames = [
        (sentence(2 * i, 1 + i % 3), sentence(2 * i + 1, 2), WORDS[i], WORDS[i + 7 : i + 8 + i % 2]) for i in range(20)
    ]
    frames = [frame for frame in frames if frame[2] not in frame[3]]
    pairs = [(f"{a} {word} {b}", f"{a} {' '.join(other)} {b}", "kind") for a, b, word, other in frames]
    cut = [(f"{a} {word}", f"{a} {' '.join(other)}") for a, _, word, other in frames]  # what follows does not count

    def log_p(text: str) -> float:
        return log_probability(theirs, [tokenizer.eos_id, *tokenizer.encode(text)])

    file = write(tmp_path / "pairs.jsonl", pairs)
    model, _ = load_folder(folder)
    got = {by: score_pairs(model, tokenizer, file, by=by).points.tolist() for by in ("sentence", "word", "length")}
    assert got["sentence"] == [log_p(good) > log_p(bad) for good, bad, _ in pairs]
    assert got["word"] == [log_p(good) > log_p(bad) for good, bad in cut]
    assert got["length"] == [log_p(good) / len(good) > log_p(bad) / len(bad) for good, bad, _ in pairs]
    assert len({tuple(points) for points in got.values()}) > 1
    with pytest.raises(HyperLlamaError, match="not by 'token'"):
        score_pairs(model, tokenizer, file, by="token")


@pytest.mark.parametrize(
    ("good", "bad", "cut"),
    [
        ("the cats sit down", "the cats sits down", ("the cats sit", "the cats sits")),
        ("She sits.", "They sits.", ("She", "They")),
        ("in the house now", "house in the now", ("in the house", "house in the")),
        ("a b c d", "a c d", ("a b c", "a c")),  # one lacks a word: the next one is compared too
        ("a b", "a b c", ("a b", "a b c")),
        ("c  d", "b c d", ("c", "b c")),
        ("a b", "a  b", ("a b", "a  b")),
    ],
)
def test_sentences_are_cut_after_the_words_that_differ(good, bad, cut):
    assert up_to_the_difference(good, bad) == cut
    assert up_to_the_difference(bad, good) == cut[::-1]


def test_no_end_token_is_scored_so_the_beginning_of_a_sentence_is_never_less_likely(make_folder, tmp_path):
    pairs = [(sentence(i, 1), sentence(i, 1) + " " + sentence(i + 1, 2), "prefix") for i in range(20)]
    assert evaluate_pairs(*load_folder(make_folder()), write(tmp_path / "pairs.jsonl", pairs))["accuracy"] == 1


def test_a_tie_counts_one_half(make_folder, tokenizer, tmp_path):
    model, _ = load_folder(make_folder(tie_embeddings=False))
    model.arena.logical("weights")["lm_head.weight"].zero_()  # every token is as likely as any other
    same_length = [s for s in (sentence(i, 3) for i in range(40)) if len(tokenizer.encode(s)) == 3]
    assert len(same_length) > 2
    pairs = [(same_length[0], other, "tie") for other in same_length[1:] if other != same_length[0]]
    pairs += [("the", "the old boat", "shorter"), ("the old boat", "the", "longer")]
    got = evaluate_pairs(model, tokenizer, write(tmp_path / "pairs.jsonl", pairs))
    accuracies = {name: group["accuracy"] for name, group in got["by_phenomenon"].items()}
    assert accuracies == {"tie": 0.5, "shorter": 1.0, "longer": 0.0}


def test_other_keys_and_blank_lines_are_ignored(tmp_path):
    file = tmp_path / "pairs.jsonl"
    line = json.dumps({"good": "a", "bad": "b", "phenomenon": "c", "lang": "isl"})
    file.write_text(f"\ufeff{line}\r\n\n{line}\n")
    assert read_pairs(file) == [Pair("a", "b", "c")] * 2


GOOD = '{"good": "a", "bad": "b", "phenomenon": "c"}\n'
MISTAKES = {
    "no JSON": (b'{"good": ', "line 2 is not JSON"),
    "not UTF-8": (b'{"good": "\xff"}', "line 2 is not UTF-8"),
    "a list": (b'["a", "b"]', "line 2 is not an object"),
    "no bad sentence": (b'{"good": "a", "phenomenon": "c"}', 'line 2 has no text under the key "bad"'),
    "no phenomenon": (b'{"good": "a", "bad": "b"}', 'line 2 has no text under the key "phenomenon"'),
    "a number": (b'{"good": 1, "bad": "b", "phenomenon": "c"}', 'line 2 has no text under the key "good"'),
    "an empty sentence": (b'{"good": " ", "bad": "b", "phenomenon": "c"}', 'line 2 has no text under the key "good"'),
    "the same sentence": (b'{"good": "a", "bad": "a", "phenomenon": "c"}', "line 2: the good and the bad"),
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_bad_line_is_named(line, message, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(GOOD.encode() + line)
    with pytest.raises(HyperLlamaError) as error:
        read_pairs(file)
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(HyperLlamaError, match=r"nothing\.jsonl cannot be read: No such file"):
        read_pairs(tmp_path / "nothing.jsonl")
    with pytest.raises(HyperLlamaError, match="cannot be read"):
        read_pairs(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(HyperLlamaError, match=r"empty\.jsonl is empty"):
        read_pairs(tmp_path / "empty.jsonl")
