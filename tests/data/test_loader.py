import random
import threading

import numpy as np
import pytest
import torch

from hyperllama.data.loader import IGNORE, Batch, Loader, micro_batches
from hyperllama.data.mixture import Mixture, Source
from hyperllama.errors import HyperLlamaError

T = 12
EOS = 2


@pytest.fixture
def mixture(make_shards) -> Mixture:
    sources = []
    for name, languages, weight in (("north", ["fao", "isl"], 2), ("south", ["fas"], 1)):
        generator = random.Random(name)
        documents = [(generator.choice(languages), chr(97 + i % 26) * generator.choice([1, 5, 30])) for i in range(90)]
        sources.append(Source(name, make_shards(name, documents, shard_tokens=200), weight))
    return Mixture(sources, T, 3)


def equal(a: Batch, b: Batch) -> bool:
    same = (
        torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets) and np.array_equal(a.window_ids, b.window_ids)
    )
    if a.cu_seqlens is None or b.cu_seqlens is None:
        return same and a.cu_seqlens is b.cu_seqlens and a.tokens_by_language == b.tokens_by_language
    return same and torch.equal(a.cu_seqlens, b.cu_seqlens) and a.tokens_by_language == b.tokens_by_language


def test_a_batch_holds_the_windows_the_mixture_names(mixture: Mixture) -> None:
    with Loader(mixture, 32) as loader:
        batch = loader.batch(96)
    for row, i in enumerate(range(96, 128)):
        (source,), (window,) = mixture.locate(np.array([i]))
        shards = mixture.sources[source].shards
        data = np.concatenate([np.fromfile(path, "<u2") for path in sorted(shards.path.glob("shard-*.bin"))])
        tokens = data[window * (T + 1) : (window + 1) * (T + 1)].astype(np.int64)
        assert batch.ids[row].tolist() == tokens[:-1].tolist() and batch.targets[row].tolist() == tokens[1:].tolist()
    assert batch.ids.dtype == batch.targets.dtype == torch.int64
    assert batch.ids.is_contiguous() and batch.targets.is_contiguous()
    assert batch.window_ids.tolist() == list(range(96, 128)) and batch.cu_seqlens is None


@pytest.mark.parametrize("count", [0, 1, 3, 16, 31])
def test_ranks_in_order_give_the_global_batch_for_every_world_size(mixture: Mixture, count: int) -> None:
    with Loader(mixture, 16) as alone:
        whole = alone.batch(40, count)
    for world in (1, 2, 3, 4, 7, 40):
        parts = []
        for rank in range(world):
            with Loader(mixture, 16, rank, world, documents=True) as loader:
                parts.append(loader.batch(40, count))
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
        assert np.concatenate([part.window_ids for part in parts]).tolist() == list(range(40, 40 + count))
        assert max(len(part.ids) for part in parts) - min(len(part.ids) for part in parts) <= 1
        counted: dict[str, int] = {}
        for part in parts:
            assert part.ids.shape == part.targets.shape == (len(part.window_ids), T)
            assert part.cu_seqlens is not None and part.cu_seqlens[-1] == part.ids.numel()
            for tag, tokens in part.tokens_by_language.items():
                counted[tag] = counted.get(tag, 0) + tokens
        assert counted == whole.tokens_by_language == mixture.tokens_by_language(40, count)


def test_a_batch_depends_on_nothing_but_its_place(mixture: Mixture) -> None:
    places = [(0, 16), (16, 16), (32, 16), (64, 16), (16, 16), (0, 5), (5, 16), (0, 16), (16, 7)]
    with Loader(mixture, 16, documents=True) as used:
        for first, count in places:
            with Loader(mixture, 16, documents=True) as fresh:
                assert equal(used.batch(first, count), fresh.batch(first, count))


def test_global_windows_do_not_depend_on_the_batch_size(mixture: Mixture) -> None:
    with Loader(mixture, 24) as large, Loader(mixture, 6) as small:
        whole = large.batch(0)
        assert torch.equal(whole.ids, torch.cat([small.batch(first).ids for first in range(0, 24, 6)]))


def test_tokens_by_language_follow_the_documents(make_shards) -> None:
    documents = [("fao", "f" * 20), ("isl", "i" * 9), ("isl", "i" * 14), ("swe", "s" * 50)] * 5
    mixture = Mixture([Source("all", make_shards("all", documents), 1)], T, 0)
    language_of_token = [tag for tag, text in documents for _ in range(len(text) + 1)]
    with Loader(mixture, 8) as loader:
        batch = loader.batch(4)
    _, windows = mixture.locate(batch.window_ids)
    targets = [tag for w in windows for tag in language_of_token[w * (T + 1) + 1 : (w + 1) * (T + 1)]]
    assert batch.tokens_by_language == {tag: targets.count(tag) for tag in ("fao", "isl", "swe")}


def test_documents_end_at_windows_and_after_every_eos(mixture: Mixture) -> None:
    with Loader(mixture, 32, documents=True) as loader:
        batch = loader.batch(0)
    flat = batch.ids.flatten().tolist()
    borders = [i for i in range(len(flat) + 1) if i % T == 0 or flat[i - 1] == EOS]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == borders
    assert borders[0] == 0 and borders[-1] == 32 * T and (batch.cu_seqlens.diff() > 0).all()
    assert len(borders) > 32 + 1  # there are documents inside windows


def test_masking_removes_exactly_the_first_tokens_of_documents(mixture: Mixture) -> None:
    with Loader(mixture, 32) as plain, Loader(mixture, 32, mask_first_token_of_document=True) as masked:
        a, b = plain.batch(0), masked.batch(0)
    assert torch.equal(a.ids, b.ids) and a.tokens_by_language == b.tokens_by_language
    after_eos = a.ids == EOS
    assert after_eos.any() and (b.targets[after_eos] == IGNORE).all()
    assert torch.equal(a.targets[~after_eos], b.targets[~after_eos])


def test_micro_batches_are_the_batch_in_pieces(mixture: Mixture) -> None:
    with Loader(mixture, 16, documents=True, mask_first_token_of_document=True) as loader:
        batch = loader.batch(0)
        for size in (1, 3, 4, 16, 99):
            parts = list(micro_batches(batch, size))
            assert [len(part.ids) for part in parts[:-1]] == [min(size, 16)] * (len(parts) - 1)
            for field in ("ids", "targets"):
                assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(batch, field))
            first = 0
            for part in parts:
                assert equal(part, loader.batch(first, len(part.ids)))  # borders and languages too
                first += len(part.ids)
        assert list(micro_batches(loader.batch(0, 0), 4)) == []


def test_micro_batches_are_views_made_one_at_a_time(mixture: Mixture) -> None:
    with Loader(mixture, 16) as loader:
        batch = loader.batch(0)
    parts = micro_batches(batch, 4)
    assert next(parts).ids.data_ptr() == batch.ids.data_ptr()
    assert next(parts).ids.data_ptr() == batch.ids[4:].data_ptr()


def test_the_next_batch_is_read_in_the_background_once(mixture: Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int, bool]] = []
    read = Loader._read

    def spy(self: Loader, first: int, count: int) -> Batch:
        reads.append((first, count, threading.current_thread() is threading.main_thread()))
        return read(self, first, count)

    monkeypatch.setattr(Loader, "_read", spy)
    with Loader(mixture, 8) as loader:
        for first in (0, 8, 16):
            loader.batch(first)
    assert reads[:3] == [(0, 8, True), (8, 8, False), (16, 8, False)] and all(not main for *_, main in reads[1:])


def test_an_error_in_the_background_surfaces_when_its_batch_is_asked_for(
    mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Loader._read

    def broken(self: Loader, first: int, count: int) -> Batch:
        if first == 8:
            raise HyperLlamaError("the disk is gone")
        return read(self, first, count)

    monkeypatch.setattr(Loader, "_read", broken)
    with Loader(mixture, 8) as loader:
        loader.batch(0)
        with pytest.raises(HyperLlamaError, match="the disk is gone"):
            loader.batch(8)
        assert len(loader.batch(16).ids) == 8


def test_a_closed_loader_leaves_no_thread(mixture: Mixture) -> None:
    before = threading.active_count()
    with Loader(mixture, 8) as loader:
        loader.batch(0)
    loader.close()
    assert threading.active_count() == before


def test_impossible_ranks_batches_and_places_are_refused(mixture: Mixture) -> None:
    for arguments in ((0, 0, 1), (8, 1, 1), (8, -1, 2)):
        with pytest.raises(HyperLlamaError, match="no batches of"):
            Loader(mixture, *arguments)
    with Loader(mixture, 8) as loader, pytest.raises(ValueError, match="no windows"):
        loader.batch(-1)
