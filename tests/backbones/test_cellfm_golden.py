"""CellFM against the authors' MindSpore code and their PyTorch port, through the public contract."""

from __future__ import annotations

import re
import zlib

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

import scfm
from scfm.backbones.cellfm import TokenDraws, aliases
from scfm.backbones.cellfm.checkpoint import config_of
from scfm.backbones.cellfm.gene_list import PAD, make_vocab
from scfm.backbones.cellfm.heads import ClassScores, classification_loss
from scfm.backbones.cellfm.keys import KEY_TABLE
from scfm.backbones.cellfm.objective import Corrupted, Draws, corrupt, draw, masked_loss
from scfm.backbones.cellfm.tokenizer import cap_depth
from scfm.checkpoints import mindspore
from scfm.checkpoints.convert import rename
from scfm.genes import GeneVocab

CONTAINERS = ("plain", "with_crc", "with_scalars", "sliced")


def close(actual, expected, tolerance):
    """The rule of the fixtures: absolute, or relative to the largest number."""
    actual = actual.detach().numpy() if torch.is_tensor(actual) else np.asarray(actual)
    assert actual.shape == expected.shape
    bound = tolerance["atol"] + tolerance["rtol"] * np.abs(expected).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


@pytest.fixture
def load(golden, shared):
    def of(case, **options):
        data = golden("cellfm", case)
        config = data.case["config"]
        if "vocabulary" in config:
            options.setdefault("genes", shared("data", "vocab", "cellfm", config["vocabulary"]))
        else:
            options.setdefault("genes", [f"G{i}" for i in range(1, config["n_genes"] + 1)])
        options.setdefault("n_heads", config["enc_num_heads"])
        backbone = scfm.load(data.path / "checkpoint", **options)
        assert backbone.load_report.ok
        assert backbone.config.n_genes == config["n_genes"]
        assert backbone.config.n_layers == config["enc_nlayers"]
        return data, backbone

    return of


def upstream_gradients(backbone, source):
    """Gradients under the names of a file, for fused projections cut into what they were joined from."""
    gradients = {name: p.grad for name, p in backbone.module.named_parameters() if p.grad is not None}
    out = {}
    for key in source:
        rule, match = next((r, m) for r in KEY_TABLE if (m := re.fullmatch(r.pattern, key)))
        if rule.target is None or (gradient := gradients.get(match.expand(rule.target))) is None:
            continue
        if rule.part is not None:
            gradient = gradient.chunk(rule.part[1])[rule.part[0]]
        out[key] = gradient
    return out


def check_gradients(data, backbone, prefix="train", slack=1):
    tolerance = data.case["tolerance"]
    norms = {k.removeprefix(f"{prefix}/gradnorm/"): float(v) for k, v in data.expected.items() if "/gradnorm/" in k}
    assert norms
    actual = upstream_gradients(backbone, norms)
    largest = max(norms.values())
    for key, expected in norms.items():
        got = float(actual[key].norm()) if key in actual else 0.0
        assert got == pytest.approx(
            expected, rel=tolerance["grad_rtol"], abs=tolerance["grad_rtol"] * largest * 1e-2
        ), key
    for key in data.expected:
        if key.startswith(f"{prefix}/grad/"):
            expected = data.expected[key]
            gradient = actual.get(key.removeprefix(f"{prefix}/grad/"), torch.zeros(expected.shape))
            bound = slack * tolerance["grad_rtol"] * np.abs(expected).max()
            np.testing.assert_allclose(gradient.reshape(expected.shape), expected, rtol=0, atol=bound, err_msg=key)


def trainable(backbone):
    backbone.module.requires_grad_(requires_grad=True)
    return backbone.module


def padded(flat, tokens, length):
    """Values of tokens as upstream lays them out, zero at padding."""
    out = np.zeros((len(tokens), length, *flat.shape[1:]), dtype=np.float32)
    out[np.arange(length) < tokens.lengths.numpy()[:, None]] = flat.detach().numpy()
    return out


def real(array, tokens):
    """Entries of a padded array that are no padding."""
    return array[:, : tokens.max_length][~tokens.padding.numpy()]


# -- the container -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTAINERS)
def test_genuine_files(golden, name):
    data = golden("cellfm", "ckpt_container")
    file = mindspore.MindSporeFile(data.path / "checkpoint" / f"{name}.ckpt", check_crc=True)
    tensors = file.read()
    for key in data.case["order"]:
        assert tensors[key].numpy().dtype == data.expected[key].dtype
        np.testing.assert_array_equal(tensors[key].numpy(), data.expected[key])
    extra = set(tensors) - set(data.case["order"])
    if name == "with_scalars":
        appended = data.case["appended"]
        assert {key: tensors[key].item() for key in extra} == {k: v for k, v in appended.items() if k != "note"}
        assert file.text("note") == appended["note"]
    else:
        assert not extra


def test_genuine_bfloat16(golden):
    data = golden("cellfm", "ckpt_container")
    tensor = mindspore.read(data.path / "checkpoint" / "bfloat16.ckpt")["bf"]
    assert tensor.dtype == torch.bfloat16
    np.testing.assert_array_equal(tensor.float().numpy(), data.expected["__bf16_as_float32"])


# -- from the file to tokens ---------------------------------------------------------------------------------------------


def test_alias_rules_of_notebook_and_port(golden, shared):
    data = golden("cellfm", "alias_mapping")
    table = aliases.alias_map(data.path / "hgnc_like.tsv")
    assert table == data.case["alias_dictionary"]
    vocab = make_vocab(data.path, 27856, shared("data", "vocab", "cellfm", data.case["vocabulary"]))
    genes = data.input["genes"]
    assert aliases.notebook_names(genes, vocab, table).tolist() == data.expected["notebook_new_name"].tolist()
    mapped = aliases.port_names(genes, vocab, table)
    assert mapped[mapped != ""].tolist() == data.expected["port_mapped"].tolist()
    assert genes[mapped == ""].tolist() == data.expected["port_failed"].tolist()


def pretraining_data(golden, shared):
    data = golden("cellfm", "preprocess_pretrain")
    path = shared("data", "vocab", "cellfm", data.case["config"]["vocabulary"])
    vocab = make_vocab(data.path, 24080, path)
    config = scfm.backbones.cellfm.CellFMConfig(n_genes=vocab.n_genes, dim=8, n_heads=2)
    backbone = scfm.backbones.from_config("cellfm", config, vocab)
    return data, backbone, anndata.read_h5ad(data.path / "input.h5ad")


def test_depth_cap_and_totals(golden, shared):
    data, backbone, adata = pretraining_data(golden, shared)
    tokens = backbone.tokenize(adata.X, adata.var_names, max_length=None)
    np.testing.assert_array_equal(tokens.per_cell["total"].numpy(), data.expected["all/T"])
    counts, ids = backbone.vocab.match(adata.var_names).collapse(cap_depth(sparse.csr_matrix(adata.X)))
    order = np.argsort(backbone.vocab.names[ids])
    assert ids[order].tolist() == data.expected["all/gene_ids"].tolist()
    np.testing.assert_array_equal(counts.toarray()[:, order], data.expected["all/counts"])
    np.testing.assert_array_equal(tokens.lengths, (data.expected["all/counts"] > 0).sum(1))
    np.testing.assert_array_equal(tokens.valid, data.expected["all/T"] > 0)


def test_pretraining_tokens(golden, shared):
    data, backbone, adata = pretraining_data(golden, shared)
    length = data.case["config"]["pad_len"]
    kept = [row[row > 0] for row in data.expected["tokens/gene"]]
    rows = adata.obs_names.get_indexer(data.expected["filtered/cell_names"])
    tokens = backbone.tokenize(
        adata.X[rows], adata.var_names, max_length=length, sampling="weighted", draws=TokenDraws(kept)
    )
    np.testing.assert_array_equal(tokens.lengths, data.expected["tokens/length"])
    for i in range(len(tokens)):
        cell = tokens.select([i])
        order = np.argsort(backbone.vocab.names[cell.flat_ids])
        np.testing.assert_array_equal(cell.flat_ids[order], kept[i])
        close(cell.flat_values[order], data.expected["tokens/value"][i, : len(kept[i])], data.case["tolerance"])
    draws = draw(tokens, torch.Generator().manual_seed(0), mask_ratio=0.2, hidden_share=0.8)
    per_cell = torch.zeros(2, len(tokens), dtype=torch.int64)
    per_cell = per_cell.index_add(1, tokens.flat_cells, torch.stack([draws.in_loss, draws.hidden]).long())
    real_tokens = np.arange(length) < data.expected["tokens/length"][:, None]
    np.testing.assert_array_equal(per_cell[0], data.expected["tokens/mask_gene"].sum(1))
    np.testing.assert_array_equal(
        per_cell[1], ((data.expected["tokens/masked_value"][..., 0] == 0) & real_tokens).sum(1)
    )
    assert not (draws.hidden & ~draws.in_loss).any()


def test_read_depth_pipeline(golden, shared):
    data, backbone, adata = pretraining_data(golden, shared)
    expected, length = {k.removeprefix("depth/"): v for k, v in data.expected.items() if k.startswith("depth/")}, 480
    expressed = expected["zero_idx"] > 0
    kept = [np.sort(row[there]) for row, there in zip(expected["gene"], expressed, strict=True)]
    rows = adata.obs_names.get_indexer(data.expected["filtered/cell_names"])
    known = np.isin(adata.var_names, data.expected["filtered/genes"])
    tokens = backbone.tokenize(
        adata.X[rows],
        np.where(known, adata.var_names, [f"other{i}" for i in range(adata.n_vars)]),  # they count in the cap only
        max_length=length,
        draws=TokenDraws(kept),
        with_unexpressed=True,
    )
    np.testing.assert_array_equal(tokens.per_cell["total"], expected["T"])
    # what is random is injected, what follows from it is compared
    order = [np.argsort(row[there]) for row, there in zip(expected["gene"], expressed, strict=True)]
    given = zip(expected["downsampled_counts"], expressed, order, strict=True)
    counts = np.concatenate([row[there][by_id] for row, there, by_id in given])
    nothing = torch.zeros(len(counts), dtype=torch.bool)
    thinned = torch.from_numpy(expected["S"] != expected["T"])
    batch = corrupt(tokens, Draws(nothing, nothing, torch.from_numpy(counts), thinned), backbone.config)
    close(batch.depths, expected["ST_feat"], data.case["tolerance"])
    for i, by_id in enumerate(order):
        cell = tokens.flat_cells == i
        shown = expected["input_value"][i][expressed[i]][by_id]
        visible = shown[:, 0] > 0
        close(batch.tokens.flat_values[cell][visible], shown[visible, 1], data.case["tolerance"])
        close(batch.target[cell], expected["raw_value"][i][expressed[i]][by_id], data.case["tolerance"])
    # how many are hidden and predicted
    generator, options = torch.Generator().manual_seed(0), {"mask_ratio": 0.5, "hidden_share": 0.8}
    batch = corrupt(tokens, draw(tokens, generator, zero_length=length, **options), backbone.config)
    cells = batch.tokens.flat_cells.numpy()
    hidden = expected["input_value"][..., 0] == 0
    for zeros, there in ((False, expressed), (True, ~expressed)):
        ours = batch.unexpressed.numpy() == zeros
        for flags, upstream in ((batch.hidden, hidden), (batch.in_loss, expected["mask_gene"] > 0)):
            np.testing.assert_array_equal(
                np.bincount(cells[flags.numpy() & ours], minlength=6), (upstream & there).sum(1)
            )


# -- forward passes and losses -------------------------------------------------------------------------------------------


def pretraining_batch(data, backbone):
    tokens = backbone.batch(data.input["gene"], data.input["value"])
    flags = real(data.input["masked_value"], tokens)
    shown = torch.from_numpy(flags[:, 0] > 0)
    in_loss = torch.from_numpy(real(data.input["mask_gene"], tokens) > 0)
    return Corrupted(tokens, ~shown, in_loss, tokens.flat_values)


PRETRAINING = ("ms_pretrain_padzero", "ms_pretrain_lora")


@pytest.mark.parametrize("merge_lora", [True, False])
@pytest.mark.parametrize("kind", ["masked3d", "unmasked2d"])
@pytest.mark.parametrize("case", PRETRAINING)
def test_root_model(load, case, kind, merge_lora):
    data, backbone = load(case, merge_lora=merge_lora)
    tolerance, module, length = data.case["tolerance"], backbone.module, data.case["pad_len"]
    batch = pretraining_batch(data, backbone)
    tokens = batch.tokens
    options = {"hidden": batch.hidden} if kind == "masked3d" else {"padded_length": length}
    expected = {k.removeprefix(f"{kind}/"): v for k, v in data.expected.items() if k.startswith(kind)}
    with torch.inference_mode():
        for i in range(backbone.config.n_layers):
            sequences = module.sequences(tokens, **options)
            states = module.encode(sequences, n_layers=i + 1)
            close(states[sequences.first], expected[f"layer{i}_out"][:, 0], tolerance)
            close(states[sequences.genes], real(expected[f"layer{i}_out"][:, 1:], tokens), tolerance)
        close(module.predict_genes(states[sequences.genes]), real(expected["gw_pred"], tokens), tolerance)
        cells = states[sequences.first]
        close(cells, expected["cell_emb"], tolerance)
        every = module.predict_from_cells(cells, torch.arange(len(backbone.vocab)))
        close(every[tokens.flat_cells, tokens.flat_ids], real(expected["cw_pred"], tokens), tolerance)
        table = backbone.gene_embeddings()[tokens.flat_ids]
        close(table, real(expected["gene_table_rows"], tokens), tolerance)
    if kind == "unmasked2d":
        close(backbone.embed(tokens, forward="root", padded_length=length), expected["cell_emb"], tolerance)
        values = module.embed_genes(tokens) - module.gene_embedding(tokens.flat_ids)
        close(values, real(expected["value_emb"], tokens), tolerance)


@pytest.mark.parametrize("case", PRETRAINING)
def test_pretraining_loss_and_gradients(load, case):
    data, backbone = load(case, merge_lora=False)
    tolerance = data.case["tolerance"]
    loss = masked_loss(trainable(backbone), pretraining_batch(data, backbone))
    close(loss.total, data.expected["train/loss"], tolerance)
    close(loss.genes, data.expected["train/loss_gene"], tolerance)
    close(loss.cells, data.expected["train/loss_cell"], tolerance)
    loss.total.backward()
    check_gradients(data, backbone)


def integration_batch(data, backbone):
    pad_zero = data.case["config"].get("pad_zero", True)
    zero_idx = data.input["zero_idx"]
    length = data.input["gene"].shape[1]
    zero_idx = zero_idx[:, zero_idx.shape[1] - length :]
    padding = zero_idx == 0 if pad_zero else np.zeros_like(zero_idx, dtype=bool)
    value = data.input["input_value"]
    tokens = backbone.batch(data.input["gene"], value[..., 1], padding=padding, depths=data.input["ST_feat"])
    flat = {name: torch.from_numpy(data.input[name][~padding]) for name in ("mask_gene", "raw_value", "input_value")}
    unexpressed = None if pad_zero else torch.from_numpy(zero_idx[~padding] == 0)
    batch = Corrupted(
        tokens,
        flat["input_value"][:, 0] == 0,
        flat["mask_gene"] > 0,
        flat["raw_value"],
        unexpressed,
        tokens.per_cell["depths"],
    )
    return batch, padding


@pytest.mark.parametrize("case", ["ms_integration_padzero", "ms_integration_zero_sampling"])
def test_integration_model(load, case):
    data, backbone = load(case)
    config, tolerance, module = data.case["config"], data.case["tolerance"], trainable(backbone)
    batch, padding = integration_batch(data, backbone)
    tokens, expected = batch.tokens, data.expected
    options = {"hidden": batch.hidden, "unexpressed": batch.unexpressed, "depths": batch.depths}
    with torch.inference_mode():
        tokens.flat_cells  # noqa: B018 (caches made here must not get into the way of gradients)
        close(module.depth_encoder(batch.depths), expected["ST_enc_out"], tolerance)
        for i in range(2):
            sequences = module.sequences(tokens, "depths", **options)
            states = module.encode(sequences, n_layers=i + 1)
            close(states[sequences.genes], expected[f"layer{i}_out"][:, 3:][~padding], tolerance)
            fronts = torch.stack([states[sequences.first + j] for j in range(3)], 1)
            close(fronts, expected[f"layer{i}_out"][:, :3], tolerance)
        close(module.predict_genes(states[sequences.genes]), expected["gw_pred"][~padding], tolerance)
        every = module.predict_from_cells(fronts[:, 0], torch.arange(len(backbone.vocab)))
        close(every[tokens.flat_cells, tokens.flat_ids], expected["cw_pred"][~padding], tolerance)
    loss = masked_loss(module, batch, zeros_over="all", similarity=config["ecs_threshold"] if config["ecs"] else None)
    close(loss.genes, expected["loss_mse_gene"], tolerance)
    close(loss.cells, expected["loss_mse_cell"], tolerance)
    assert (loss.zeros_genes is not None) == config["effective_add_zero"]
    if config["effective_add_zero"]:
        close(loss.zeros_genes, expected["loss_bce_gene"], tolerance)
        close(loss.zeros_cells, expected["loss_bce_cell"], tolerance)
    close(loss.total, expected["train/loss"], tolerance)
    loss.total.backward()
    check_gradients(data, backbone)


@pytest.mark.parametrize("case", ["ms_integration_padzero", "ms_integration_zero_sampling"])
def test_integration_embedding(load, case):
    data, backbone = load(case)
    zero_idx = data.input["zero_idx"]
    keep = zero_idx[:, zero_idx.shape[1] - data.input["gene"].shape[1] :] > 0
    tokens = backbone.batch(data.input["gene"], data.input["raw_value"], padding=~keep)
    close(backbone.embed(tokens), data.expected["backbone_cell_emb"], data.case["tolerance"])


# -- annotation ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def annotation(load):
    def of(file):
        data, backbone = load("ms_annotation_80m_vocab", weights=file)
        tokens = backbone.batch(data.expected["tok_gene"], data.expected["tok_value"])
        return data, backbone, tokens, np.array(data.case["cells_with_loss"])

    return of


@pytest.mark.parametrize("file", ["backbone.ckpt", "finetuned.ckpt"])
def test_annotation_embedding_from_counts(annotation, file):
    data, backbone, tokens, cells = annotation(file)
    adata = anndata.read_h5ad(data.path / "input.h5ad")
    columns, ids = data.expected["selected_columns"], data.expected["gene_ids"]
    kept = [ids[row[row >= 0]] for row in columns]
    ours = backbone.tokenize(
        adata.X, adata.var_names, max_length=data.case["config"]["pad_len"], draws=TokenDraws(kept)
    )
    np.testing.assert_array_equal(ours.lengths, data.case["expressed_vocab_genes"])
    out = backbone.embed(ours)
    close(out[cells], data.expected["cell_emb"][cells], data.case["tolerance"])
    assert out[~ours.valid].isnan().all()
    assert torch.isfinite(backbone.embed(tokens)).all(), "an empty cell that is not marked has a finite embedding"


def test_annotation_values(annotation):
    data, backbone, _, _ = annotation("backbone.ckpt")
    adata = anndata.read_h5ad(data.path / "input.h5ad")
    tokens = backbone.tokenize(adata.X, adata.var_names, max_length=None)
    dense = np.zeros((len(tokens), len(backbone.vocab)), dtype=np.float32)
    dense[tokens.flat_cells, tokens.flat_ids] = tokens.flat_values
    close(dense[:, data.expected["gene_ids"]], data.expected["log1p"], {"rtol": 1e-6, "atol": 1e-6})


def test_annotation_head(annotation):
    data, backbone, tokens, cells = annotation("finetuned.ckpt")
    tolerance, module = data.case["tolerance"], backbone.module
    with torch.inference_mode():
        for i in range(2):
            sequences = module.sequences(tokens)
            states = module.encode(sequences, n_layers=i + 1)
            shown = padded(states[sequences.genes], tokens, 256)[:, :39]
            there = (np.arange(39) < tokens.lengths.numpy()[:, None]) & np.isin(np.arange(8), cells)[:, None]
            close(shown[there], data.expected[f"layer{i}_out"][:, 1:][there], tolerance)
        first, genes, lengths = states[sequences.first], states[sequences.genes], tokens.lengths.tolist()
        for i in range(2):
            refined = module.head.refine(first, genes, lengths, i + 1).unflatten(0, (8, -1))
            close(refined[cells], data.expected[f"query{i}_out"][cells], tolerance)
        scores = module.classify(tokens)
    close(scores.logits[cells], data.expected["labelpred_genewise"][cells], tolerance)
    close(scores.by_cell[cells], data.expected["labelpred_cellwise"][cells], tolerance)
    probabilities = backbone.classify(tokens)
    close(probabilities[cells], torch.softmax(scores.logits, -1)[cells].numpy(), tolerance)


def test_annotation_loss_and_gradients(annotation):
    data, backbone, tokens, cells = annotation("finetuned.ckpt")
    trainable(backbone)
    labels = torch.from_numpy(data.expected["label"].astype(np.int64))[cells]
    scores = backbone.module.classify(tokens.select(cells))
    loss = classification_loss(scores, labels)
    close(loss, data.expected["train/loss"], data.case["tolerance"])
    loss.backward()
    # in float64 our gradients are the same; the float32 value encoder of the reference is off by 5e-5, its logits being
    # large, and noise of that size moves single gradients by this much
    check_gradients(data, backbone, slack=4)
    predicted = scores.logits.argmax(1)
    metrics = data.case["metrics_over_cells_with_genes"]
    assert (predicted == labels).float().mean().item() == pytest.approx(metrics["accuracy"])


def test_annotation_attention(annotation):
    data, backbone, tokens, cells = annotation("finetuned.ckpt")
    length, tolerance = data.case["config"]["pad_len"], data.case["tolerance"]
    raw = backbone.class_attention(tokens, rank=False, average_heads=False)
    close(raw[1, :, :1], data.expected["attn_scores_cell1"][:, :1], tolerance)
    ranks = backbone.class_attention(tokens, rank="upstream", padded_length=length)
    expected = data.expected["cls_attention_rank"][:, : tokens.max_length]
    there = ~tokens.padding.numpy() & np.isin(np.arange(8), cells)[:, None]
    # rounding can exchange two neighbours
    assert np.abs(ranks.numpy()[there] - expected[there]).max() <= 1.01 / 2048
    assert np.mean(np.abs(ranks.numpy()[there] - expected[there]) < 1e-6) > 0.99


# -- other forward passes ------------------------------------------------------------------------------------------------


def test_gene_context_embedding(load):
    data, backbone = load("ms_gene_context_embedding")
    genes, values = data.input["genes"], sparse.csr_matrix(data.input["log1p"])
    tokens = backbone.tokenize(values, genes, pre_normalized=True, include_zeros=True, unknown="pad")
    np.testing.assert_array_equal(tokens.ids, np.tile(data.expected["gene_ids"], (len(tokens), 1)))
    close(backbone.gene_states(tokens), data.expected["embedding"], data.case["tolerance"])
    known = data.expected["gene_ids"] > 0
    rows = list(backbone.iter_gene_states(tokens, genes[known][::-1]))
    found = {(int(c), int(g)): v for part in rows for c, g, v in zip(part.cells, part.genes, part.values, strict=True)}
    assert len(found) == len(tokens) * known.sum()
    for j in np.flatnonzero(known):
        for i in range(len(tokens)):
            close(found[i, int(data.expected["gene_ids"][j])], data.expected["embedding"][i, j], data.case["tolerance"])
    with pytest.raises(scfm.UnsupportedError, match="no CLS"):
        backbone.embed(tokens)


def test_drug_response_backbone(golden):
    data = golden("cellfm", "ms_chemical_perturbation")
    genes = [f"G{i}" for i in range(1, 71)]
    backbone = scfm.load(data.path / "checkpoint", genes=genes, n_heads=3)
    assert "proj2.0.weight" in backbone.load_report.dropped
    panel = np.zeros(data.input["gene"].shape, dtype=bool)
    tokens = backbone.batch(data.input["gene"], data.input["value"], padding=panel, panel=True)
    close(backbone.embed(tokens), data.expected["hidden_cls"], data.case["tolerance"])
    with pytest.raises(scfm.UnsupportedError, match="no gene-wise decoder"):
        backbone.reconstruct(tokens)


@pytest.fixture
def port(golden, shared, tmp_path):
    """The fine-tuned file as the port saves it: the converted backbone and the head in one torch file."""
    data = golden("cellfm", "torchport_classification")
    state = mindspore.read(data.path / "checkpoint" / "CellFM_80M_weight.ckpt")
    names = {k: k.replace(".gamma", ".weight").replace(".beta", ".bias") for k in state}
    head = torch.load(data.path / "checkpoint" / "cls_head.pt", weights_only=True)
    content = {f"extractor.net.{names[k]}": v for k, v in state.items()} | {f"cls.{k}": v for k, v in head.items()}
    torch.save(content, tmp_path / "model.pt")
    genes = shared("data", "vocab", "cellfm", data.case["config"]["vocabulary"])
    return data, scfm.load(tmp_path, genes=genes, n_heads=2, compat="torch-port")


def test_torch_port_outside_of_training(port):
    data, backbone = port
    tolerance, module = data.case["tolerance"], backbone.module
    assert backbone.config.class_head == "mlp"
    batch, _ = integration_batch(data, backbone)
    tokens = batch.tokens
    with torch.inference_mode():
        for i in range(2):
            sequences = module.sequences(tokens, "depths", hidden=batch.hidden, depths=batch.depths)
            states = module.encode(sequences, n_layers=i + 1)
            shown = padded(states[sequences.genes], tokens, 64)[:, :37]
            there = np.arange(37) < tokens.lengths.numpy()[:, None]
            close(shown[there], data.expected[f"eval/layer{i}_out"][:, 3:][there], tolerance)
        cells = states[sequences.first]
        close(cells, data.expected["eval/cell_emb"], tolerance)
        close(module.head(cells), data.expected["eval/logits"], tolerance)
        loss = masked_loss(module, batch)
    close(loss.genes, data.expected["eval/loss_mse_gene"], tolerance)
    close(loss.cells, data.expected["eval/loss_mse_cell"], tolerance)
    values = backbone.batch(data.input["gene"], data.input["raw_value"])
    out = backbone.embed(values, forward="root", padded_length=data.input["gene"].shape[1])
    close(out, data.expected["infer2d/cell_emb"], tolerance)


def test_torch_port_training(port):
    data, backbone = port
    tolerance, module = data.case["tolerance"], trainable(backbone)
    module.train()
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    batch, _ = integration_batch(data, backbone)
    loss = masked_loss(module, batch, similarity=0.8, padded_length=64)
    sequences = module.sequences(batch.tokens, "depths", hidden=batch.hidden, depths=batch.depths)
    cells = module.encode(sequences)[sequences.first]
    close(cells, data.expected["train/cell_emb"], tolerance)
    close(loss.total, data.expected["train/loss_mask"], tolerance)
    entropy = classification_loss(ClassScores(module.head(cells)), torch.from_numpy(data.input["label"]))
    close(entropy, data.expected["train/loss_ce"], tolerance)
    total = loss.total + entropy
    close(total, data.expected["train/loss_total"], tolerance)
    total.backward()
    check_gradients(data, backbone)


def test_full_size_from_a_seed(golden):
    data = golden("cellfm", "ms_fullsize_80m_seeded")
    state = {}
    for tag, (shape, scale, offset) in data.case["weights"].items():
        rng = np.random.default_rng([data.case["seed"], zlib.crc32(tag.encode())])
        state[tag] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        state[tag].mul_(np.float32(scale)).add_(np.float32(offset))
    state["gene_emb"][0] = 0
    state, report = rename(state, KEY_TABLE)
    config = config_of(state, data.case["config"]["n_genes"], n_heads=None)
    assert config.n_heads == data.case["config"]["enc_num_heads"]
    vocab = GeneVocab([PAD, *(f"G{i}" for i in range(config.n_genes))], specials=[PAD])
    cls = scfm.backbones.cellfm.CellFMBackbone
    module = scfm.backbones._build.filled(cls, config, vocab, state, report, what="fixture")
    backbone = cls(module, config, vocab, name="full-size", load_report=report)
    padding = np.arange(2048) >= data.input["length"][:, None]
    tokens = backbone.batch(data.input["gene"], data.input["value"], padding=padding)
    tolerance = data.case["tolerance"]
    exact = backbone.embed(tokens)
    close(exact, data.expected["cell_emb"], tolerance)
    close(backbone.gene_states(tokens)[:, :5], data.expected["gene_hidden_first5"], tolerance)
    reduced = backbone.to(precision="bfloat16").embed(tokens)
    assert torch.cosine_similarity(exact, reduced).min() > 0.999
