"""CellFM files of all origins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

import scfm
from scfm.backbones import from_config
from scfm.backbones.cellfm import CellFMBackbone, CellFMConfig
from scfm.backbones.cellfm.gene_list import GENE_LISTS, make_vocab
from scfm.genes import GeneVocab

N_GENES, DIM, HEADS, CLASSES = 22, 16, 2, 3
GENES = [f"G{i}" for i in range(N_GENES)]
LETTERS = ("k", "v", "q", "u")


def network(**fields):
    config = CellFMConfig(n_genes=N_GENES, dim=DIM, n_heads=HEADS, n_layers=3, **fields)
    return from_config("cellfm", config, GeneVocab(["<pad>", *GENES], specials=["<pad>"]), seed=1)


def official(backbone, *, lora=0):
    """State of a network under the names of the MindSpore code."""
    out = {}
    simple = {
        "gene_embedding.weight": "gene_emb",
        "zero_embedding": "zero_emb",
        "depth_tokens": "ST_emb",
        "mask_embedding": "value_enc.mask_emb",
        "head.classes": "cluster_emb",
        "head.score.weight": "classifier.weight",
    }
    renames = {
        "value_encoder": "value_enc.value_enc",
        "depth_encoder": "ST_enc",
        "gene_decoder.zero_head": "value_dec.zero_logit",
        "gene_decoder": "value_dec",
        "cell_decoder.zero_head": "cellwise_dec.zero_logit",
        "cell_decoder": "cellwise_dec",
        "head.layers": "query_layer",
        "layers": "encoder",
    }
    for key, tensor in backbone.module.state_dict().items():
        name = simple.get(key, key)
        for ours, theirs in renames.items():
            if name.startswith(f"{ours}."):
                name = theirs + name[len(ours) :]
                break
        name = name.replace("self_attention", "attn1").replace("gene_attention", "attn2").replace("attention", "attn")
        for i in (1, 2, 3):
            name = name.replace(f".norm{i}.weight", f".post_norm{i}.gamma").replace(
                f".norm{i}.bias", f".post_norm{i}.beta"
            )
        for packed, letters in ((".kvqu.", LETTERS), (".uv.", ("u", "v")), (".out.", ("o",))):
            if packed in name:
                parent, kind = name.split(packed)
                for letter, part in zip(letters, tensor.chunk(len(letters)), strict=True):
                    suffix = {"weight": f"{letter}_proj.weight", "lora_a": f"lora_{letter}.A.weight"}
                    out[f"{parent}.{suffix.get(kind, f'lora_{letter}.B.weight')}"] = part
                break
        else:
            out[name] = tensor
    return out


def counts():
    return np.random.default_rng(0).poisson(2.0, (4, N_GENES))


def embedding(backbone):
    return backbone.embed(backbone.tokenize(sparse.csr_matrix(counts()), GENES))


@pytest.fixture
def write(tmp_path, mindspore_writer):
    def of(state, name="my.ckpt", **options):
        return mindspore_writer.write(tmp_path / name, state, **options)

    return of


OPTIONS = {"genes": GENES, "n_heads": HEADS}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"has_depth_tokens": False},
        {"has_zero_heads": True, "has_zero_embedding": False},
        {"lora_rank": 2},
        {"class_head": "retention", "n_classes": CLASSES},
    ],
)
@pytest.mark.parametrize("moments", [False, True])
def test_official_files(write, fields, moments):
    backbone = network(**fields)
    state = official(backbone)
    extra = {"global_step": torch.tensor([7]), "learning_rate": torch.tensor(1e-4), "beta1_power": torch.tensor(0.9)}
    extra |= {f"moment{i}.{key}": torch.zeros_like(tensor) for i in (1, 2) for key, tensor in state.items()}
    path = write(state | (extra if moments else {}))
    loaded = scfm.load(path.parent, merge_lora=False, **OPTIONS)
    assert loaded.config == backbone.config
    assert loaded.vocab == backbone.vocab
    assert set(loaded.load_report.dropped) == (set(extra) if moments else set())
    assert torch.equal(embedding(loaded), embedding(backbone))
    for key, tensor in backbone.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[key], tensor), key


def test_low_rank_updates_merged_or_apart_give_the_same(write, tmp_path):
    backbone = network(lora_rank=3)
    for name, parameter in backbone.module.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    path = write(official(backbone))
    apart, merged = scfm.load(path, merge_lora=False, **OPTIONS), scfm.load(path, **OPTIONS)
    assert (apart.config.lora_rank, merged.config.lora_rank) == (3, 0)
    assert "encoder.0.attn.lora_q.A.weight" in merged.load_report.dropped
    assert merged.n_parameters < apart.n_parameters
    torch.testing.assert_close(embedding(merged), embedding(apart), atol=1e-5, rtol=1e-5)
    without = network()
    without.module.load_state_dict({k: v for k, v in backbone.module.state_dict().items() if "lora" not in k})
    assert (embedding(without) - embedding(apart)).abs().max() > 0.03


def test_files_of_the_tutorials_and_of_the_port(write, tmp_path):
    backbone = network(class_head="retention", n_classes=CLASSES)
    state = official(backbone)
    heads = ("cluster_emb", "classifier", "query_layer")
    path = write({key if key.startswith(heads) else f"extractor.{key}": tensor for key, tensor in state.items()})
    loaded = scfm.load(path, **OPTIONS)
    assert (loaded.config.class_head, loaded.config.n_classes) == ("retention", CLASSES)
    tokens = loaded.tokenize(sparse.csr_matrix(counts()), GENES)
    assert torch.equal(loaded.classify(tokens), backbone.classify(tokens))

    backbone = network(class_head="mlp", n_classes=CLASSES)
    state = {key.replace(".gamma", ".weight").replace(".beta", ".bias"): t for key, t in official(backbone).items()}
    state = {
        key.replace("head.", "cls.") if key.startswith("head.") else f"extractor.net.{key}": t
        for key, t in state.items()
    }
    torch.save(state, tmp_path / "tuned.pt")
    loaded = scfm.load(tmp_path / "tuned.pt", compat="torch-port", **OPTIONS)
    assert (loaded.config.leaky_slope, loaded.config.ln_eps, loaded.config.class_head) == (0.01, 1e-5, "mlp")
    probabilities = loaded.classify(tokens)
    assert probabilities.shape == (4, CLASSES)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
    with pytest.raises(scfm.UnsupportedError, match="no attention to genes"):
        loaded.class_attention(tokens)


def test_community_conversion_has_no_decoders(tmp_path):
    backbone = network(has_gene_decoder=False, has_cell_decoder=False, has_depth_tokens=False)
    state = {
        key.replace("value_enc.value_enc", "value_enc")
        .replace("post_", "")
        .replace("gamma", "weight")
        .replace("beta", "bias"): t
        for key, t in official(backbone).items()
    }
    torch.save(state, tmp_path / "model.pt")
    assert CellFMBackbone.recognizes(tmp_path)
    loaded = scfm.load(tmp_path, **OPTIONS)
    assert torch.equal(embedding(loaded), embedding(backbone))
    with pytest.raises(scfm.UnsupportedError, match="no gene-wise decoder"):
        loaded.pretraining_loss(loaded.tokenize_for_training(counts(), GENES, torch.Generator()))


def test_other_files_are_not_taken_for_cellfm(tmp_path, write):
    assert not CellFMBackbone.recognizes(tmp_path)
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "model.pt")
    torch.save({"gene_emb": torch.ones(2)}, tmp_path / "models.ckpt")
    write({"layer.weight": torch.ones(2)}, "other.ckpt")
    (tmp_path / "notes.txt").write_text("gene_emb")
    assert not CellFMBackbone.recognizes(tmp_path)
    assert not any(CellFMBackbone.recognizes(path) for path in tmp_path.iterdir())
    (tmp_path / "models.ckpt").unlink()
    with pytest.raises(scfm.CheckpointError, match="no checkpoint that scfm knows"):
        scfm.load(tmp_path)


def test_several_files_are_not_guessed_between(write):
    backbone = network()
    folder = write(official(backbone), "first.ckpt").parent
    write(official(backbone), "second.ckpt")
    with pytest.raises(scfm.CheckpointError, match="several weight files: first.ckpt, second.ckpt"):
        scfm.load(folder, **OPTIONS)
    assert scfm.load(folder / "second.ckpt", **OPTIONS).provenance.path.endswith("second.ckpt")
    assert scfm.load(folder, weights="first.ckpt", **OPTIONS).provenance.path.endswith("first.ckpt")
    write(official(backbone), "base_weight.ckpt")
    assert scfm.load(folder, **OPTIONS).provenance.path.endswith("base_weight.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no file third\.ckpt"):
        scfm.load(folder, weights="third.ckpt", **OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("encoder.1.attn.q_proj.weight"), "1 of the 4 tensors"),
        (lambda s: s.update(odd=torch.ones(1)), "no rule knows: odd"),
        (lambda s: s.pop("encoder.2.post_norm2.beta"), "missing from the file: layers.2.norm2.bias"),
        (lambda s: s.update({"value_dec.w2.weight": torch.ones(2, DIM)}), "shapes that differ"),
        (lambda s: s.pop("gene_emb"), "no gene table|no checkpoint"),
    ],
)
def test_files_that_do_not_fit(write, change, message):
    state = official(network())
    change(state)
    with pytest.raises(scfm.CheckpointError, match=message):
        scfm.load(write(state), **OPTIONS)


def test_number_of_heads_is_asked_for_where_it_does_not_follow(write):
    path = write(official(network()))
    with pytest.raises(scfm.CheckpointError, match="n_heads="):
        scfm.load(path, genes=GENES)
    assert scfm.load(path, genes=GENES, n_heads=4).config.n_heads == 4


def test_constants_can_be_chosen(write):
    path = write(official(network()))
    default = scfm.load(path, **OPTIONS)
    other = scfm.load(path, leaky_slope=0.01, ln_eps=1e-3, **OPTIONS)
    assert (default.config.leaky_slope, default.config.ln_eps) == (0.2, 1e-7)
    assert (other.config.leaky_slope, other.config.ln_eps) == (0.01, 1e-3)
    assert not torch.allclose(embedding(default), embedding(other))


# -- genes ---------------------------------------------------------------------------------------------------------------


def write_list(path, n, header="HGNC_gene"):
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["NA", *(f"GENE{i}" for i in range(1, n))]
    path.write_text("\n".join([f"{header},feature", *(f"{name},lncRNA" for name in names)]) + "\n")


@pytest.mark.parametrize(("n_genes", "name"), [(27855, "expand_gene_info.csv"), (24078, "gene_info.csv")])
@pytest.mark.parametrize("place", ["beside", "above", "cache"])
def test_the_gene_list_follows_from_the_size(tmp_path, n_genes, name, place):
    folders = {"beside": tmp_path, "above": tmp_path.parent, "cache": scfm.settings.cachedir / "cellfm-80m"}
    n_rows = {v: k for k, v in GENE_LISTS.items()}[name]
    path = folders[place] / name
    with pytest.raises(scfm.CheckpointError, match=f"{name} is missing"):
        make_vocab(tmp_path / "model.ckpt", n_rows)
    write_list(path, n_genes)
    vocab = make_vocab(tmp_path / "model.ckpt", n_rows)
    assert (len(vocab), vocab.n_genes, vocab["NA"], vocab["GENE5"]) == (n_genes + 1, n_genes, 1, 6)
    path.unlink()


def test_gene_lists_that_do_not_fit(tmp_path):
    weights = tmp_path / "model.ckpt"
    write_list(tmp_path / "gene_info.csv", 24078)
    with pytest.raises(scfm.CheckpointError, match="24,078 names.*belongs to another model"):
        make_vocab(weights, 27856, tmp_path / "gene_info.csv")
    write_list(tmp_path / "genemap.csv", 27855)
    with pytest.raises(scfm.CheckpointError, match="neither released model"):
        make_vocab(weights, 27856, tmp_path / "genemap.csv")
    write_list(tmp_path / "table.csv", 27855, header="symbol")
    with pytest.raises(scfm.CheckpointError, match="no column 'HGNC_gene'"):
        make_vocab(weights, 27856, tmp_path / "table.csv")
    with pytest.raises(FileNotFoundError):
        make_vocab(weights, 27856, tmp_path / "nowhere.csv")


def test_models_of_other_sizes_get_numbered_genes(write, capsys):
    backbone = scfm.load(write(official(network())), n_heads=HEADS)
    assert "genes without names" in capsys.readouterr().err
    assert backbone.vocab["gene_7"] == 7
    assert len(backbone.gene_embeddings()) == len(backbone.vocab) == 24


def test_genes_without_the_weights(tmp_path, write):
    write_list(tmp_path / "gene_info.csv", 24078)
    assert CellFMBackbone.read_vocab(tmp_path).n_genes == 24078
    write(official(network()))
    assert CellFMBackbone.read_vocab(tmp_path, genes=GENES).n_genes == N_GENES
