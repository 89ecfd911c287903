"""scFoundation against the reference implementation, through the public contract."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

import scfm
from scfm.backbones.scfoundation.checkpoint import GENE_LIST, KEY_TABLE
from scfm.backbones.scfoundation.objective import Draws, corrupt
from scfm.checkpoints.convert import rename

FLOAT32 = {"rtol": 1e-4, "atol": 2e-5}
FLOAT64 = {"rtol": 1e-6, "atol": 1e-6}
EXACT = {"rtol": 1e-9, "atol": 1e-12}
N_GENES = 19264


def close(actual, expected, **tolerance):
    actual = actual.detach().numpy() if torch.is_tensor(actual) else np.asarray(actual)
    np.testing.assert_allclose(actual, expected, **tolerance)


def matrix(arrays, name):
    parts = (arrays[f"{name}_{part}"] for part in ("data", "indices", "indptr"))
    return sparse.csr_matrix(tuple(parts), shape=arrays[f"{name}_shape"])


@pytest.fixture
def load(golden, shared):
    def of(case, weights, **options):
        data = golden("scfoundation", case)
        if data.case["config"]["seq_len"] == N_GENES + 2:
            options["genes"] = shared("data", "vocab", "scfoundation", GENE_LIST)
        backbone = scfm.load(data.path / "checkpoint", weights=weights, **options)
        assert backbone.load_report.ok
        assert backbone.provenance.weights == weights
        return data, backbone

    return of


# -- tokens --------------------------------------------------------------------------------------------------------------

MODES = {
    "sc_F_t4": ("counts", {}),
    "sc_T_t4": ("lognorm", {"pre_normalized": True, "tgthighres": "t4"}),
    "sc_A_f1": ("append", {"pre_normalized": "A", "target": "f1"}),
    "bulk_F": ("counts", {"input_type": "bulk"}),
    "bulk_T": ("lognorm", {"input_type": "bulk", "pre_normalized": "T"}),
}


def model_rows(tokens, n_positions):
    """Dense rows as upstream makes them, from seen and unseen entries."""
    rows = np.zeros((len(tokens), n_positions))
    for part in (tokens, tokens.queries):
        if part is not None:
            cells = np.repeat(np.arange(len(part)), part.lengths)
            rows[cells, part.flat_ids] = part.flat_values
    return rows


@pytest.fixture
def tokenizer(load):
    return load("embed_cell_cli", "cell")[1]


def names_for(data, source):
    return np.arange(N_GENES) if source == "append" else data.input["gene_names"]


@pytest.mark.parametrize("mode", MODES)
def test_model_rows_of_each_input_mode(golden, tokenizer, mode):
    data = golden("scfoundation", "preprocess_modes")
    source, options = MODES[mode]
    tokens = tokenizer.tokenize(matrix(data.input, source), names_for(data, source), **options)
    assert tokens.valid.all()
    close(model_rows(tokens, N_GENES + 2), matrix(data.expected, f"seq_{mode}").toarray(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", ["t4", "f1", "f5", "a1", "t4.5", "f0.5"])
@pytest.mark.parametrize("mode", ["F", "A"])
def test_depth_tokens_of_each_target(golden, tokenizer, mode, target):
    data = golden("scfoundation", "preprocess_modes")
    key = f"TS_sc_{mode}_{target}"
    if key not in data.expected:
        pytest.skip("upstream was not run in this combination")
    source = "append" if mode == "A" else "counts"
    tokens = tokenizer.tokenize(matrix(data.input, source), names_for(data, source), pre_normalized=mode, target=target)
    close(model_rows(tokens, N_GENES + 2)[:, -2:], data.expected[key], rtol=1e-6, atol=0)


def test_padded_encoder_input(golden, tokenizer):
    data = golden("scfoundation", "preprocess_modes")
    tokens = tokenizer.tokenize(matrix(data.input, "counts"), data.input["gene_names"])
    np.testing.assert_array_equal(tokens.padding, data.expected["batch_encoder_padding"])
    np.testing.assert_array_equal(tokens.ids, data.expected["batch_encoder_position_ids"])
    close(tokens.values, data.expected["batch_encoder_values"], rtol=1e-6, atol=0)


# -- cell embeddings -----------------------------------------------------------------------------------------------------


def test_cell_embeddings_of_every_command_line_run(load):
    models = {"ce": load("embed_cell_cli", "cell")[1], "rde": load("embed_cell_cli", "rde")[1]}
    data, _ = load("embed_cell_cli", "cell")
    assert len(data.case["runs"]) > 5
    for run in data.case["runs"]:
        flags = dict(zip(run["args"][::2], run["args"][1::2], strict=True))
        backbone = models[flags["--version"]]
        tokens = backbone.tokenize(
            matrix(data.input, run["input"]),
            data.input["gene_names"],
            input_type=flags.get("--input_type", "singlecell"),
            pre_normalized=flags["--pre_normalized"],
            target=flags["--tgthighres"],
        )
        np.testing.assert_array_equal(tokens.lengths, data.expected[f"ntok_{run['name']}"])
        embedded = backbone.embed(tokens, pooling=flags["--pool_type"])
        close(embedded, data.expected[f"emb_{run['name']}"], **FLOAT32)


def test_encoder_at_each_depth(load):
    data, backbone = load("embed_cell_cli", "cell")
    tokens = backbone.tokenize(matrix(data.input, "counts"), data.input["gene_names"])
    for cell in (1, 2, 3):
        one = tokens.select([cell])
        expected = {
            name.removeprefix(f"depth_ce_all_t4_cell{cell}_"): data.expected[name]
            for name in data.expected
            if name.startswith(f"depth_ce_all_t4_cell{cell}_")
        }
        close(one.flat_values, expected["values"], rtol=1e-6, atol=0)
        np.testing.assert_array_equal(one.flat_ids, expected["position_ids"])
        with torch.inference_mode():
            close(backbone.module.value_embedding(one.flat_values), expected["value_emb"], **FLOAT32)
            x = backbone.module.embed_tokens(one)
            close(x, expected["encoder_in"], **FLOAT32)
            for i in range(backbone.config.encoder_depth):
                block = backbone.module.encoder.inputs_of(i + 1, x)
                close(block, expected[f"encoder_block{i}"], **FLOAT32)
            close(backbone.module.encode(one), expected["encoder_out"], **FLOAT32)


def test_pooling_of_the_annotation_encoder_leaves_padding_out(load):
    data, backbone = load("finetune_linear_probe", "gene")
    tokens = backbone.batch(matrix(data.input, "x").toarray())
    close(backbone.embed(tokens, pooling="max"), data.expected["pooled_single"], **FLOAT32)
    close(backbone.embed(tokens, pooling="gene_max"), data.expected["pooled_single"], **FLOAT32)
    assert torch.isnan(backbone.embed(tokens, pooling="S")).all()


# -- genes ---------------------------------------------------------------------------------------------------------------


def test_gene_outputs_of_the_command_line(load):
    data, backbone = load("gene_cli", "gene")
    tolerance = {"rtol": 2e-4, "atol": 5e-5}
    counts, names = matrix(data.input, "counts"), data.input["gene_names"]
    tokens = backbone.tokenize(counts, names, target=data.case["tgthighres"])
    positions = data.expected["positions"]
    close(backbone.gene_states(tokens, genes=positions), data.expected["gene"], **tolerance)
    batch = backbone.gene_states(tokens, genes=positions, key_max="batch")
    close(batch, data.expected["gene_batch"], **tolerance)
    close(backbone.reconstruct(tokens), data.expected["gene_expression"], **tolerance)


# -- the whole network ---------------------------------------------------------------------------------------------------

PRECISIONS = [("f32", torch.float32, FLOAT32), ("f64", torch.float64, FLOAT64)]


@pytest.fixture(params=["forward_small_alpha", "forward_released_shape"])
def forward(request, load):
    data, backbone = load(request.param, "gene")

    def prepare(kind):
        backbone.module.to(kind)
        return backbone, backbone.batch(data.input["rows"].astype(str(kind).removeprefix("torch.")))

    return data, prepare


@pytest.mark.parametrize(("prefix", "kind", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("gradients", [False, True])
def test_predictions_with_either_key_maximum(forward, prefix, kind, tolerance, gradients):
    data, prepare = forward
    backbone, tokens = prepare(kind)
    if kind == torch.float64:
        tolerance = EXACT
    for key_max, name in (("cell", "prediction_single"), ("batch", "prediction")):
        with torch.set_grad_enabled(gradients):
            states = torch.cat(list(backbone.module.decode(tokens, backbone.module.encode(tokens), key_max=key_max)))
            close(backbone.module.predict(states), data.expected[f"{prefix}_{name}"], **tolerance)
    close(
        backbone.reconstruct(tokens, include_depth_tokens=True),
        data.expected[f"{prefix}_prediction_single"],
        **tolerance,
    )


@pytest.mark.parametrize(("prefix", "kind", "tolerance"), PRECISIONS)
def test_states_at_each_depth(forward, prefix, kind, tolerance):
    data, prepare = forward
    backbone, tokens = prepare(kind)
    expected = {name[4:]: data.expected[name] for name in data.expected if name.startswith(f"{prefix}_")}
    real = ~data.expected["encoder_padding"]
    np.testing.assert_array_equal(tokens.padding, data.expected["encoder_padding"])
    np.testing.assert_array_equal(tokens.ids, data.expected["encoder_position_ids"])
    close(tokens.values, data.expected["encoder_values"], **tolerance)
    module = backbone.module
    with torch.inference_mode():
        seen = {
            "enc_value_emb": module.value_embedding(tokens.flat_values),
            "enc_in": module.embed_tokens(tokens),
            "enc_out": module.encode(tokens),
        }
        cells = tokens.lengths.tolist()
        for i in range(backbone.config.encoder_depth):
            parts = [module.encoder.inputs_of(i + 1, x) for x in seen["enc_in"].split(cells)]
            seen[f"enc_block{i}"] = torch.cat(parts)
        for name in seen.keys() & expected.keys():
            close(seen[name], expected[name][real], **tolerance)
        embedded = module.embed_decoder(tokens, seen["enc_out"], module.unexpressed())
        if "dec_embed_out" in expected:
            close(embedded.unflatten(0, (len(tokens), -1)), expected["dec_embed_out"], **tolerance)
    states = backbone.gene_states(tokens, key_max="batch")
    close(states, expected["final_norm"][:, : backbone.config.n_genes], **tolerance)


def test_attention_that_the_decoder_implies(load):
    data, backbone = load("forward_small_alpha", "gene")
    tokens = backbone.batch(data.input["rows"].astype(np.float32)).select([0])
    positions = np.arange(backbone.config.n_positions)
    for layer, expected in enumerate(data.expected["decoder_attention_cell0"]):
        weights = backbone.attention(tokens, layer, kind="decoder", genes=positions, average_heads=False)
        close(weights[0], expected, **FLOAT32)
        average = backbone.attention(tokens, layer, kind="decoder", genes=positions[5:9])
        close(average[0], expected.mean(0)[5:9, 5:9], **FLOAT32)


# -- pre-training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["pretrain_loss", "pretrain_loss_bert"])
def test_pretraining_loss_and_all_gradients(load, case):
    data, backbone = load(case, "gene")
    raw = data.input["raw_counts"]
    tokens = backbone.tokenize_for_training(sparse.csr_matrix(raw), np.arange(raw.shape[1]), torch.Generator())
    draws = Draws(*(torch.from_numpy(data.input[name]) for name in ("input_counts", "mask")))
    draws = replace(draws, shown=torch.from_numpy(data.input["data"][:, :-2]))
    batch = corrupt(torch.from_numpy(raw), draws, backbone.config)
    close(batch.target, data.input["y"], **EXACT)
    close(batch.tokens.values, data.expected["encoder_values"], **EXACT)
    np.testing.assert_array_equal(batch.tokens.ids, data.expected["encoder_position_ids"])

    upstream = data.expected["param_names"].tolist()
    ours = list(rename({f"model.{name}": torch.empty(0) for name in upstream}, KEY_TABLE)[0])
    for prefix, kind, loss_rtol, grad_rtol in (("f32", torch.float32, 1e-5, 1e-3), ("f64", torch.float64, 1e-9, 1e-7)):
        backbone.module.to(kind).requires_grad_(True).zero_grad()
        loss = backbone.pretraining_loss(tokens, draws=draws, key_max="batch").total
        loss.backward()
        close(loss, data.expected[f"{prefix}_loss"], rtol=loss_rtol)
        parameters = dict(backbone.module.named_parameters())
        assert sorted(ours) == sorted(parameters)
        gradients = [parameters[name].grad for name in ours]
        norms = [0.0 if gradient is None else float(gradient.norm()) for gradient in gradients]
        close(norms, np.nan_to_num(data.expected[f"{prefix}_grad_norms"]), rtol=grad_rtol, atol=1e-12)
    for name, gradient in zip(upstream, gradients, strict=True):
        if f"grad_{name}" in data.expected and gradient is not None:
            close(gradient, data.expected[f"grad_{name}"], rtol=1e-5, atol=1e-6)


# -- official weights ----------------------------------------------------------------------------------------------------


@pytest.fixture
def official(golden):
    path = os.environ.get("SCFM_SCFOUNDATION_WEIGHTS")
    if not path:
        pytest.skip("set SCFM_SCFOUNDATION_WEIGHTS to the official models.ckpt")
    return golden("scfoundation", "real_weights_acceptance"), Path(path)


def ends(x):
    return np.concatenate([x[..., :3], x[..., -3:]], -1)


@pytest.mark.slow
def test_official_weights_give_the_printed_cell_embeddings(official):
    data, path = official
    backbone = scfm.load(path, weights="rde", precision="float32", device="cpu")
    tokens = backbone.tokenize(matrix(data.input, "baron_counts")[:3], np.arange(N_GENES), target="a5")
    expected = data.expected["baron_rde_all_a5__rows0_2__first3_last3"]
    close(ends(backbone.embed(tokens).numpy()), expected, rtol=0, atol=3e-3)


@pytest.mark.slow
def test_official_weights_give_the_printed_gene_states(official):
    data, path = official
    backbone = scfm.load(path, weights="gene", precision="float32", device="cpu")
    rows = matrix(data.input, "gears_append")
    tokens = backbone.tokenize(rows, np.arange(N_GENES), pre_normalized="A", target="f1")
    genes = [0, 1, 2, N_GENES - 3, N_GENES - 2, N_GENES - 1]
    states = ends(backbone.gene_states(tokens, genes=genes, key_max="batch")[0].numpy())
    name = "gears_gene_batch_A_f1__cell0_"
    close(states[:3], data.expected[f"{name}genes0_2__first3_last3"], rtol=0, atol=5e-3)
    close(states[3:], data.expected[f"{name}genes_last3__first3_last3"], rtol=0, atol=5e-3)
