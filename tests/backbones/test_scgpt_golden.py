"""scGPT against the reference implementation, through the public contract."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import sparse

import scfm
from scfm.backbones.scgpt import MVCDecoder, TokenDraws
from scfm.backbones.scgpt.generation import two_streams
from scfm.backbones.scgpt.objective import (
    contrastive_loss,
    generative_loss,
    masked_loss,
    masked_relative_error,
    masked_square_error,
    nonzero_negative_log_likelihood,
    split_prompt,
)
from scfm.backbones.scgpt.tokenizer import bin_values
from scfm.nn.ranks import rank_normalize

FLOAT32 = {"atol": 2e-4, "rtol": 1e-4}
FLOAT64 = {"atol": 1e-9, "rtol": 0}


def close(actual, expected, **tolerance):
    actual = actual.detach().numpy() if torch.is_tensor(actual) else np.asarray(actual)
    np.testing.assert_allclose(actual, expected, **tolerance)


# -- binning -------------------------------------------------------------------------------------------------------------


def test_binning(golden):
    data = golden("scgpt", "binning")
    for row in data.case["rows"]:
        name, n_bins = row.rsplit("__", 1)
        values = data.input[name]
        values = values[values != 0]
        if not len(values):
            assert not data.expected[f"{row}__binned"].any()
            continue
        if values.dtype.kind == "i":
            values = values.astype(np.float64)
        offsets = np.array([0, len(values)])
        binned, edges = bin_values(values, offsets, int(n_bins), data.expected[f"{row}__uniform"])
        one_sided, _ = bin_values(values, offsets, int(n_bins))
        np.testing.assert_array_equal(edges[0], data.expected[f"{row}__edges"], err_msg=row)
        np.testing.assert_array_equal(binned, data.expected[f"{row}__binned"][data.input[name] != 0], err_msg=row)
        np.testing.assert_array_equal(one_sided, data.expected[f"{row}__one_sided"], err_msg=row)


# -- embedding -----------------------------------------------------------------------------------------------------------


def _draws(expected, run, max_length):
    parts = ("uniform", "uniform_len", "randperm", "randperm_len")
    return TokenDraws.from_flat(*(expected[f"{run}__{part}"] for part in parts), max_length=max_length)


def _weight_files(path):
    return sorted(file.name for file in (path / "checkpoint").glob("best_model*.pt"))


@pytest.mark.parametrize("run", ["full", "sampled"])
def test_tokens_and_embedding_of_each_key_layout(golden, run):
    data = golden("scgpt", "embed_cells")
    max_length = data.case["config"]["max_length"][run]
    counts = sparse.csr_matrix(data.input["X"])
    draws = _draws(data.expected, run, max_length)
    for file in _weight_files(data.path):
        backbone = scfm.load(data.path / "checkpoint" / file)
        assert backbone.load_report.ok
        tokens = backbone.tokenize(
            counts, data.input["gene_names"], max_length=max_length, draws=draws, duplicates="keep"
        )
        for batch, start in enumerate(range(0, 22, 8)):
            part = tokens.select(slice(start, start + 8))
            np.testing.assert_array_equal(part.ids, data.expected[f"{run}__b{batch}__gene"])
            np.testing.assert_array_equal(part.values, data.expected[f"{run}__b{batch}__expr"])
        close(backbone.embed(tokens), data.expected[f"{run}__X_scGPT"], atol=2e-5)
        close(backbone.embed(tokens, normalize=False), data.expected[f"{run}__cls_raw"], **FLOAT32)


@pytest.mark.parametrize("run", ["full", "sampled"])
def test_layers(golden, run):
    data = golden("scgpt", "embed_cells")
    backbone = scfm.load(data.path / "checkpoint")
    ids, values = data.expected[f"{run}__b0__gene"], data.expected[f"{run}__b0__expr"]
    tokens = backbone.batch(ids, values)
    valid = ~tokens.padding
    with torch.inference_mode():
        genes, x, padding = backbone._inputs(tokens)
        close(genes[valid], data.expected[f"{run}__b0__gene_emb"][valid], atol=1e-5)
        close(
            backbone.module.embed_values(tokens.values)[valid], data.expected[f"{run}__b0__value_emb"][valid], atol=1e-5
        )
        for number, layer in enumerate(backbone.module.layers):
            x = layer(x, padding)
            close(x[valid], data.expected[f"{run}__b0__block{number}"][valid], **FLOAT32)
    close(backbone.gene_states(tokens)[valid], data.expected[f"{run}__b0__block2"][valid], **FLOAT32)


@pytest.mark.parametrize("run", ["full", "sampled"])
def test_float64(golden, run):
    data = golden("scgpt", "embed_cells")
    backbone = scfm.load(data.path / "checkpoint", precision="float64")
    for batch in range(3):
        tokens = backbone.batch(data.expected[f"{run}__b{batch}__gene"], data.expected[f"{run}__b{batch}__expr"])
        rows = slice(8 * batch, 8 * batch + 8)
        with torch.inference_mode():
            close(backbone.forward(tokens).cells, data.expected[f"{run}__cls_raw_f64"][rows], atol=1e-10)
            close(backbone._embed(tokens, "cls"), data.expected[f"{run}__X_f64"][rows], atol=1e-10)


@pytest.mark.parametrize("run", ["full", "sampled"])
def test_tl_embed(golden, run):
    data = golden("scgpt", "embed_cells")
    adata = AnnData(sparse.csr_matrix(data.input["X"]))
    adata.var["feature_name"] = data.input["gene_names"]
    max_length = data.case["config"]["max_length"][run]
    scfm.tl.embed(
        adata,
        data.path / "checkpoint",
        gene_symbols="feature_name",
        max_length=max_length,
        duplicates="keep",
        draws=_draws(data.expected, run, max_length),
    )
    close(adata.obsm["X_scgpt"], data.expected[f"{run}__X_scGPT"], atol=2e-5)
    assert adata.uns["scgpt"]["genes"]["matched"] == len(data.expected[f"{run}__kept_var"])


# -- tokens of fine-tuning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["nz_full", "nz_trunc", "all_full", "all_trunc", "nz_trunc_nocls"])
def test_tokens_of_binned_values(golden, tiny_scgpt, run):
    data = golden("scgpt", "tokenize_mask")
    max_length = data.case["max_len"][run]
    with_cls, with_zeros = not run.endswith("nocls"), run.startswith("all")
    matrix = data.input["data"]
    lengths = np.full(len(matrix), matrix.shape[1]) if with_zeros else (matrix != 0).sum(1)
    picks = iter(np.split(data.expected[f"{run}__choice"], np.cumsum(data.expected[f"{run}__choice_len"])[:-1]))
    room = max_length - with_cls
    draws = TokenDraws(permutation=[next(picks) if length > room else None for length in lengths])
    backbone = tiny_scgpt(data.path / "vocab.json")
    tokens = backbone.tokenize(
        sparse.csr_matrix(matrix),
        data.expected["gene_ids"],
        n_bins=None,
        max_length=max_length,
        cls_value=0.0,
        append_cls=with_cls,
        include_zeros=with_zeros,
        draws=draws,
    )
    padded = tokens.ids
    expected = data.expected[f"{run}__genes"]
    np.testing.assert_array_equal(padded, expected[:, : padded.shape[1]])
    np.testing.assert_array_equal(tokens.values, data.expected[f"{run}__values"][:, : padded.shape[1]])


# -- forward variants ------------------------------------------------------------------------------------------------------


def _names(config):
    names = [f"gene{i}" for i in range(config["ntoken"])]
    names[config["pad_id"]], names[config["cls_id"]] = "<pad>", "<cls>"
    names[({config["ntoken"] - 1, config["ntoken"] - 2} - {config["cls_id"]}).pop()] = "<eoc>"
    return names


VARIANTS = [
    ("forward_variants", v)
    for v in (
        "base", "zero_prob", "batch", "dsbn", "dsbn_affine", "batchnorm", "category", "scaling", "avg_pool", "w_pool",
        "mvc_detach", "cls_1layer",
    )
] + [("forward_flash", v) for v in ("flash", "flash_prenorm", "flash_avg_pool", "flash_dsbn")]  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("case", "variant"), VARIANTS)
def test_forward_variants(golden, case, variant, precision):
    data = golden("scgpt", case)
    config = data.case["config"]
    options = data.case["variants"][variant]
    path = data.path / "checkpoint" / f"{variant}.pt"
    backbone = scfm.load(path, args={**config, **options}, vocab=_names(config), precision=precision)
    given = {key.partition("__")[2]: data.input[key] for key in data.input.files if key.startswith(f"{variant}__")}
    labels = {}
    if backbone.module.batches is not None:
        labels["batch_labels"] = given["batch_labels"]
    if backbone.module.domain_norms is not None:
        # upstream normalises all cells of a mini-batch with the statistics of the first one
        labels["domain_labels"] = np.full_like(given["batch_labels"], given["batch_labels"][0])
    tokens = backbone.batch(given["genes"], given["values"], **labels)
    with torch.inference_mode():
        out = backbone.forward(
            tokens,
            pooling=options["cell_emb_style"],
            padded_rows="flash" if case == "forward_flash" else "native",
        )
    wanted = {
        "mlm_output": out.expression.values,
        "mlm_zero_probs": out.expression.nonzero,
        "cell_emb": out.cells,
        "cls_output": out.class_logits,
        "mvc_output": out.cell_expression.values,
        "mvc_zero_probs": out.cell_expression.nonzero,
        "loss_ecs": out.similarity_loss,
        "dab_output": out.batch_logits,
        "hidden": out.hidden,
        "gene_emb": out.genes,
        "loss_cce": contrastive_loss(out.cells, out.cells),
    }
    chosen = torch.as_tensor(given["values"] == given["mask_value"])
    target = torch.as_tensor(given["target"])
    wanted["loss_mse"] = masked_square_error(out.expression.values, target, chosen)
    wanted["loss_mvc"] = masked_square_error(out.cell_expression.values, target, chosen)
    wanted["mre"] = masked_relative_error(out.expression.values, target, chosen)
    if out.expression.nonzero is not None:
        wanted["nzlp"] = nonzero_negative_log_likelihood(out.expression.nonzero, target, chosen)
        wanted["mvc_nzlp"] = nonzero_negative_log_likelihood(out.cell_expression.nonzero, target, chosen)
    if "gen_cell_emb" in given:
        cells = torch.as_tensor(given["gen_cell_emb"])
        for name, use in (("generate_novalues", False), ("generate_values", True)):
            wanted[name] = backbone.decode_cells(cells, tokens, use_values=use)
    suffix, tolerance = ("__f64", FLOAT64) if precision == "float64" else ("", FLOAT32)
    valid = given["genes"] != config["pad_id"]
    compared = 0
    for name, value in wanted.items():
        key = f"{variant}__{name}{suffix}"
        if key not in data.expected.files:
            continue
        expected = data.expected[key]
        if expected.ndim > 1 and expected.shape[1] == valid.shape[1]:
            value, expected = value[torch.as_tensor(valid)], expected[valid]
        close(value, expected, err_msg=key, **tolerance)
        compared += 1
    assert compared >= 5
    if precision == "float32":
        missing = {key for key in data.expected.files if key.startswith(f"{variant}__") and not key.endswith("f64")}
        assert {key.split("__")[1] for key in missing} - {"encode_batch3"} <= set(wanted)


@pytest.mark.parametrize(("case", "variant"), [("forward_variants", v) for v in ("base", "batch", "dsbn")])
def test_cells_in_chunks_of_three(golden, case, variant):
    """Upstream's ``encode_batch`` normalises each chunk with the statistics of its first cell."""
    data = golden("scgpt", case)
    config, options = data.case["config"], data.case["variants"][variant]
    backbone = scfm.load(data.path / "checkpoint" / f"{variant}.pt", args={**config, **options}, vocab=_names(config))
    labels = {}
    if backbone.module.batches is not None:
        own = data.input[f"{variant}__batch_labels"]
        labels = {"batch_labels": own, "domain_labels": own[np.arange(len(own)) // 3 * 3]}
    tokens = backbone.batch(data.input[f"{variant}__genes"], data.input[f"{variant}__values"], **labels)
    close(backbone.embed(tokens, normalize=False), data.expected[f"{variant}__encode_batch3"], **FLOAT32)


@pytest.mark.parametrize("style", ["concat", "sum"])
def test_other_cell_decoders(golden, style):
    data = golden("scgpt", "forward_variants")
    name = f"mvcdec_{style}"
    decoder = MVCDecoder(32, 32, f"{style} query", explicit_zeros=False)
    decoder.load_state_dict(torch.load(data.path / "checkpoint" / f"{name}.pt", weights_only=True))
    with torch.inference_mode():
        out = decoder(*(torch.as_tensor(data.input[f"{name}__{part}"]) for part in ("cell_emb", "gene_embs")))
    keys = [key for key in data.expected.files if key.startswith(name) and not key.endswith("f64")]
    assert keys
    for key in keys:
        close(out.values, data.expected[key], **FLOAT32)


# -- generation and pre-training -------------------------------------------------------------------------------------------


def _prompt(backbone, expected):
    return backbone.batch(
        expected["both__pcpt_gene"],
        expected["both__pcpt_expr"],
        query_genes=expected["both__gen_gene"],
        query_values=expected["both__gen_expr_target"],
    )


def test_division_into_prompt_and_queries(golden):
    data = golden("scgpt", "pretrain_generative")
    backbone = scfm.load(data.path / "checkpoint")
    tokens = backbone.tokenize(
        sparse.csr_matrix(data.input["X"]), data.input["genes"], tie_break="left", max_length=10_000
    )
    config = data.case["config"]
    keys = _keys_of_upstream(tokens, data.expected, config)
    split = split_prompt(tokens, config["gen_prob"], max_length=config["max_length"], keys=keys)
    np.testing.assert_array_equal(split.ids, data.expected["both__pcpt_gene"])
    np.testing.assert_array_equal(split.values, data.expected["both__pcpt_expr"])
    np.testing.assert_array_equal(split.queries.ids, data.expected["both__gen_gene"])
    np.testing.assert_array_equal(split.queries.values, data.expected["both__gen_expr_target"])


def _keys_of_upstream(tokens, expected, config):
    """Translate upstream's permutations (one to divide a cell, one to subsample each part that is too long)."""
    draws = iter(np.split(expected["both__randperm"], np.cumsum(expected["both__randperm_len"])[:-1]))
    keys = torch.zeros(len(tokens.flat_ids), dtype=torch.float64)
    for cell in range(len(tokens)):
        n, start = int(tokens.lengths[cell]) - 1, int(tokens.offsets[cell]) + 1
        order = next(draws)
        n_queries = int(n * config["gen_prob"])
        queries, known = order[:n_queries], order[n_queries:]
        if len(known) > config["pcpt_len"] - 1:
            known = known[next(draws)[: config["pcpt_len"] - 1]]
        if len(queries) > config["gen_len"]:
            queries = queries[np.concatenate([[0], next(draws)[: config["gen_len"] - 1] + 1])]
        rest = np.setdiff1d(order[:n_queries], queries)
        rank = np.full(n, np.inf)
        rank[np.concatenate([queries, rest, known])] = np.arange(len(queries) + len(rest) + len(known))
        keys[start : start + n] = torch.as_tensor(rank)
    return keys


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_generation(golden, precision):
    data = golden("scgpt", "pretrain_generative")
    backbone = scfm.load(data.path / "checkpoint", precision=precision)
    tokens = _prompt(backbone, data.expected)
    suffix, tolerance = ("__f64", FLOAT64) if precision == "float64" else ("", {"atol": 3e-4, "rtol": 1e-4})
    asked, valid = ~tokens.queries.padding, ~tokens.padding
    with torch.inference_mode():
        known, _, known_genes, query_genes = two_streams(backbone, tokens)
        close(known[:, 0], data.expected[f"pass1__cell_emb{suffix}"], **tolerance)
        values = backbone.module.decoder(known).values
        close(values[valid], data.expected[f"pass1__pcpt_preds{suffix}"][valid], **tolerance)
        from_cell = backbone.module.mvc(known[:, 0], torch.cat([known_genes, query_genes], 1)).values
        both = torch.cat([valid, asked], 1)
        close(from_cell[both], data.expected[f"pass1__mvc_output{suffix}"][both], **tolerance)
        close(
            backbone.embed(replace(tokens, queries=None), normalize=False),
            data.expected["pcpt_only__cell_emb"],
            atol=3e-4,
        )
    close(backbone.generate(tokens)[asked], data.expected[f"pass1__gen_preds{suffix}"][asked], **tolerance)
    close(backbone.reconstruct(tokens)[asked], data.expected[f"pass1__gen_preds{suffix}"][asked], **tolerance)
    second = backbone.generate(tokens, cell_embeddings=known[:, 0])
    close(second[asked], data.expected[f"pass2__gen_preds{suffix}"][asked], **tolerance)


def test_pretraining_loss_and_gradients(golden):
    data = golden("scgpt", "pretrain_generative")
    backbone = scfm.load(data.path / "checkpoint")
    backbone.module.requires_grad_(requires_grad=True)
    loss = generative_loss(backbone, _prompt(backbone, data.expected))
    for name, value in (
        ("loss_mse", loss.gene_prompt),
        ("loss_mvc", loss.cell_decoder),
        ("loss_gen", loss.cell_prompt),
        ("loss", loss.total),
    ):
        close(value, data.expected[name], rtol=1e-5)
    _compare_gradients(backbone, loss, data.expected["grad_names"], data.expected["grad_norms"])


def test_masked_loss_and_gradients(golden):
    data = golden("scgpt", "pretrain_generative")
    backbone = scfm.load(data.path / "checkpoint")
    backbone.module.requires_grad_(requires_grad=True)
    tokens = backbone.batch(data.expected["pcpt__gene"], data.expected["pcpt__expr"])
    mask = torch.as_tensor(data.expected["pcpt__masked_expr"] == backbone.config.mask_value)[~tokens.padding]
    loss = masked_loss(backbone, tokens, mask=mask)
    close(loss.gene_prompt, data.expected["mlm__loss_mse"], rtol=1e-5)
    close(loss.cell_decoder, data.expected["mlm__loss_mvc"], rtol=1e-5)
    _compare_gradients(backbone, loss, data.expected["mlm__grad_names"], data.expected["mlm__grad_norms"])


def _compare_gradients(backbone, loss, names, norms):
    loss.total.backward()
    ours = {name: p.grad.norm().item() for name, p in backbone.module.named_parameters() if p.grad is not None}
    renamed = backbone.load_report.renamed
    for name, norm in zip(names, norms, strict=True):
        if norm:
            assert ours[renamed.get(name, name)] == pytest.approx(norm, rel=1e-3), name


# -- gene embeddings, attention, classes -----------------------------------------------------------------------------------


def test_static_gene_embeddings(golden):
    data = golden("scgpt", "gene_network")
    backbone = scfm.load(golden("scgpt", "embed_cells").path / "checkpoint")
    table = backbone.gene_embeddings()
    close(table[backbone.vocab.get_ids(data.expected["genes"])], data.expected["embedding"], atol=1e-5)
    close(table[backbone.vocab.get_ids(data.expected["all_tokens"])], data.expected["all_embedding"], atol=1e-5)


def _placeholder_vocab(path):
    state = torch.load(path, weights_only=True, mmap=True)
    n = len(state["encoder.embedding.weight"])
    return [*(f"gene{i}" for i in range(n - 3)), "<pad>", "<cls>", "<eoc>"]


def test_attention_scores_and_their_ranks(golden):
    data = golden("scgpt", "attention_grn")
    path = data.path / "checkpoint" / "model.pt"
    backbone = scfm.load(path, args=data.case["config"], vocab=_placeholder_vocab(path))
    tokens = backbone.batch(data.input["genes"], data.input["values"])
    raw = backbone.attention(tokens, scores="raw", average_heads=False)
    close(raw[0], data.expected["raw_scores_cell0"], atol=2e-4)
    softmax = backbone.attention(tokens, average_heads=False)
    close(softmax[0], data.expected["softmax_attn_cell0"], atol=2e-4)
    close(backbone.attention(tokens), softmax.mean(1), atol=1e-6)
    np.testing.assert_allclose(rank_normalize(raw)[0], data.expected["row_rank_cell0"], atol=1e-6)
    ranked = backbone.attention(tokens, rank=True)
    np.testing.assert_allclose(ranked, data.expected["rank_normed_cells"], atol=1e-6)
    some = torch.tensor(data.input["genes"][0, [3, 1]])
    np.testing.assert_array_equal(backbone.attention(tokens, rank=True, genes=some)[0], ranked[0][[3, 1]][:, [3, 1]])


def test_class_logits_of_a_fine_tuned_file(golden):
    data = golden("scgpt", "finetune_annotation")
    path = data.path / "checkpoint" / "model.pt"
    backbone = scfm.load(path, args=data.case["config"], vocab=_placeholder_vocab(path))
    with torch.inference_mode():
        out = backbone.forward(backbone.batch(data.input["genes"], data.input["values"]))
    close(out.class_logits, data.expected["cls_output"], rtol=1e-4, atol=1e-5)
    close(out.cells, data.expected["cell_emb"], rtol=1e-4, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(out.class_logits, torch.as_tensor(data.input["labels"]))
    close(loss, data.expected["loss"], rtol=1e-4)
