"""What is particular to scGPT: tokens, batch labels, generation, checkpoints that do not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

import scfm
from scfm.backbones._random_keys import content_keys
from scfm.backbones.scgpt import TokenDraws
from scfm.backbones.scgpt.objective import generative_loss, split_prompt
from scfm.backbones.scgpt.tokenizer import bin_values, quantile_edges

GENES = np.array([f"GENE{i}" for i in range(30)])


def counts_of(seed: int = 0, n_cells: int = 5) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.random.default_rng(seed).poisson(2.0, (n_cells, 30)).astype(np.float32))


# -- bins ----------------------------------------------------------------------------------------------------------------

positive = st.floats(2**-10, 2**20, width=32, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(
    cells=st.lists(hnp.arrays(np.float32, st.integers(1, 60), elements=positive), min_size=1, max_size=5),
    n_bins=st.integers(3, 60),
)
def test_edges_are_those_of_numpy(cells, n_bins):
    offsets = np.concatenate([[0], np.cumsum([len(cell) for cell in cells])])
    edges = quantile_edges(np.concatenate(cells), offsets, n_bins)
    for cell, row in zip(cells, edges, strict=True):
        np.testing.assert_array_equal(row, np.quantile(cell, np.linspace(0, 1, n_bins - 1)))


@settings(max_examples=60, deadline=None)
@given(values=hnp.arrays(np.float64, st.integers(1, 80), elements=positive), seed=st.integers(0, 99))
def test_bins_keep_the_order_of_values(values, seed):
    uniform = np.random.default_rng(seed).random(len(values))
    for draws in (None, uniform):
        bins, edges = bin_values(values, np.array([0, len(values)]), 51, draws)
        assert bins.min() >= 1
        assert bins.max() <= 50
        order = np.argsort(values, kind="stable")
        strictly = np.diff(values[order]) > 0
        assert (np.diff(bins[order])[strictly] >= 0).all()
        np.testing.assert_array_equal(edges[0, [0, -1]], [values.min(), values.max()])


def test_one_distinct_value_gives_any_bin_and_two_give_first_and_last():
    many = np.full(2000, 3.0)
    bins, _ = bin_values(many, np.array([0, 2000]), 51, np.random.default_rng(0).random(2000))
    assert set(bins) == set(range(1, 51))
    assert bin_values(np.array([1.0, 9.0]), np.array([0, 2]), 51, np.array([0.5, 0.5]))[0].tolist() == [1, 50]


def test_random_keys_belong_to_gene_and_cell_not_to_place():
    ids, values = np.array([4, 9, 2, 7]), np.array([1.0, 2.0, 2.0, 5.0])
    keys = content_keys(ids, values, np.array([0, 4]), 0, 1)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(content_keys(ids[order], values[order], np.array([0, 4]), 0, 1), keys[order])
    twice = content_keys(np.tile(ids, 2), np.tile(values, 2), np.array([0, 4, 8]), 0, 1)
    np.testing.assert_array_equal(twice, np.tile(keys, 2))
    assert len({*keys, *content_keys(ids, values, np.array([0, 4]), 1, 1)}) == 8


# -- tokens --------------------------------------------------------------------------------------------------------------


def test_long_cells_keep_a_random_subset_that_the_seed_decides(tiny_scgpt):
    backbone, counts = tiny_scgpt(), sparse.csr_matrix(np.arange(1, 31, dtype=np.float32)[None])
    tokens = [backbone.tokenize(counts, GENES, max_length=11, rng=seed) for seed in (0, 0, 1)]
    assert all(len(set(part.flat_ids.tolist())) == 11 for part in tokens)
    assert tokens[0].flat_ids[0] == backbone.cls_id
    assert torch.equal(tokens[0].flat_ids, tokens[1].flat_ids)
    assert not torch.equal(tokens[0].flat_ids, tokens[2].flat_ids)
    first = backbone.tokenize(counts, GENES, max_length=11, truncate="first")
    assert first.flat_ids[1:].tolist() == backbone.vocab.get_ids(GENES[:10]).tolist()


def test_subset_is_uniform(tiny_scgpt):
    backbone, counts = tiny_scgpt(), sparse.csr_matrix(np.ones((1, 30), dtype=np.float32))
    seen = np.zeros(len(backbone.vocab))
    for seed in range(600):
        seen[backbone.tokenize(counts, GENES, max_length=11, rng=seed).flat_ids[1:].numpy()] += 1
    expressed = seen[backbone.vocab.get_ids(GENES)]
    assert abs(expressed - 200).max() < 5 * np.sqrt(600 * 1 / 3 * 2 / 3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tie_break": "right"}, "tie_break"),
        ({"truncate": "last"}, "truncate"),
        ({"max_length": 1}, "max_length"),
        ({"draws": TokenDraws(uniform=[np.zeros(3)])}, "draws hold 3"),
        ({"draws": TokenDraws(permutation=[None]), "max_length": 5}, "draws hold 1 permutations"),
        ({"batch_labels": np.zeros(5, int)}, "no batch labels"),
        ({"duplicates": "drop"}, "duplicates"),
    ],
)
def test_wrong_options_are_named(tiny_scgpt, options, text):
    with pytest.raises(ValueError, match=text):
        tiny_scgpt().tokenize(counts_of(), GENES, **options)


def test_negative_values_are_refused(tiny_scgpt):
    with pytest.raises(ValueError, match="negative"):
        tiny_scgpt().tokenize(-counts_of(), GENES)


def test_genes_as_ids_must_fit_the_matrix(tiny_scgpt):
    backbone = tiny_scgpt()
    with pytest.raises(ValueError, match="30 columns"):
        backbone.tokenize(counts_of(), np.arange(3))
    ids = backbone.vocab.get_ids(GENES)
    a, b = backbone.tokenize(counts_of(), ids), backbone.tokenize(counts_of(), GENES)
    assert torch.equal(a.flat_ids, b.flat_ids)
    assert torch.equal(a.flat_values, b.flat_values)


# -- exact savings -------------------------------------------------------------------------------------------------------


def test_one_row_of_the_last_layer_equals_the_full_layer(tiny_scgpt):
    for pre_norm in (False, True):
        backbone = tiny_scgpt(pre_norm=pre_norm)
        tokens = backbone.tokenize(counts_of(3), GENES)
        with torch.inference_mode():
            full = backbone.forward(tokens).cells
        np.testing.assert_allclose(backbone.embed(tokens, normalize=False), full, atol=1e-5)


def test_folded_tables_equal_the_layers_and_follow_the_weights(tiny_scgpt):
    backbone = tiny_scgpt()
    tokens = backbone.tokenize(counts_of(3), GENES)
    plain = backbone.forward(tokens).cells  # with gradients enabled nothing is folded
    np.testing.assert_allclose(backbone.embed(tokens, normalize=False), plain.detach(), atol=1e-5)
    with torch.no_grad():
        backbone.module.genes.embedding.weight.mul_(torch.rand(16))
    np.testing.assert_allclose(
        backbone.embed(tokens, normalize=False), backbone.forward(tokens).cells.detach(), atol=1e-5
    )


# -- batches -------------------------------------------------------------------------------------------------------------


def test_each_cell_is_normalised_with_its_own_batch(tiny_scgpt):
    backbone = tiny_scgpt(input_norm="dsbn", n_batches=2, use_batch_labels=True)
    for i, norm in enumerate(backbone.module.domain_norms):
        norm.running_mean.fill_(i)
    labels = np.array([0, 1, 1, 0, 1])
    mixed = backbone.embed(backbone.tokenize(counts_of(), GENES, batch_labels=labels))
    for label in (0, 1):
        rows = labels == label
        alone = backbone.tokenize(counts_of()[rows], GENES, batch_labels=labels[rows])
        np.testing.assert_allclose(backbone.embed(alone), mixed[torch.as_tensor(rows)], atol=1e-5)
    with pytest.raises(ValueError, match="pass batch_labels"):
        backbone.embed(backbone.tokenize(counts_of(), GENES))
    with pytest.raises(ValueError, match="between 0 and 1"):
        backbone.tokenize(counts_of(), GENES, batch_labels=labels + 1)
    with pytest.raises(ValueError, match="one entry for each of 5 cells"):
        backbone.tokenize(counts_of(), GENES, batch_labels=labels[:2])


# -- generation ----------------------------------------------------------------------------------------------------------


def prompt(backbone, n_cells=4):
    tokens = backbone.tokenize(counts_of(1, n_cells), GENES, tie_break="left")
    return split_prompt(tokens, 0.5, torch.Generator().manual_seed(0), max_length=40)


def test_prompt_and_queries_are_all_genes_once(tiny_scgpt):
    backbone = tiny_scgpt()
    tokens = backbone.tokenize(counts_of(1), GENES, tie_break="left")
    split = split_prompt(tokens, 0.25, torch.Generator().manual_seed(3), max_length=100)
    for cell in range(len(tokens)):
        parts = [split.select([cell]).flat_ids, split.queries.select([cell]).flat_ids]
        assert sorted(torch.cat(parts).tolist()) == sorted(tokens.select([cell]).flat_ids.tolist())
        assert parts[0][0] == backbone.cls_id
        assert len(parts[1]) == (int(tokens.lengths[cell]) - 1) // 4


@pytest.mark.parametrize("confidence", ["value", "dropout", "zeros"])
def test_generation_in_steps_fills_every_query(tiny_scgpt, confidence):
    backbone = tiny_scgpt(explicit_zeros=confidence == "zeros")
    tokens = prompt(backbone)
    one = backbone.generate(tokens)
    several = backbone.generate(tokens, steps=3, confidence=confidence)
    asked = ~tokens.queries.padding
    assert torch.equal(several.isnan(), ~asked)
    assert not torch.allclose(one[asked], several[asked])
    assert torch.equal(several.nan_to_num(), backbone.generate(tokens, steps=3, confidence=confidence).nan_to_num())
    many = backbone.generate(tokens, steps=99, confidence=confidence)
    assert torch.equal(many.isnan(), ~asked)


def test_generation_does_not_see_other_cells(tiny_scgpt):
    backbone = tiny_scgpt()
    tokens = prompt(backbone)
    together = backbone.generate(tokens, steps=2)
    for cell in range(len(tokens)):
        alone = backbone.generate(tokens.select([cell]), steps=2)[0]
        np.testing.assert_allclose(together[cell, : len(alone)], alone, atol=1e-4)


def test_generation_says_what_is_missing(tiny_scgpt):
    backbone = tiny_scgpt()
    with pytest.raises(ValueError, match="query_genes"):
        backbone.generate(backbone.tokenize(counts_of(), GENES))
    with pytest.raises(ValueError, match="steps"):
        backbone.generate(prompt(backbone), steps=0)
    with pytest.raises(ValueError, match="explicit zeros"):
        backbone.generate(prompt(backbone), steps=2, confidence="zeros")
    without = tiny_scgpt(query_flag=False)
    with pytest.raises(ValueError, match="no query flag"):
        without.generate(prompt(without))


def test_loss_counts_every_hidden_gene_once(tiny_scgpt):
    backbone = tiny_scgpt()
    tokens = prompt(backbone)
    loss = generative_loss(backbone, tokens, cell_prompt=False)
    predicted, target = backbone.generate(tokens), tokens.queries.values
    asked = ~tokens.queries.padding
    assert float(loss.gene_prompt) == pytest.approx(float(((predicted - target)[asked] ** 2).mean()), rel=1e-5)
    assert float(loss.cell_prompt) == 0


# -- reconstruction and attention ------------------------------------------------------------------------------------------


def test_reconstruction_has_nan_at_padding_and_its_options_are_checked(tiny_scgpt):
    backbone = tiny_scgpt(explicit_zeros=True)
    tokens = backbone.tokenize(counts_of(), GENES)
    for options in ({}, {"decoder": "cell"}, {"output": "nonzero"}, {"output": "sampled"}):
        out = backbone.reconstruct(tokens, **options)
        assert torch.equal(out.isnan(), tokens.padding)
    probability = backbone.reconstruct(tokens, output="nonzero")[~tokens.padding]
    assert 0 <= float(probability.min()) <= float(probability.max()) <= 1
    with pytest.raises(ValueError, match="explicit zeros"):
        tiny_scgpt().reconstruct(tokens, output="nonzero")
    with pytest.raises(ValueError, match="no decoder from the cell"):
        tiny_scgpt(mvc=None).reconstruct(tokens, decoder="cell")


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize(("rank", "scores"), [(False, "softmax"), (False, "raw"), (True, None)])
def test_attention_between_chosen_genes_is_part_of_the_whole_map(tiny_scgpt, monkeypatch, rank, scores, average):
    from scfm.backbones.scgpt import attention

    backbone = tiny_scgpt()
    tokens = backbone.tokenize(counts_of(3), GENES)
    options = {"rank": rank, "scores": scores, "average_heads": average}
    whole = backbone.attention(tokens, 0, **options)
    names = ["GENE7", "GENE0", "GENE29", "GENE7"]
    for step in (1, 1 << 24):
        monkeypatch.setattr(attention, "_STEP", step)
        some = backbone.attention(tokens, 0, genes=names, **options)
        for cell, length in enumerate(tokens.lengths.tolist()):
            ids = tokens.ids[cell, :length].tolist()
            places = [ids.index(i) if i in ids else -1 for i in backbone.gene_ids(names).tolist()]
            for row, query in enumerate(places):
                for column, key in enumerate(places):
                    got = some[cell, ..., row, column]
                    if min(query, key) < 0:
                        assert got.isnan().all()
                    else:
                        torch.testing.assert_close(got, whole[cell, ..., query, key])


def test_attention_rows_sum_to_one_and_layers_are_checked(tiny_scgpt):
    backbone = tiny_scgpt()
    tokens = backbone.tokenize(counts_of(), GENES)
    for layer in (0, -1):
        weights = backbone.attention(tokens, layer)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        assert float(weights.masked_fill(~tokens.padding[:, None, :], 0).sum()) == 0
    with pytest.raises(ValueError, match="layers 0 to 1"):
        backbone.attention(tokens, 2)


# -- checkpoints that do not fit -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(golden, tmp_path):
    source = golden("scgpt", "embed_cells").path / "checkpoint"
    for name in ("args.json", "vocab.json", "best_model.pt"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    return tmp_path


def _edit(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def test_key_outside_the_table(folder):
    _edit(folder / "best_model.pt", lambda state: state.update(novel=torch.zeros(2)))
    with pytest.raises(scfm.CheckpointError, match="novel"):
        scfm.load(folder)
    assert "novel" in scfm.load(folder, strict=False).load_report.dropped


def test_missing_transformer_weights(folder):
    _edit(folder / "best_model.pt", lambda s: s.pop("transformer_encoder.layers.1.self_attn.Wqkv.weight"))
    with pytest.raises(scfm.CheckpointError, match=r"layers\.1\.qkv\.weight"):
        scfm.load(folder)


def test_vocabulary_of_another_model(folder):
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(list(vocab)[:100])}))
    with pytest.raises(scfm.CheckpointError, match="different models"):
        scfm.load(folder)


def test_gaps_in_the_vocabulary(folder):
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab[next(iter(vocab))] += 10_000
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(scfm.CheckpointError, match="without gaps"):
        scfm.load(folder)


def test_number_of_heads_is_needed(folder):
    args = json.loads((folder / "args.json").read_text())
    del args["nheads"]
    (folder / "args.json").write_text(json.dumps(args))
    with pytest.raises(scfm.CheckpointError, match="nheads"):
        scfm.load(folder)
    assert scfm.load(folder, args={"nheads": 4}).config.n_heads == 4


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_weights(folder, content):
    path = folder / "best_model.pt"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(scfm.CheckpointError, match=r"best_model\.pt"):
        scfm.load(folder)


def test_code_in_a_file_is_not_run(folder):
    import pickle

    marker = folder / "executed"

    class Attack:
        def __reduce__(self):
            return (type(marker).touch, (marker,))

    (folder / "best_model.pt").write_bytes(pickle.dumps({"encoder.embedding.weight": Attack()}))
    with pytest.raises(scfm.CheckpointError):
        scfm.load(folder)
    assert not marker.exists()
