"""scLong's pair of official files: what is read, and what is refused and why."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict

import numpy as np
import psutil
import pytest
import torch

import scfm
from scfm.backbones import random_copy
from scfm.backbones._load import load_vocab
from scfm.backbones.sclong import PRESETS, SCLongBackbone, SCLongConfig, checkpoint
from scfm.genes import GeneVocab

N = 31
HYPER = {
    "max_seq_len": N, "top_seq_len": 7, "base_dim": 8, "mini_enc_depth": 1, "mini_enc_heads": 2, "mini_enc_dim_head": 4,
    "large_dim": 12, "large_enc_depth": 2, "large_enc_heads": 3, "large_enc_dim_head": 6, "dec_depth": 1, "dec_heads": 2,
    "dec_dim_head": 5, "mask_token_thres": -1, "g2v_position_emb": True, "go_num_layers": 1, "device": "cuda",
    "go_use_gene2vec": True, "gene2vec_file": "/nowhere/gene2vec.npy",
}  # fmt: skip
NAME = "tiny"


def hyper_parameters(**changes):
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(0, N - 1, (2, 40), generator=generator)
    return {**HYPER, "G_go": edges, "G_go_weight": torch.rand(40, generator=generator) + 0.1, **changes}


def upstream_shapes(hyper):
    """Keys and shapes that the authors' network has."""
    d, large, n = hyper["base_dim"], hyper["large_dim"], hyper["max_seq_len"]
    norms = {"token_norm": d, "large_in_norm": large, "large_to_base_out_norm": d, "decode_norm": d}
    linears = {
        "token_emb.fc1": (50, 1), "token_emb.fc2": (d, 50), "base_to_large": (large, d), "large_to_base": (d, large),
        "exp_to_out": (1, d),
    } | {f"go_conv.sim_layers.{i}.lin": (d, d) for i in range(hyper["go_num_layers"])}  # fmt: skip
    shapes = {"mask_emb.weight": (1, d), "go_conv.emb.weight": (n, d)}
    if hyper["g2v_position_emb"]:
        shapes["pos_emb.emb.weight"] = (n, d)
    for stack, prefix, width in (
        ("mini_encoder", "mini_enc", d),
        ("large_encoder", "large_enc", large),
        ("decoder", "dec", d),
    ):
        heads, head = hyper[f"{prefix}_heads"], hyper[f"{prefix}_dim_head"]
        shapes[f"{stack}.calls_since_last_redraw"] = ()
        for i in range(hyper[f"{prefix}_depth"]):
            layer = f"{stack}.net.layers.{i}."
            norms |= {f"{layer}0.norm": width, f"{layer}1.norm": width}
            shapes[f"{layer}0.fn.fast_attention.projection_matrix"] = (int(head * np.log(head)), head)
            shapes |= {f"{layer}0.fn.to_{part}.weight": (heads * head, width) for part in "qkv"}
            linears |= {f"{layer}0.fn.to_out": (width, heads * head)}
            linears |= {f"{layer}1.fn.fn.w1": (4 * width, width), f"{layer}1.fn.fn.w2": (width, 4 * width)}
    for key, width in norms.items():
        shapes |= {f"{key}.weight": (width,), f"{key}.bias": (width,)}
    for key, shape in linears.items():
        shapes |= {f"{key}.weight": shape, f"{key}.bias": shape[:1]}
    return shapes


def upstream_state(hyper, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in upstream_shapes(hyper).items()}
    for key in state:
        if key.endswith("calls_since_last_redraw"):
            state[key] = torch.tensor(17)
    if "pos_emb.emb.weight" in state:
        state["pos_emb.emb.weight"] = state["pos_emb.emb.weight"].double()
    return state


@pytest.fixture
def folder(tmp_path):
    """``folder(hyper, content)``: a folder with a pickle, a weight file and a gene list."""

    def write(hyper=None, content=None, *, genes=True, name="model"):
        hyper = hyper_parameters() if hyper is None else hyper
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        (path / f"{NAME}.pkl").write_bytes(pickle.dumps(hyper))
        content = {"epoch": "2024", "model_state_dict": upstream_state(hyper)} if content is None else content
        torch.save(content, path / f"{NAME}_2024-02-05.pth")
        if genes:
            (path / checkpoint.GENE_LIST).write_text(
                "".join(f"ENSG{i:011d}\n" for i in range(hyper["max_seq_len"] - 1))
            )
        return path

    return write


ROWS = np.random.default_rng(0).poisson(0.7, (3, N - 1)).astype(np.float32)


def states_of(backbone):
    return backbone.gene_states(backbone.batch(ROWS))


def test_the_released_preset_has_the_published_size():
    config = PRESETS["sclong"]
    names = [*(f"G{i}" for i in range(config.n_positions - 1)), "PAD"]
    with torch.device("meta"):
        module = SCLongBackbone.build(config, GeneVocab(names, specials=["PAD"]))
    assert sum(p.numel() for p in module.parameters()) == 1_006_086_461
    assert sum(p.numel() for p in module.large.parameters()) == 991_441_920
    assert module.large.layers[0].projection.shape == (266, 64)
    assert module.gene_table.weight.dtype == torch.float64


def test_everything_is_driven_by_the_hyper_parameters(folder):
    backbone = scfm.load(folder())
    assert backbone.load_report.ok
    assert not backbone.load_report.dropped
    config = backbone.config
    assert (config.n_positions, config.top_length, config.dim, config.n_edges) == (N, 7, 8, 40)
    assert (config.large_dim, config.large_depth, config.large_heads, config.large_dim_head) == (12, 2, 3, 6)
    assert (config.decoder_depth, config.decoder_heads, config.decoder_dim_head) == (1, 2, 5)
    assert SCLongBackbone.config_from_dict(asdict(config)) == config
    assert backbone.device.type == "cpu", "the pickled device plays no role"
    assert backbone.vocab.specials == ("PAD",)
    assert backbone.vocab["PAD"] == N - 1
    assert backbone.provenance.path.endswith(".pth")
    assert int(backbone.module.large.calls_since_redraw) == 17
    assert torch.isfinite(states_of(backbone)).all()


def test_a_bare_state_dict_and_the_file_itself_are_understood(folder):
    expected = states_of(scfm.load(folder()))
    path = folder(content=upstream_state(hyper_parameters()), name="bare")
    assert torch.equal(states_of(scfm.load(path)), expected)
    assert torch.equal(states_of(scfm.load(next(path.glob("*.pth")))), expected)


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({"g2v_position_emb": False}, "gene_table"),
        ({"go_num_layers": 2}, None),
        ({"go_use_gene2vec": False}, None),
        ({"qkv_bias": False, "reversible": False, "local_attn_heads": 0}, None),
    ],
)
def test_other_architectures(folder, change, gone):
    hyper = hyper_parameters(**change)
    backbone, plain = scfm.load(folder(hyper)), scfm.load(folder(name="plain"))
    assert backbone.load_report.ok
    assert not [name for name in backbone.module.state_dict() if gone and name.startswith(gone)]
    same = torch.equal(states_of(backbone), states_of(plain))
    assert same == ("qkv_bias" in change)
    if gone:
        with pytest.raises(ValueError, match="one of go, sum"):
            backbone.gene_embeddings(kind="position")
        torch.testing.assert_close(backbone.gene_embeddings(), backbone.gene_embeddings(kind="go"))


def test_gene_vectors_of_a_table_with_bounded_norm(folder):
    hyper = hyper_parameters(go_use_gene2vec=False)
    state = upstream_state(hyper)
    bounded, cut = scfm.load(folder(hyper)), dict(state)
    norm = state["go_conv.emb.weight"].norm(dim=1, keepdim=True)
    assert (norm > 1).any()
    assert (norm < 1).any()
    cut["go_conv.emb.weight"] = torch.where(norm > 1, state["go_conv.emb.weight"] / norm, state["go_conv.emb.weight"])
    plain = scfm.load(folder(content=cut, name="cut"))
    torch.testing.assert_close(bounded.gene_embeddings(kind="go"), plain.gene_embeddings(kind="go"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"reversible": True}, "reversible=True"),
        ({"generalized_attention": True, "causal": True}, "generalized_attention=True, causal=True"),
        ({"something_new": 0}, "something_new=0"),
        ({"top_seq_len": N}, "the mini encoder needs a gene"),
        ({"mask_token_thres": 0.5}, "must be below 0"),
        ({"G_go": torch.tensor([[0], [N]]), "G_go_weight": torch.ones(1)}, "beyond the 31 positions"),
        ({"G_go_weight": torch.ones(3)}, "which is no graph"),
    ],
)
def test_unsupported_hyper_parameters_are_refused_by_name(folder, change, text):
    path = folder(hyper_parameters(), name="other")
    (path / f"{NAME}.pkl").write_bytes(pickle.dumps(hyper_parameters(**change)))
    with pytest.raises(scfm.CheckpointError, match=text):
        scfm.load(path)


def test_keys_that_do_not_fit_are_named(folder):
    state = upstream_state(hyper_parameters())
    state["large_encoder.net.layers.0.0.fn.to_q.bias"] = torch.zeros(18)
    del state["decode_norm.bias"]
    with pytest.raises(scfm.CheckpointError, match=r"query\.bias.*missing from the file: norm\.bias"):
        scfm.load(folder(content={"model_state_dict": state}))


def test_files_of_others_are_left_to_others(folder, tmp_path):
    path = folder()
    assert SCLongBackbone.recognizes(path)
    (path / f"{NAME}.pkl").write_bytes(pickle.dumps({"max_seq_len": 3}))
    assert not SCLongBackbone.recognizes(path)
    (path / f"{NAME}.pkl").write_bytes(pickle.dumps(os.system))
    assert not SCLongBackbone.recognizes(path)
    assert not SCLongBackbone.recognizes(tmp_path)
    other = folder(content={"weights": torch.zeros(3)}, name="other")
    with pytest.raises(scfm.CheckpointError, match="holds no weights of scLong"):
        scfm.load(other)


def test_several_weight_files_need_a_choice(folder):
    path = folder()
    torch.save({"model_state_dict": upstream_state(hyper_parameters(), seed=1)}, path / f"{NAME}_later.pth")
    with pytest.raises(scfm.CheckpointError, match=r"tiny_2024-02-05\.pth, tiny_later\.pth"):
        scfm.load(path)
    first, later = (scfm.load(path, weights=f"{NAME}_{which}.pth") for which in ("2024-02-05", "later"))
    assert not torch.equal(states_of(first), states_of(later))
    with pytest.raises(FileNotFoundError, match=r"no weight file \(\.pth\) with the name none"):
        scfm.load(path, weights="none")


def test_gene_lists(folder):
    path = folder()
    names = scfm.load(path).vocab.names
    assert names[:2].tolist() == ["ENSG00000000000", "ENSG00000000001"]
    assert load_vocab(path) == scfm.load(path).vocab
    given = [f"GENE{i}" for i in range(N - 1)]
    assert scfm.load(path, genes=given).vocab.genes.tolist() == given
    assert scfm.load(path, genes=path / checkpoint.GENE_LIST).vocab.names.tolist() == names.tolist()
    with pytest.raises(scfm.CheckpointError, match="has 3 names, but the model"):
        scfm.load(path, genes=["A", "B", "C"])
    with pytest.raises(FileNotFoundError, match="no gene list at"):
        scfm.load(path, genes=path / "none.txt")


def test_without_a_gene_list_small_models_get_numbers_and_the_released_one_an_error(folder, capsys):
    unnamed = scfm.load(folder(genes=False))
    assert unnamed.vocab.names[0] == "gene_0"
    assert "Pass genes=" in capsys.readouterr().err
    hyper = hyper_parameters(max_seq_len=27875, base_dim=1, large_dim=1)
    with pytest.raises(scfm.CheckpointError, match=f"gene list {checkpoint.GENE_LIST} is missing"):
        scfm.load(folder(hyper, genes=False, name="released"))
    scfm.settings.cachedir.joinpath("sclong").mkdir(parents=True)
    listed = scfm.settings.cachedir / "sclong" / checkpoint.GENE_LIST
    listed.write_text("\n".join(f"ENSG{i:011d}" for i in range(27874)))
    assert scfm.load(folder(hyper, genes=False, name="released")).vocab.n_genes == 27874


def test_the_state_of_the_optimiser_is_never_read(folder):
    moments = {"state": {i: {"exp_avg": torch.randn(4 << 20)} for i in range(16)}}  # 256 MiB
    content = {"model_state_dict": upstream_state(hyper_parameters()), "optimizer_state_dict": moments}
    path = folder(content=content)
    del moments, content
    assert (path / f"{NAME}_2024-02-05.pth").stat().st_size > 256 << 20
    process = psutil.Process()
    before = process.memory_info().rss
    read = checkpoint.read(path)
    assert process.memory_info().rss - before < 64 << 20
    assert set(read.state_dict) == set(scfm.load(path).module.state_dict())


def test_saving_keeps_graph_and_table_and_copies_share_the_graph(folder, tmp_path):
    backbone = scfm.load(folder())
    loaded = scfm.load(backbone.save(tmp_path / "saved"))
    assert loaded.config == backbone.config
    assert torch.equal(loaded.module.go.edges, backbone.module.go.edges)
    assert loaded.module.gene_table.weight.dtype == torch.float64
    assert torch.equal(states_of(loaded), states_of(backbone))
    copy = random_copy(backbone)
    assert torch.equal(copy.module.go.edges, backbone.module.go.edges)
    assert torch.equal(copy.module.go.edge_weight, backbone.module.go.edge_weight)
    assert not torch.equal(copy.module.go.weight, backbone.module.go.weight)


def test_a_vocabulary_without_pad_is_refused():
    with pytest.raises(ValueError, match="the special entry 'PAD'"):
        SCLongBackbone.build(SCLongConfig(n_positions=10, top_length=2), GeneVocab([f"G{i}" for i in range(10)]))
