"""Facts in mParaRel's form: ranks as transformers gives them, consistency over paraphrases, bad files named."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate import evaluate_facts, load_folder
from hyperllama.evaluate.facts import Relation, _answers, read_facts
from tests.evaluate.conftest import log_probability

PATTERNS = ["the boat of [X] is [Y]", "[Y] , nobody knew , lay on [X]", "gamli [X] í [Y]"]
FACTS = [("shore", "old"), ("there", "left"), ("who", "boat"), ("fjörunni", "old"), ("it", "knew")]


def write(folder: Path, patterns=PATTERNS, facts=FACTS, language: str = "isl", name: str = "P36") -> Path:
    rows = {
        "patterns": [{"pattern": pattern} for pattern in patterns],
        "tuples": [{"sub_uri": "Q1", "sub_label": s, "obj_label": o, "lineid": i} for i, (s, o) in enumerate(facts)],
    }
    for kind, values in rows.items():
        (folder / kind / language).mkdir(parents=True, exist_ok=True)
        (folder / kind / language / f"{name}.jsonl").write_text("\n".join(map(json.dumps, values)))
    return folder


def test_figures_equal_those_of_transformers(make_folder, tokenizer, tmp_path):
    folder = make_folder()
    theirs = LlamaForCausalLM.from_pretrained(folder)
    objects = list(dict.fromkeys(obj for _, obj in FACTS))
    hits, ranks, same, everywhere = [], [], [], []
    for subject, right in FACTS:
        order = []
        for pattern in PATTERNS:
            texts = {obj: pattern.replace("[X]", subject).replace("[Y]", obj) for obj in objects}
            scores = {
                obj: log_probability(theirs, [tokenizer.eos_id, *tokenizer.encode(text)]) for obj, text in texts.items()
            }
            order.append(sorted(objects, key=scores.__getitem__, reverse=True))
        hits.append([ranking[0] == right for ranking in order])
        ranks.append([1 / (1 + ranking.index(right)) for ranking in order])
        same.append([a[0] == b[0] for a, b in combinations(order, 2)])
        everywhere.append(all(hits[-1]))
    got = evaluate_facts(*load_folder(folder), write(tmp_path / "facts"))
    figures = got["relations"]["isl/P36"]
    assert figures["facts"] == 5 and figures["patterns"] == 3 and got["flops"] > 0
    assert figures["accuracy"] == pytest.approx(np.mean(hits)) and figures["mrr"] == pytest.approx(np.mean(ranks))
    assert figures["consistency"] == pytest.approx(np.mean(same))
    assert figures["consistent_accuracy"] == pytest.approx(np.mean(everywhere))
    low, high = figures["accuracy_interval"]
    assert low <= figures["accuracy"] <= high


def test_ranks_ties_and_consistency_by_hand():
    relation = Relation("eng", "P", ["a [X] [Y]", "b [X] [Y]"], [("s", "x"), ("t", "y"), ("u", "z")])
    nll = np.array(
        [
            [[1.0, 2, 3], [1, 2, 3]],  # right twice
            [[1.0, 2, 3], [2, 1, 3]],  # second, then first
            [[1.0, 1, 1], [3, 2, 1]],  # a tie of three: rank 2, no hit; then first
        ]
    )
    answers = _answers(nll, relation)
    assert answers.tolist() == [
        [1, 1, 1, 1],
        [0.5, pytest.approx((1 / 2 + 1) / 2), 0, 0],
        [0.5, pytest.approx((1 / 2 + 1) / 2), 0, 0],
    ]


def test_languages_gather_their_relations(make_folder, tmp_path):
    write(tmp_path / "f", name="P37", facts=FACTS[:3])
    write(tmp_path / "f", language="fao", facts=FACTS[1:4])
    got = evaluate_facts(*load_folder(make_folder()), write(tmp_path / "f"), by="length")
    assert {tag: (row["facts"], row["relations"]) for tag, row in got["languages"].items()} == {
        "fao": (3, 1),
        "isl": (8, 2),
    }
    parts = [got["relations"][f"isl/{name}"] for name in ("P36", "P37")]
    whole = sum(part["accuracy"] * part["facts"] for part in parts) / 8
    assert got["languages"]["isl"]["accuracy"] == pytest.approx(whole)


def test_bad_facts_are_named(make_folder, tmp_path):
    with pytest.raises(HyperLlamaError, match="holds no patterns"):
        read_facts(tmp_path)
    for change, message in (
        ({"patterns": ["[X] is"]}, r"lacks \[X\] or \[Y\]"),
        ({"facts": FACTS[:1]}, "fewer than two different objects"),
        ({"facts": []}, "is empty"),
        ({"facts": [("a", " "), ("b", "c")]}, 'line 1 has no text under the key "obj_label"'),
    ):
        with pytest.raises(HyperLlamaError, match=message):
            read_facts(write(tmp_path / message[:5].strip("\\"), **change))
    folder = write(tmp_path / "m")
    (folder / "tuples" / "isl" / "P36.jsonl").unlink()
    with pytest.raises(HyperLlamaError, match=r"P36\.jsonl cannot be read"):
        read_facts(folder)
    with pytest.raises(HyperLlamaError, match="not by 'word'"):
        evaluate_facts(*load_folder(make_folder()), write(tmp_path / "w"), by="word")
