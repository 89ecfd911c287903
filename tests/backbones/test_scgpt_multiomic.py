"""The multi-omic network of scGPT: against the reference implementation, and what holds for any model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import scfm
from scfm.backbones import random_copy, rebuilt
from scfm.backbones.scgpt import TokenDraws
from scfm.backbones.scgpt.finetune import finetune_loss
from scfm.backbones.scgpt.modality import modality_names, multiomic_vocab
from scfm.genes import GeneVocab

VARIANTS = ("mod_batch", "mod_only", "batch_only_zp", "mod_batch_zp")
TOLERANCE = {"atol": 3e-4, "rtol": 1e-4}


def close(actual, expected, **tolerance):
    actual = actual.detach().numpy() if torch.is_tensor(actual) else np.asarray(actual)
    np.testing.assert_allclose(actual, expected, **tolerance)


# -- the reference -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=VARIANTS)
def case(request, golden):
    """Golden case, variant, model, its tokens with true values, and the mask."""
    data = golden("scgpt", "multiomic")
    config = data.case["config"]
    pad = config["pad_id"]
    names = [f"gene{i}" for i in range(config["ntoken"])]
    names[pad : pad + 3] = "<pad>", "<cls>", "<eoc>"
    path = data.path / "checkpoint" / f"{request.param}.pt"
    backbone = scfm.load(path, args={**config, **config["variants"][request.param], "dropout": 0.0}, vocab=names)
    assert backbone.load_report.ok
    backbone.module.train().requires_grad_(requires_grad=True)
    options = config["variants"][request.param]
    labels = {"batch_labels": data.input["batch_labels"]} if options["use_batch_labels"] else {}
    modalities = {"modalities": data.input["mod_types"]} if options["use_mod"] else {}

    def tokens(values):
        return backbone.batch(data.input["genes"], data.input[values], **labels, **modalities)

    return data, request.param, backbone, tokens


def test_config_of_each_file(case):
    data, variant, backbone, _ = case
    options, config = data.case["config"]["variants"][variant], backbone.config
    assert config.multiomic
    assert config.modalities == (("ATAC", "Protein", "RNA", "<pad>", "<cls>", "<eoc>") if options["use_mod"] else ())
    assert config.use_batch_labels == options["use_batch_labels"]
    assert config.discriminator == options["do_dab"]
    assert config.explicit_zeros == options.get("explicit_zero_prob", False)
    assert config.mvc == "inner product"


def test_outputs(case):
    data, variant, backbone, tokens = case
    shown = tokens("values")
    out, valid = backbone.forward(shown), ~shown.padding
    wanted = {
        "mlm_output": out.expression.values,
        "mlm_zero_probs": out.expression.nonzero,
        "mvc_output": out.cell_expression.values,
        "mvc_zero_probs": out.cell_expression.nonzero,
        "cell_emb": out.cells,
        "dab_output": out.batch_logits,
    }
    stored = {key.removeprefix(f"{variant}__") for key in data.expected.files if key.startswith(f"{variant}__")}
    compared = {name for name in wanted if name in stored}
    assert len(compared) >= 3
    assert {name for name in stored if not name.startswith(("loss", "grad", "total"))} == compared
    for name in compared:
        expected = data.expected[f"{variant}__{name}"]
        if expected.shape == valid.shape:
            close(wanted[name][valid], expected[valid], err_msg=name, **TOLERANCE)
        else:
            close(wanted[name], expected, err_msg=name, **TOLERANCE)


def test_losses_and_gradients(case):
    data, variant, backbone, tokens = case
    truth = tokens("target")
    mask = torch.as_tensor(data.input["values"] == -1)[~truth.padding]
    options = data.case["config"]["variants"][variant]
    loss = finetune_loss(backbone, truth, mask=mask, ecs_weight=0, dar_weight=float(options["do_dab"]))
    parts = {"loss_gep": loss.gep, "loss_gepc": loss.gepc, "loss_dab": loss.dar, "loss": loss.total}
    for name, value in parts.items():
        if (key := f"{variant}__{name}") in data.expected.files:
            close(value, data.expected[key], err_msg=name, **TOLERANCE)
        else:
            assert name == "loss_dab"
            assert value == 0
    zeros = float(data.expected[f"{variant}__loss"]) - (loss.gep + loss.gepc + loss.dar).item()
    assert (loss.gep_zero + loss.gepc_zero).item() == pytest.approx(zeros, abs=1e-3)
    loss.total.backward()
    ours = {name: p.grad.norm().item() for name, p in backbone.module.named_parameters() if p.grad is not None}
    renamed = backbone.load_report.renamed
    names, norms = data.expected[f"{variant}__grad_names"], data.expected[f"{variant}__grad_norms"]
    assert {renamed.get(name, name) for name in names} == ours.keys()
    for name, norm in zip(names, norms, strict=True):
        assert ours[renamed.get(name, name)] == pytest.approx(norm, rel=1e-3), name
    total = torch.nn.utils.clip_grad_norm_(backbone.module.parameters(), 1.0).item()
    assert total == pytest.approx(float(data.expected[f"{variant}__total_grad_norm"]), rel=1e-3)


def test_modalities_of_the_vocabulary_are_those_given_by_hand(case):
    """A file does not say what is a gene and what a peak; once it is said, nothing has to be given with the tokens."""
    data, _, backbone, _ = case
    if not backbone.config.modalities:
        pytest.skip("a network without modalities")
    labels = {"batch_labels": data.input["batch_labels"]} if backbone.config.use_batch_labels else {}
    arrays = data.input["genes"], data.input["values"]
    with pytest.raises(ValueError, match="give all with set_modalities"):
        backbone.forward(backbone.batch(*arrays, **labels))
    kinds = np.random.default_rng(0).choice(["ATAC", "Protein", "RNA"], backbone.vocab.n_genes)
    genes = backbone.vocab.genes
    features = {kind: genes[kinds == kind] for kind in ("ATAC", "Protein", "RNA")}
    backbone.set_modalities(features)
    lookup = dict(zip(genes, kinds, strict=True))
    by_hand = [
        [backbone.config.modalities.index(lookup.get(name, name)) for name in row]
        for row in backbone.vocab.names[arrays[0]]
    ]
    backbone.module.eval()
    first = backbone.forward(backbone.batch(*arrays, **labels))
    second = backbone.forward(backbone.batch(*arrays, modalities=by_hand, **labels))
    assert torch.equal(first.expression.values, second.expression.values)
    assert torch.equal(first.cell_expression.values, second.cell_expression.values)
    again = scfm.load(
        data.path / "checkpoint" / f"{case[1]}.pt",
        args=data.case["config"],
        vocab=backbone.vocab,
        modalities=features,
    )
    torch.testing.assert_close(again.forward(again.batch(*arrays, **labels)).expression.values, first.expression.values)


# -- networks made here --------------------------------------------------------------------------------------------------

RNA = [f"GENE{i}" for i in range(12)]
ATAC = [f"chr1:{i}-{i + 500}" for i in range(0, 8000, 1000)]
PROTEIN = ["p_CD3", "p_CD19", "p_CD56", "p_CD14"]
FEATURES = {"RNA": RNA, "ATAC": ATAC, "Protein": PROTEIN}


@pytest.fixture
def multiome(tiny_scgpt):
    """``multiome(**config)``: a tiny pre-trained network with peaks and proteins beside its genes."""

    def make(**config):
        pretrained = tiny_scgpt(30)
        vocab = multiomic_vocab(pretrained.vocab, FEATURES)
        settings = {"multiomic": True, "modalities": modality_names(FEATURES), **config}
        kept = (r"genes\.embedding\.weight", r"genes\.norm\.weight")
        backbone = rebuilt(pretrained, replace(pretrained.config, **settings), vocab=vocab, include=kept, seed=4)
        if backbone.config.modalities:
            backbone.set_modalities(FEATURES)
        return backbone

    return make


def counts_of(seed, n_cells=5):
    rng = np.random.default_rng(seed)
    dense = rng.poisson(rng.gamma(1.0, 2.0, (1, len(RNA + ATAC + PROTEIN))), (n_cells, len(RNA + ATAC + PROTEIN)))
    dense[:, 0] += 1
    return sparse.csr_matrix(dense.astype(np.float32))


def test_vocabulary_and_weights_of_a_pretrained_model(tiny_scgpt, multiome):
    pretrained, backbone = tiny_scgpt(30), multiome()
    vocab = backbone.vocab
    assert vocab.specials == pretrained.vocab.specials
    assert [*vocab.names] == ["<pad>", "<cls>", "<eoc>", *RNA, *ATAC, *PROTEIN]
    old, new = pretrained.module.state_dict(), backbone.module.state_dict()
    rows = pretrained.vocab.get_ids(vocab.names)
    assert torch.equal(new["genes.embedding.weight"][:15], old["genes.embedding.weight"][rows[:15]])
    report = backbone.load_report
    assert report.loaded == ["genes.embedding.weight", "genes.norm.weight"]
    assert report.partly == {"genes.embedding.weight": (15, len(vocab))}
    assert "genes.norm.bias" in report.fresh
    assert not torch.equal(new["layers.0.qkv.weight"], old["layers.0.qkv.weight"])


def test_vocabularies_that_cannot_be_made(tiny_scgpt):
    vocab = tiny_scgpt(30).vocab
    with pytest.raises(ValueError, match="'p_' before the names of proteins"):
        multiomic_vocab(vocab, {"RNA": ["GENE1", "GENE2"], "Protein": ["GENE2"]})
    with pytest.raises(ValueError, match="special token"):
        multiomic_vocab(vocab, {"RNA": ["<cls>"]})
    ids = GeneVocab(["<pad>", "A", "B"], specials=["<pad>"], ensembl_ids=["", "ENSG00000000001", "ENSG00000000002"])
    made = multiomic_vocab(ids, {"RNA": ["B"], "ATAC": ["peak"]})
    assert made.to_dict() == {
        "names": ["<pad>", "B", "peak"],
        "specials": ["<pad>"],
        "ensembl_ids": ["", "ENSG00000000002", ""],
    }


def test_modality_is_no_part_of_the_cell_embedding(multiome):
    backbone = multiome()
    tokens = backbone.tokenize(counts_of(0), RNA + ATAC + PROTEIN)
    before, decoded = backbone.embed(tokens), backbone.reconstruct(tokens)
    backbone.set_modalities({"RNA": RNA + ATAC + PROTEIN})
    assert torch.equal(backbone.embed(tokens), before)
    assert not torch.allclose(backbone.reconstruct(tokens), decoded, equal_nan=True)


@pytest.mark.parametrize("decoder", ["genes", "cell"])
def test_padding_and_other_cells_change_nothing(multiome, decoder):
    backbone = multiome(n_batches=3, use_batch_labels=True)
    labels = np.array([2, 0, 1, 1, 0])
    tokens = backbone.tokenize(counts_of(1), RNA + ATAC + PROTEIN, batch_labels=labels)
    assert not tokens.is_rectangular
    together = backbone.reconstruct(tokens, decoder=decoder)
    for cell in range(5):
        alone = backbone.reconstruct(tokens.select([cell]), decoder=decoder)
        torch.testing.assert_close(together[cell, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)


def test_values_of_chosen_features_from_cell_embeddings(multiome):
    backbone = multiome(n_batches=2, use_batch_labels=True)
    tokens = backbone.tokenize(counts_of(2, 11), RNA + ATAC + PROTEIN, batch_labels=np.arange(11) % 2)
    rows = next(backbone.iter_reconstruction(tokens, ["p_CD3", "GENE0"]))
    first = rows.cells.view(-1, 2)[:, 0]
    assert first.tolist() == list(range(8))
    with torch.inference_mode():
        out = backbone.forward(tokens)
    gene = backbone.vocab["GENE0"]
    for cell in range(8):
        place = (tokens.ids[cell] == gene).nonzero().item()
        torch.testing.assert_close(rows.values[2 * cell + 1], out.cell_expression.values[cell, place])
    total = torch.cat([part.values for part in backbone.iter_reconstruction(tokens, ["p_CD3", "GENE0"])])
    assert len(total) == 22


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), rule=st.sampled_from(["left", "random"]), zeros=st.booleans())
def test_each_modality_is_binned_by_itself(seed, rule, zeros):
    from scfm.backbones import from_config
    from scfm.backbones.scgpt import SCGPTConfig

    names = RNA + ATAC + PROTEIN
    vocab = GeneVocab(["<pad>", "<cls>", "<eoc>", *names], specials=["<pad>", "<cls>", "<eoc>"])
    small = {"dim": 8, "n_heads": 2, "ffn_dim": 8, "n_layers": 1}
    plain = from_config("scgpt", SCGPTConfig(**small), vocab)
    backbone = from_config("scgpt", SCGPTConfig(**small, multiomic=True, modalities=modality_names(FEATURES)), vocab)
    backbone.set_modalities(FEATURES)
    counts = counts_of(seed)
    uniforms = sparse.csr_matrix(
        (np.random.default_rng(seed).random(counts.nnz), counts.indices, counts.indptr), counts.shape
    )
    order = np.random.default_rng(seed).permutation(len(names))
    shuffled, draws = counts[:, order], uniforms[:, order]
    shuffled.sort_indices()
    draws.sort_indices()
    options = {"tie_break": rule, "include_zeros": zeros}
    given = TokenDraws(uniform=np.split(draws.data, draws.indptr[1:-1])) if rule == "random" else None
    tokens = backbone.tokenize(shuffled, np.array(names)[order], draws=given, **options)
    bins = {
        (cell, gene): value
        for cell, gene, value in zip(
            *map(torch.Tensor.tolist, (tokens.flat_cells, tokens.flat_ids, tokens.flat_values)), strict=True
        )
        if gene > 2
    }
    compared = 0
    for members in FEATURES.values():
        columns = [names.index(name) for name in members]
        part, part_draws = counts[:, columns], uniforms[:, columns]
        given = TokenDraws(uniform=np.split(part_draws.data, part_draws.indptr[1:-1])) if rule == "random" else None
        alone = plain.tokenize(part, members, draws=given, **options)
        for cell, gene, value in zip(
            alone.flat_cells.tolist(), alone.flat_ids.tolist(), alone.flat_values.tolist(), strict=True
        ):
            # zeros of a modality without any value are no measurements
            if gene > 2 and part[cell].nnz:
                assert bins[cell, gene] == value
                compared += 1
    assert compared == len(bins)


def test_zeros_of_a_modality_that_was_not_measured_are_no_tokens(multiome):
    backbone, names = multiome(), np.array(RNA + ATAC + PROTEIN)
    counts = counts_of(7).toarray()
    counts[:, :12] += 1
    counts[[0, 3], 20:] = 0
    counts[[1, 3], 12:20] = 0
    counts[2, 12:20] = [1, 0, 0, 0, 0, 0, 0, 0]
    tokens = backbone.tokenize(sparse.csr_matrix(counts), names, include_zeros=True)
    for cell in range(5):
        found = tokens.select([cell])
        expected = [part for part in FEATURES.values() if counts[cell, np.isin(names, part)].any()]
        assert [*backbone.vocab.names[found.flat_ids]] == ["<cls>", *(name for part in expected for name in part)]
        bins = found.flat_values.numpy()[1:]
        kept = np.isin(names, np.concatenate(expected))
        np.testing.assert_array_equal(bins == 0, counts[cell, kept] == 0)
    counts[4] = 0
    nothing = backbone.tokenize(sparse.csr_matrix(counts), names, include_zeros=True)
    assert nothing.valid.tolist() == [True, True, True, True, False]
    assert nothing.lengths[4] == 1


def test_ties_are_spread_by_content(multiome):
    backbone = multiome()
    names = np.array(RNA + ATAC + PROTEIN)
    order = np.random.default_rng(1).permutation(len(names))
    first, second = (backbone.tokenize(counts_of(3)[:, o], names[o]) for o in (np.arange(len(names)), order))
    for a, b in ((first.select([cell]), second.select([cell])) for cell in range(5)):
        assert dict(zip(a.flat_ids.tolist(), a.flat_values.tolist(), strict=True)) == dict(
            zip(b.flat_ids.tolist(), b.flat_values.tolist(), strict=True)
        )


@pytest.mark.parametrize("style", ["inner product", "inner product, detach", "concat query", "sum query"])
@pytest.mark.parametrize("labels", [True, False])
def test_every_cell_decoder_saves_loads_and_has_gradients(multiome, tmp_path, style, labels):
    backbone = multiome(mvc=style, n_batches=2, use_batch_labels=labels, discriminator=True)
    tokens = backbone.tokenize(counts_of(4), RNA + ATAC + PROTEIN, batch_labels=np.array([0, 1, 1, 0, 1]))
    backbone.module.requires_grad_(requires_grad=True)
    loss = finetune_loss(backbone, tokens, torch.Generator().manual_seed(0), ecs_weight=0)
    loss.total.backward()
    for name in ("modalities.embedding.weight", "mvc.gene2query.weight", "discriminator.out.weight"):
        assert backbone.module.get_parameter(name).grad.abs().sum() > 0
    assert backbone.module.modalities.embedding.weight.grad[3].abs().sum() == 0  # <pad>
    loaded = scfm.load(backbone.save(tmp_path / "saved"))
    assert loaded.config == backbone.config
    assert json.loads(json.dumps(backbone.config_to_dict())) == backbone.config_to_dict()
    assert isinstance(hash(loaded.config), int)
    torch.testing.assert_close(loaded.reconstruct(tokens), backbone.reconstruct(tokens), equal_nan=True)


def test_shapes_of_official_files_tell_the_config(multiome):
    from scfm.backbones.scgpt.config import infer_config

    for changes in (
        {},
        {"n_batches": 2, "use_batch_labels": True},
        {"n_batches": 2, "use_batch_labels": True, "modalities": ()},
        {"mvc": "sum query"},
        {"mvc": "concat query", "n_batches": 2, "use_batch_labels": True},
    ):
        backbone = multiome(**changes, n_classes=4)
        args = {"nheads": 2, "vocab_mod": {name: i for i, name in enumerate(backbone.config.modalities)}}
        assert infer_config(backbone.module.state_dict(), args) == backbone.config
    unnamed = infer_config(backbone.module.state_dict(), {"nheads": 2})
    assert unnamed.modalities == ("modality_0", "modality_1", "modality_2", "<pad>", "<cls>", "<eoc>")
    with pytest.raises(ValueError, match="vocab_mod must give the ids 0 to 5"):
        infer_config(backbone.module.state_dict(), {"nheads": 2, "vocab_mod": {"RNA": 0}})


def test_random_copies_and_other_genes_keep_modalities(multiome):
    backbone = multiome()
    tokens = backbone.tokenize(counts_of(5), RNA + ATAC + PROTEIN)
    assert torch.isfinite(random_copy(backbone).forward(tokens).expression.values).all()
    vocab = multiomic_vocab(backbone.vocab, {"RNA": [*RNA[:3], "GENE99"], "ATAC": ATAC[2:4]})
    smaller = rebuilt(backbone, backbone.config, vocab=vocab)
    old, new = (b.module.state_dict()["modality_of_token"] for b in (backbone, smaller))
    known = backbone.vocab.get_ids(vocab.names)
    assert torch.equal(new[known >= 0], old[known[known >= 0]])
    assert new[vocab["GENE99"]] == -1
    with pytest.raises(ValueError, match="modality of 'GENE99'"):
        smaller.tokenize(counts_of(5)[:, :2], ["GENE0", "GENE99"])


def test_generation_and_pretraining_see_the_modality(multiome):
    backbone = multiome()
    tokens = backbone.tokenize_for_training(counts_of(6), RNA + ATAC + PROTEIN, torch.Generator())
    losses = [backbone.pretraining_loss(tokens, torch.Generator().manual_seed(0)).total for _ in range(2)]
    assert losses[0] == losses[1]
    queries = np.tile(backbone.vocab.get_ids(["p_CD3", "GENE1"]), (2, 1))
    prompt = backbone.batch(tokens.select([0, 1]).ids, tokens.select([0, 1]).values, query_genes=queries)
    values = backbone.generate(prompt, steps=2)
    assert torch.isfinite(values).all()
    backbone.set_modalities({"RNA": RNA + ATAC + PROTEIN})
    assert backbone.pretraining_loss(tokens, torch.Generator().manual_seed(0)).total != losses[0]
    assert not torch.allclose(backbone.generate(prompt), values)
    by_hand = replace(prompt, per_token={"modality": torch.full_like(prompt.flat_ids, 2)})
    with pytest.raises(ValueError, match="takes modalities from the vocabulary"):
        backbone.generate(by_hand, steps=2)


def test_explicit_modalities_follow_their_tokens(multiome):
    backbone = multiome()
    tokens = backbone.tokenize(counts_of(7), RNA + ATAC + PROTEIN)
    given = backbone._modalities_of(tokens.ids)
    by_hand = backbone.batch(tokens.ids, tokens.values, modalities=given)
    assert by_hand.per_token["modality"].shape == by_hand.flat_ids.shape
    some = by_hand.select([3, 1])
    assert torch.equal(some.padded(some.per_token["modality"], 3), backbone._modalities_of(tokens.select([3, 1]).ids))
    torch.testing.assert_close(backbone.forward(by_hand).expression, backbone.forward(tokens).expression)
    generator = torch.Generator().manual_seed(0)
    first = backbone.pretraining_loss(tokens, generator).total
    assert backbone.pretraining_loss(by_hand, generator.manual_seed(0)).total == first


# -- errors --------------------------------------------------------------------------------------------------------------


def test_wrong_modalities(multiome, tiny_scgpt):
    backbone = multiome()
    tokens = backbone.tokenize(counts_of(8), RNA + ATAC + PROTEIN)
    for wrong in (np.zeros((5, 2)), np.full(tokens.ids.shape, 6), np.full(tokens.ids.shape, -1)):
        with pytest.raises(ValueError, match="numbers from 0 to 5"):
            backbone.batch(tokens.ids, tokens.values, modalities=wrong)
    with pytest.raises(ValueError, match="this model has none"):
        tiny_scgpt(30).batch(tokens.ids, tokens.values, modalities=np.zeros(tokens.ids.shape))
    with pytest.raises(ValueError, match="has no modalities"):
        tiny_scgpt(30).set_modalities(FEATURES)
    with pytest.raises(ValueError, match="'Methylation' is no modality of this model; it has ATAC, Protein, RNA"):
        backbone.set_modalities({"Methylation": RNA})
    with pytest.raises(ValueError, match="1 of the 2 features of RNA are not in the vocabulary, e.g. 'GENE77'"):
        backbone.set_modalities({"RNA": ["GENE1", "GENE77"]})
    with pytest.raises(ValueError, match="occur more than once, e.g. 'GENE1'"):
        backbone.set_modalities({"RNA": ["GENE1"], "ATAC": ["GENE1"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"multiomic": False}, "set multiomic=True"),
        ({"modalities": ("RNA", "ATAC")}, "special tokens '<pad>' and '<cls>'"),
        ({"modalities": ("RNA", "RNA", "<pad>", "<cls>")}, "a name of its own"),
    ],
)
def test_configs_that_cannot_be(multiome, settings, message):
    with pytest.raises(ValueError, match=message):
        multiome(**settings)


def test_modalities_of_a_file_without_them(golden):
    data = golden("scgpt", "embed_cells")
    with pytest.raises(scfm.CheckpointError, match="no model of several modalities"):
        scfm.load(data.path / "checkpoint", modalities={"RNA": ["A"]})
