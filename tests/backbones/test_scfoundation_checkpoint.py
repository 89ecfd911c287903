"""The official container and its gene list: what is read, and what is refused and why."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

import scfm
from scfm.backbones._load import load_vocab
from scfm.backbones.scfoundation import PRESETS, SCFoundationBackbone, SCFoundationConfig
from scfm.backbones.scfoundation.checkpoint import GENE_LIST

COPY = Path(__file__).parents[1] / "golden" / "scfoundation" / "forward_small_alpha" / "checkpoint" / "models"


@pytest.fixture
def container():
    return torch.load(COPY / "models.ckpt", weights_only=True)


@pytest.fixture
def folder(tmp_path, container):
    """``folder(container)``: a folder with this ``models.ckpt``."""

    def write(content=container, name="models"):
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        torch.save(content, path / "models.ckpt")
        return path

    return write


def released_size(container):
    """A container with as many genes as the released one, and hardly any weights."""
    part = container["gene"]
    part["state_dict"]["model.pos_emb.weight"] = torch.zeros(19267, 12)
    part["config"]["model_config"]["mae_autobin"]["seq_len"] = 19266
    return container


def test_configs_are_read_nested_and_flat(container):
    nested = container["gene"]["config"]
    nested["dataset_config"]["rnaseq"] |= {"value_mask_prob": 0.25, "bin_alpha": 0.5}
    config = SCFoundationConfig.from_upstream(nested)
    assert (config.n_genes, config.encoder_dim, config.encoder_depth, config.encoder_heads) == (120, 12, 3, 4)
    assert (config.decoder_dim, config.decoder_depth, config.decoder_heads, config.decoder_dim_head) == (10, 2, 5, 6)
    assert (config.encoder_layer, config.decoder_layer) == ("transformer", "performer")
    assert (config.n_bins, config.value_mask_prob, config.max_encoder_length) == (11, 0.25, 15000)
    assert config.bin_alpha == 0.5, "entries of the data set win"
    flat = {**nested["model_config"]["mae_autobin"], **nested["dataset_config"]["rnaseq"]}
    assert SCFoundationConfig.from_upstream(flat) == config
    assert SCFoundationBackbone.config_from_dict(asdict(config)) == config


def test_the_released_preset_has_the_published_size():
    config = PRESETS["scfoundation"]
    with torch.device("meta"):
        module = SCFoundationBackbone.build(config, scfm.genes.GeneVocab([f"G{i}" for i in range(config.n_genes)]))
    assert sum(p.numel() for p in module.parameters()) == 119_252_285
    assert sum(b.numel() for b in module.buffers()) == 102_145
    assert (config.target_id, config.source_id, config.pad_id) == (19264, 19265, 19266)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"encoder_heads": 7}, "multiple of encoder_heads"),
        ({"decoder_layer": "mamba"}, "decoder_layer must be"),
        ({"decoder_dim_head": 1}, "decoder_dim_head must be at least 2"),
        ({"pad_value": 102.0}, "must differ"),
    ],
)
def test_impossible_configs_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        SCFoundationConfig(**change)


def test_both_places_of_the_container_and_the_file_itself(folder):
    path = folder()
    for place in (path, path.parent, path / "models.ckpt"):
        backbone = scfm.load(place, weights="gene")
        assert backbone.load_report.ok
        assert backbone.provenance.weights == "gene"
        assert len(backbone.provenance.sha256) == 64
    assert SCFoundationBackbone.recognizes(path.parent)
    assert not SCFoundationBackbone.recognizes(path.parent.parent)


def test_each_weight_set_is_read_by_its_name(folder, container):
    for name, shift in (("cell", 1.0), ("rde", 2.0)):
        state = {
            key: value + shift if key.endswith("norm.bias") else value
            for key, value in container["gene"]["state_dict"].items()
        }
        container[name] = {**container["gene"], "state_dict": state, "step": 36999}
    path = folder(container)
    bias = {name: scfm.load(path, weights=name).module.norm.bias for name in ("cell", "rde", "gene")}
    torch.testing.assert_close(bias["cell"], bias["gene"] + 1)
    torch.testing.assert_close(bias["rde"], bias["gene"] + 2)
    torch.testing.assert_close(scfm.load(path).module.norm.bias, bias["cell"], msg="cell is the default")


def test_a_missing_weight_set_names_those_that_exist(folder):
    with pytest.raises(scfm.CheckpointError, match="choose one of 'gene'"):
        scfm.load(folder(), weights="rde")


def test_the_only_weight_set_of_a_file_is_taken(folder):
    assert scfm.load(folder()).provenance.weights == "gene"


def test_gene_outputs_of_other_weights_warn_once(folder, container, capsys):
    container["cell"] = container["gene"]
    for weights, n_warnings in (("cell", 1), ("gene", 0)):
        backbone = scfm.load(folder(container), weights=weights)
        tokens = backbone.batch(torch.rand(2, backbone.config.n_positions).double())
        capsys.readouterr()
        backbone.gene_states(tokens)
        backbone.reconstruct(tokens)
        assert capsys.readouterr().err.count("weights='gene'") == n_warnings


def test_performer_files_of_newer_versions(folder, container):
    state = container["gene"]["state_dict"]
    prefix = "model.decoder.performer."
    calls = state.pop(prefix + "calls_since_last_redraw")
    state[prefix + "proj_updater.calls_since_last_redraw"] = calls + 1
    for key in [key for key in state if key.startswith(prefix + "net.")]:
        state[key.replace(prefix, prefix + "proj_updater.instance.")] = state[key]
    backbone = scfm.load(folder(container), weights="gene")
    assert int(backbone.module.decoder.calls_since_redraw) == int(calls) + 1
    assert all("second name" in reason for reason in backbone.load_report.dropped.values())


@pytest.mark.parametrize(
    ("key", "text"), [("extra", "no rule knows"), ("missing", "missing from the file"), ("shape", "differ")]
)
def test_weights_that_do_not_fit_are_named(folder, container, key, text):
    state = container["gene"]["state_dict"]
    if key == "extra":
        state["model.surprise.weight"] = torch.zeros(2)
    elif key == "missing":
        del state["model.decoder_embed.bias"]
    else:
        state["model.norm.weight"] = torch.zeros(11)
    with pytest.raises(scfm.CheckpointError, match=text):
        scfm.load(folder(container), weights="gene")


def test_damaged_and_foreign_files_are_refused(folder, container, tmp_path):
    path = folder()
    whole = (path / "models.ckpt").read_bytes()
    (path / "models.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(scfm.CheckpointError, match="damaged"):
        scfm.load(path, weights="gene")
    with pytest.raises(scfm.CheckpointError, match="no scFoundation container"):
        scfm.load(folder({"state_dict": {}}), weights="gene")
    with pytest.raises(scfm.CheckpointError, match="'state_dict' or 'config' is missing"):
        scfm.load(folder({"gene": {}}), weights="gene")
    del container["gene"]["config"]["model_config"]["mae_autobin"]["seq_len"]
    with pytest.raises(scfm.CheckpointError, match="seq_len"):
        scfm.load(folder(container), weights="gene")


class _Payload:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_code_in_a_file_is_not_executed(folder, container, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    container["gene"]["config"]["hook"] = _Payload()
    with pytest.raises(scfm.CheckpointError, match="more than tensors"):
        scfm.load(folder(container), weights="gene")
    assert not (tmp_path / "executed").exists()


# -- gene list -----------------------------------------------------------------------------------------------------------


def gene_list(path, n=19264):
    names = [f"SYMBOL{i}" for i in range(n)]
    names[5] = "NA"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("gene_name\tindex\n" + "".join(f"{name}\t{i}\n" for i, name in enumerate(names)))
    return path


@pytest.mark.parametrize("place", ["beside", "above", "cache", "option"])
def test_the_gene_list_is_found_in_each_place(folder, container, tmp_path, place):
    path = folder(released_size(container))
    places = {
        "beside": path / GENE_LIST,
        "above": path.parent / GENE_LIST,
        "cache": scfm.settings.cachedir / "scfoundation" / GENE_LIST,
        "option": tmp_path / "elsewhere" / "mine.tsv",
    }
    written = gene_list(places[place])
    options = {"genes": written} if place == "option" else {}
    backbone = scfm.load(path, weights="gene", **options)
    assert backbone.vocab["SYMBOL19263"] == 19263
    assert backbone.vocab["NA"] == 5, "names that look like missing values are names"
    assert backbone.gene_embeddings().shape == (19264, 12)


def test_a_missing_gene_list_says_which_file_to_put_where(folder, container):
    path = folder(released_size(container))
    with pytest.raises(scfm.CheckpointError, match=GENE_LIST) as error:
        scfm.load(path, weights="gene")
    assert str(path / GENE_LIST) in str(error.value)


def test_lists_that_do_not_fit_are_refused(folder, tmp_path):
    path = folder()
    with pytest.raises(scfm.CheckpointError, match="has 3 names"):
        scfm.load(path, weights="gene", genes=["A", "B", "C"])
    wrong = tmp_path / "wrong.tsv"
    wrong.write_text("symbol\nA\n")
    with pytest.raises(scfm.CheckpointError, match="no column 'gene_name'"):
        scfm.load(path, weights="gene", genes=wrong)
    with pytest.raises(FileNotFoundError, match="absent.tsv"):
        scfm.load(path, weights="gene", genes=tmp_path / "absent.tsv")


def test_small_models_get_numbered_or_given_names(folder, capsys):
    path = folder()
    assert scfm.load(path, weights="gene").vocab["gene_7"] == 7
    assert "genes without names" in capsys.readouterr().err
    names = [f"MINE{i}" for i in range(120)]
    assert scfm.load(path, weights="gene", genes=names).vocab["MINE7"] == 7


def test_genes_can_be_read_without_the_weights(folder, container, tmp_path):
    gene_list(tmp_path / "only" / GENE_LIST)
    assert len(SCFoundationBackbone.read_vocab(tmp_path / "only")) == 19264
    assert len(load_vocab(folder(), weights="gene")) == 120


def test_saving_keeps_everything(folder, tmp_path):
    backbone = scfm.load(folder(), weights="gene")
    shutil.rmtree(tmp_path / "models")
    again = scfm.load(backbone.save(tmp_path / "saved"))
    counts = sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (3, 120)))
    assert again.config == backbone.config
    assert again.vocab == backbone.vocab
    tokens = backbone.tokenize(counts, backbone.vocab.names)
    torch.testing.assert_close(again.reconstruct(tokens), backbone.reconstruct(tokens))
