"""FLOPs are exact integers: the published shapes, torch's own counter, and brute force agree."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hyperllama.arena import Arena
from hyperllama.errors import HyperLlamaError
from hyperllama.flops import Ledger, attended_pairs, growth_quantum, shared_quantum, window_flops, windows_for
from hyperllama.kernels.backend import use
from hyperllama.model import Llama
from hyperllama.settings import ModelConfig

PAPER = ModelConfig(
    vocab_size=128256, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64
)


def test_the_papers_two_shapes_have_their_known_counts():
    grown = PAPER.grown(2)
    assert (PAPER.num_parameters, grown.num_parameters) == (180_078_912, 572_494_464)
    assert window_flops(PAPER, 2048) == 3_082_108_796_928
    assert window_flops(PAPER, 2048, "causal") == 2_647_455_694_848
    assert window_flops(grown, 2048) == 8_773_410_226_176
    assert window_flops(grown, 2048, "causal") == 7_904_104_022_016
    assert 538 * window_flops(PAPER, 2048) == 189 * window_flops(grown, 2048)


@pytest.mark.parametrize("seq_len", [1, 7, 32])
@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 48, "num_heads": 3, "num_kv_heads": 1, "head_dim": 16},
        {"hidden_size": 40, "num_heads": 4, "num_kv_heads": 2, "head_dim": 12},
        {"hidden_size": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "tie_embeddings": False},
    ],
)
def test_dense_flops_equal_torchs_counter(shape, seq_len):
    """Forward and backward of the plain-torch model: the counter sees torch's own products."""
    config = ModelConfig(vocab_size=128, intermediate_size=64, num_layers=2, **shape)
    model = Llama(config, Arena(config, torch.float32, "cpu", training=True), backend="reference")
    model.init_weights(0)
    windows = 3
    ids, targets = torch.randint(128, (2, windows, seq_len))
    with use("reference"), FlopCounterMode(display=False) as counter:
        hidden = model(ids)
    head = 2 * windows * seq_len * config.vocab_size * config.hidden_size
    assert 3 * (counter.get_total_flops() + head) == windows * window_flops(config, seq_len)
    # the counter knows addmm, not the form that accumulates in place
    accumulate = {torch.ops.aten.addmm_: lambda _, a, b, out_shape=None: 2 * a[0] * a[1] * b[1]}
    with use("reference"), FlopCounterMode(display=False, custom_mapping=accumulate) as counter:
        model.loss(ids, targets, loss_weight=1.0).backward()
    assert counter.get_total_flops() == windows * window_flops(config, seq_len)
    assert hidden.shape == (windows, seq_len, config.hidden_size)


def test_causal_pairs_equal_a_brute_force_count():
    lengths = [3, 1, 8, 5]
    brute = sum(1 for n in lengths for q in range(n) for k in range(n) if k <= q)
    assert attended_pairs(17, "causal", lengths) == brute
    assert attended_pairs(17, "causal") == sum(1 for q in range(17) for k in range(17) if k <= q)
    assert attended_pairs(17, "dense", lengths) == 289


def test_a_budget_is_spent_exactly_or_refused_with_its_neighbours():
    assert windows_for(1200, 100) == 12
    with pytest.raises(HyperLlamaError) as error:
        windows_for(1250, 100, [150])
    for number in ("1250", "1200", "1300", "1500"):
        assert number in str(error.value)


def test_the_shared_quantum_is_the_least_common_multiple():
    quantum = growth_quantum(PAPER, 2048, 2)
    assert (quantum["windows"], quantum["windows_grown"]) == (538, 189)
    assert quantum["flops"] == shared_quantum([window_flops(PAPER, 2048), window_flops(PAPER.grown(2), 2048)])
    assert quantum["tokens"] == 538 * 2048


def test_a_coarse_quantum_comes_with_a_better_shape():
    config = ModelConfig(
        vocab_size=2000, hidden_size=128, intermediate_size=341, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=32
    )
    budget = 3000 * window_flops(config, 256)
    suggestion = growth_quantum(config, 256, 2, budget)["suggestion"]
    better = config.model_copy(update=suggestion)
    assert suggestion["vocab_size"] % 128 == 0 and suggestion["intermediate_size"] % 64 == 0
    assert suggestion["vocab_size"] >= 2000
    assert 20 * growth_quantum(better, 256, 2)["flops"] <= budget
    assert "suggestion" not in growth_quantum(better, 256, 2, budget)


def test_a_ledger_counts_each_ancestor_once():
    base = Ledger("base", 100)
    grown = Ledger.child("grow", [base])
    languages = [Ledger.child(f"lang{i}", [grown]) for i in range(5)]
    for language in languages:
        language.spent = 7
    merged = Ledger.child("merge", languages)
    assert (merged.inherited, merged.total) == (100 + 35, 135)
    assert Ledger.from_json(merged.to_json(), "card") == merged


def test_of_two_moments_of_one_run_the_later_counts():
    merged = Ledger.child("merge", [Ledger("a", 5, {"base": 80}), Ledger("b", 5, {"base": 100})])
    assert merged.inherited == 110


@pytest.mark.parametrize(
    "value",
    [None, {}, [1], {"run": "a", "spent": 1.5, "ancestors": {}}, {"run": "a", "spent": -1, "ancestors": {}},
     {"run": 3, "spent": 1, "ancestors": {}}, {"run": "a", "spent": 1, "ancestors": {"b": "2"}}],
)  # fmt: skip
def test_what_is_no_ledger_is_refused(value):
    with pytest.raises(HyperLlamaError, match=r"^card\.json: ledger is not a run"):
        Ledger.from_json(value, "card.json")
