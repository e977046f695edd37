"""The report: complete, well-formed, reproducible, and refusing ledgers that are not what they are said to be."""

import base64
import copy
import csv
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hyperllama.errors import HyperLlamaError
from hyperllama.experiment.findings import View, findings, signed
from hyperllama.experiment.report import write_report
from tests.experiment.synthetic import ADAPT, ENGLISH, TARGETS, synthetic_results

VOID = {"meta", "img", "source", "br"}
SVG = {"circle", "rect", "path"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps the cells of every table and the sources of every picture."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        assert tag != "script"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return synthetic_results()


@pytest.fixture(scope="module")
def written(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    files = write_report(results, out)
    assert all(file.is_file() for file in files)
    assert files[0] == out / "report.html"
    return out


def page(out: Path) -> Page:
    return Page((out / "report.html").read_text(encoding="utf-8"))


def without(results: dict[str, Any], drop: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """A study in which some models do not exist."""
    part = copy.deepcopy(results)
    part["models"] = [row for row in part["models"] if not drop(row)]
    kept = {row["id"] for row in part["models"]}
    for group in part["equal"]:
        group["ids"] = [name for name in group["ids"] if name in kept]
    part["curves"] = {name: curve for name, curve in part["curves"].items() if name in kept}
    return part


def test_every_plot_and_table_is_a_file(written: Path) -> None:
    plots = {"loss.png", "bits.png", "scaling.png", "forgetting.png", "merges.png"}
    tables = {
        "loss.csv",
        "bits.csv",
        "scaling.csv",
        "ledger.csv",
        "evaluation.csv",
        "comparison.csv",
        "forgetting.csv",
        "pairs.csv",
    }
    assert {file.name for file in written.iterdir()} == {"report.html"} | plots | tables
    assert all((written / name).read_bytes().startswith(b"\x89PNG") for name in plots)


def test_page_is_well_formed_and_loads_nothing(written: Path) -> None:
    sources = page(written).sources
    pictures = [source for source in sources if source.startswith("data:image/png;base64,")]
    assert len(pictures) == 10
    embedded = {base64.b64decode(source.split(",", 1)[1]) for source in pictures}
    assert {file.read_bytes() for file in written.glob("*.png")} < embedded
    tables = [source for source in sources if source.startswith("data:text/csv;base64,")]
    assert len(pictures) + len(tables) == len(sources)
    downloads = {base64.b64decode(source.split(",", 1)[1]) for source in tables}
    assert downloads == {file.read_bytes() for file in written.glob("*.csv")}
    assert (written / "report.html").stat().st_size < 1_200_000


def test_every_figure_and_table_offers_its_numbers(written: Path) -> None:
    html = (written / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r"<figure>.*?</figure>", html, re.DOTALL)
    names = [re.findall(r'download="(\w+)\.csv"', figure) for figure in figures]
    assert names == [["loss"], ["bits"], ["scaling"], ["forgetting"], ["comparison"]]
    assert len(re.findall(r"<a class=.csv. download", html)) == 9  # comparison's twice: figure and table


def test_scaling_follows_a_family_over_exact_flops(results: dict[str, Any], written: Path) -> None:
    with (written / "scaling.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["family"] == "2x" and not row["what"].startswith("merge")]
    assert [row["what"] for row in rows] == ["before adaptation", "a model a language", "joint training"]
    assert [int(row["total_flops"]) for row in rows] == [ENGLISH, ENGLISH + ADAPT, ENGLISH + 5 * ADAPT]
    bits = {row["id"]: row["eval"] for row in results["models"]}
    own = sum(bits[f"{tag}-2x"][tag]["bits_per_byte"] for tag in TARGETS) / 5
    assert float(rows[1]["mean_of_targets"]) == pytest.approx(own)


def test_ledger_has_every_model_with_its_exact_integers(results: dict[str, Any], written: Path) -> None:
    ledger = {row[0]: row[1:] for row in page(written).tables[0][1:]}
    assert list(ledger) == [row["id"] for row in results["models"]]
    for row in results["models"]:
        assert ledger[row["id"]][1:] == [f"{row[key]:,}" for key in ("parameters", "spent", "inherited", "total")]
    with (written / "ledger.csv").open(encoding="utf-8") as file:
        for line, row in zip(csv.DictReader(file), results["models"], strict=True):
            assert line["id"] == row["id"]
            assert [int(line[key]) for key in ("spent", "inherited", "total")] == [
                row[key] for key in ("spent", "inherited", "total")
            ]


def test_equal_groups_are_marked_in_the_ledger(results: dict[str, Any], written: Path) -> None:
    marks = {row[0]: row[1] for row in page(written).tables[0][1:]}
    for letter, group in zip("ABC", results["equal"], strict=True):
        assert {name for name, mark in marks.items() if mark == letter} == set(group["ids"])


def test_merges_of_several_sets_have_a_heat_map_of_their_own(results: dict[str, Any], tmp_path: Path) -> None:
    """And take no part in comparisons with joint training, which has all languages."""
    more = copy.deepcopy(results)
    for row in [row for row in more["models"] if row["kind"] == "merge"]:
        pair = copy.deepcopy(row) | {"id": f"{row['id']}-pair", "parents": row["parents"][:2]}
        pair["total"] = pair["inherited"] = pair["inherited"] - 3 * ADAPT
        pair["eval"]["est"]["bits_per_byte"] = 0.5
        more["models"].append(pair)
    write_report(more, tmp_path)
    assert (tmp_path / "subsets.png").is_file()
    with (tmp_path / "subsets.csv").open(encoding="utf-8") as file:
        rows = {row["languages"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["est+fao", "est+fao+fas+isl+swe"] and len(rows["est+fao"]) == 10
    fao = next(row for row in results["models"] if row["id"] == "merge-ties-2x")["eval"]["fao"]["bits_per_byte"]
    assert float(rows["est+fao"]["2x ties"]) == pytest.approx((0.5 + fao) / 2)
    assert "of 9 merges" in dict(findings(View(more)))["Merging"]


def test_a_merge_that_spent_flops_is_held_against_the_joint_run_and_says_so(results: dict[str, Any]) -> None:
    learnt, more = copy.deepcopy(results["models"][-1]), copy.deepcopy(results)
    assert learnt["id"] == "merge-ties-2x"
    learnt |= {"id": "merge-adam_v_learnt_by_row-2x", "method": "adam_v_learnt_by_row", "spent": 12_345}
    learnt["total"] += 12_345
    for tag in TARGETS:
        learnt["eval"][tag]["bits_per_byte"] = 1.0
    more["models"].append(learnt)
    group = {"what": "merges that read text", "by": "inherited", "flops": ENGLISH + 5 * ADAPT, "ids": [learnt["id"]]}
    more["equal"].append(group)
    sentence = dict(findings(View(more)))["Merging"]
    assert (
        "merge-adam_v_learnt_by_row-2x needs the fewest, 1.000" in sentence
        and "joint training with 12,345 FLOPs fewer" in sentence
    )
    assert "the best of the paper's merges, merge-" in sentence
    assert ("2x", "merge: Adam's v, learnt by row") in [row[:2] for row in View(more).comparison()]
    more["models"][-1]["inherited"] += 1
    with pytest.raises(HyperLlamaError, match="do not add up"):
        View(more)


def test_two_calls_give_identical_bytes(results: dict[str, Any], written: Path, tmp_path: Path) -> None:
    for file in write_report(copy.deepcopy(results), tmp_path):
        assert file.read_bytes() == (written / file.name).read_bytes(), file.name


def test_a_group_that_is_not_equal_is_refused(results: dict[str, Any], tmp_path: Path) -> None:
    wrong = copy.deepcopy(results)
    row = next(row for row in wrong["models"] if row["id"] == "est-2x")
    row["spent"], row["total"] = row["spent"] + 1, row["total"] + 1
    with pytest.raises(HyperLlamaError, match=f"est-2x has {ENGLISH + ADAPT + 1} FLOPs"):
        write_report(wrong, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_ledger_that_does_not_add_up_is_refused(results: dict[str, Any], tmp_path: Path) -> None:
    wrong = copy.deepcopy(results)
    wrong["models"][3]["total"] += 1
    with pytest.raises(HyperLlamaError, match="eng-2x: spent"):
        write_report(wrong, tmp_path)


def test_an_equal_group_of_an_unknown_model_is_refused(results: dict[str, Any], tmp_path: Path) -> None:
    wrong = copy.deepcopy(results)
    wrong["equal"][0]["ids"].append("eng-3x")
    with pytest.raises(HyperLlamaError, match="eng-3x"):
        write_report(wrong, tmp_path)


@pytest.mark.parametrize(
    ("missing", "drop"),
    [
        ("merges", lambda row: row["kind"] == "merge"),
        ("merges and joint runs", lambda row: row["kind"] in ("merge", "joint")),
        ("adaptations", lambda row: row["kind"] in ("merge", "joint", "language")),
        ("two families", lambda row: row["family"] != "2x-scratch" and row["family"] != "1x"),
        ("everything", lambda row: True),
    ],
)
def test_a_study_without_some_models_has_a_report(
    results: dict[str, Any], tmp_path: Path, missing: str, drop: Callable[[dict[str, Any]], bool]
) -> None:
    part = without(results, drop)
    write_report(part, tmp_path)
    assert [row[0] for row in page(tmp_path).tables[0][1:]] == [row["id"] for row in part["models"]]
    if "joint" in missing:
        assert not (tmp_path / "merges.png").exists()


def test_one_target_without_pairs_curves_or_finite_bits_has_a_report(results: dict[str, Any], tmp_path: Path) -> None:
    part = without(results, lambda row: row["language"] not in (None, "eng", "est"))
    part["languages"], part["targets"], part["curves"], part["noise_db"] = ["eng", "est"], ["est"], {}, None
    for row in part["models"]:
        row["eval"] = {tag: {"bits_per_byte": row["eval"][tag]["bits_per_byte"]} for tag in part["languages"]}
    part["models"][-1]["eval"]["est"]["bits_per_byte"] = float("nan")
    write_report(part, tmp_path)
    assert not (tmp_path / "loss.png").exists()
    assert "Minimal pairs" not in page(tmp_path).text


def test_text_from_the_results_is_escaped(results: dict[str, Any], tmp_path: Path) -> None:
    hostile = "<script>alert('&')</script>"
    part = without(results, lambda row: row["kind"] != "base")
    part["name"] = part["corpus"] = part["equal"][0]["what"] = hostile
    part["models"][0]["id"] = hostile
    part["models"][1]["parents"], part["curves"] = [hostile], {}
    write_report(part, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;") >= 5
    assert page(tmp_path).tables[0][1][0] == hostile


def test_findings_state_numbers_of_the_results(results: dict[str, Any]) -> None:
    sentences = dict(findings(View(results)))
    bits = {row["id"]: {tag: cell["bits_per_byte"] for tag, cell in row["eval"].items()} for row in results["models"]}
    for tag in TARGETS:
        best = min(bits[f"{tag}-{family}"][tag] for family in ("1x", "1x-cloned", "2x"))
        assert f"({best:.3f})" in sentences["One model per language"]
    merged = {name: sum(bits[name][tag] for tag in TARGETS) / 5 for name in bits if name.startswith("merge")}
    best_merge = min(merged, key=lambda name: merged[name])
    assert f"of 9 merges, {best_merge} needs the fewest, {merged[best_merge]:.3f}" in sentences["Merging"]
    own = sum(bits[f"{tag}-2x"][tag] for tag in TARGETS) / 5
    assert best_merge.endswith("-2x") and f"each on its own language, {own:.3f}" in sentences["Merging"]
    changes = [bits[f"{tag}-2x"]["eng"] - bits["eng-2x"]["eng"] for tag in TARGETS]
    assert f"2x {signed(sum(changes) / 5)}" in sentences["Forgetting English"]


def test_arms_that_agree_as_printed_are_called_equal(results: dict[str, Any]) -> None:
    level = copy.deepcopy(results)
    for row in level["models"]:
        row["eval"]["est"]["bits_per_byte"] = 2.0 + (row["id"] == "est-2x") * 1e-5
    assert (
        "1x, 1x-cloned and 2x are equal for Estonian (2.000)" in dict(findings(View(level)))["One model per language"]
    )


def test_models_are_compared_only_inside_an_equal_group(results: dict[str, Any]) -> None:
    apart = copy.deepcopy(results)
    apart["equal"] = []
    topics = dict(findings(View(apart)))
    assert "One model per language" not in topics and "What 2x changed" not in topics


def test_signed_numbers_have_a_true_minus_and_no_negative_zero() -> None:
    assert [signed(0.1234), signed(-0.1234), signed(-0.0001)] == ["+0.123", "\N{MINUS SIGN}0.123", "0.000"]


def test_no_date_or_path_in_the_page(written: Path) -> None:
    text = " ".join(page(written).text)
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", text)
    assert str(written) not in text
