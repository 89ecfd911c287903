"""DeepCE: the network, its training, and what comes before it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rdkit")

from scfm.nn.ragged import pad
from scfm.tasks.deepce import DeepCE, DeepCEConfig
from scfm.tasks.deepce_fit import DeepCETraining, Signatures, predict_deepce, train_deepce
from scfm.tasks.molecules import MoleculeBatch, molecules_of
from scfm.tasks.signatures import Categories, central_replicates

SMILES = ["CC(=O)OC1=CC=CC=C1C(=O)O", "CCO", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C", "C"]
UPSTREAM = {
    "drug_fp.conv_layers.": "fingerprint.convolutions.",
    ".normalize.": ".norm.",
    ".linear.": ".own.",
    "drug_fp.out_layers.": "fingerprint.outputs.",
    "gene_embed.": "gene_input.",
    "drug_gene_attn.layers.": "layers.",
    "drug_gene_attn.fc_out": "gene_output",
    "layer_norm": "norm",
    "self_attention": "among_genes",
    "encoder_attention": "to_atoms",
    "fc_q": "query",
    "fc_k": "key",
    "fc_v": "value",
    "fc_o.": "out.",
    "positionwise_feedforward.fc_1": "feedforward.0",
    "positionwise_feedforward.fc_2": "feedforward.3",
    "cell_id_embed": "cell_line",
    "pert_idose_embed": "dose",
    "linear_1": "hidden",
    "linear_2": "output",
    ".fc.": ".join.",
}
BY_DEGREE = re.compile(r"drug_fp\.conv_layers\.(\d)\.degree_layer_list\.(\d)\.weight")


def renamed(name: str) -> str:
    for theirs, ours in UPSTREAM.items():
        name = name.replace(theirs, ours)
    return name


def test_golden(golden):
    data = golden("sclong", "chem_perturb_deepce")
    state = torch.load(data.path / "checkpoint" / "deepce.pt", weights_only=True)
    config = DeepCEConfig(200, 7, 6, dim=48, hidden=40, heads=4, layers=2, feedforward=512)
    network = DeepCE(config, torch.from_numpy(data.input["gene_emb"])).double().eval()
    weights = {renamed(name): value for name, value in state.items() if not BY_DEGREE.match(name)}
    for layer in range(2):
        parts = [state[f"drug_fp.conv_layers.{layer}.degree_layer_list.{degree}.weight"] for degree in range(6)]
        weights[f"fingerprint.convolutions.{layer}.by_degree"] = torch.stack(parts)
    network.load_state_dict(weights | {"genes": network.genes})
    tolerance = data.case["tolerance"]
    batch = MoleculeBatch.of(molecules_of(data.input["smiles"].tolist()), dtype=torch.float64)
    atoms = pad(network.fingerprint(batch), batch.lengths)[0].detach()
    np.testing.assert_allclose(atoms, data.expected["drug_fingerprint_atoms"], **tolerance)
    cell_lines, doses, label = (torch.from_numpy(data.input[name]) for name in ("cell_id", "dose", "label"))
    predicted = network(batch, cell_lines, doses)
    np.testing.assert_allclose(predicted.detach(), data.expected["pred"], **tolerance)
    loss = torch.nn.functional.mse_loss(predicted, label)
    np.testing.assert_allclose(loss.item(), data.expected["loss"], **tolerance)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name, norm in json.loads((data.path / "grad_norms.json").read_text()).items():
        if found := BY_DEGREE.match(name):
            gradient = gradients[f"fingerprint.convolutions.{found[1]}.by_degree"][int(found[2])]
        else:
            gradient = gradients[renamed(name)]
        np.testing.assert_allclose(gradient.norm().item(), norm, rtol=1e-6, atol=1e-9, err_msg=name)


def tiny(seed: int = 0, n_genes: int = 12, **options) -> DeepCE:
    genes = torch.from_numpy(np.random.default_rng(1).standard_normal((n_genes, 5), dtype=np.float32))
    config = DeepCEConfig(
        5, 2, 3, **{"dim": 8, "hidden": 8, "heads": 2, "feedforward": 16, "convolutions": (4,)} | options
    )
    return DeepCE(config, genes, seed=seed).eval()


def some_samples(n: int = 24, n_genes: int = 12) -> Signatures:
    rng = np.random.default_rng(3)
    molecule = np.arange(n) % len(SMILES)
    profiles = rng.standard_normal((len(SMILES), n_genes)).astype(np.float32)
    values = profiles[molecule] + 0.1 * rng.standard_normal((n, n_genes)).astype(np.float32)
    cells, doses = (np.eye(size, dtype=np.float32)[rng.integers(size, size=n)] for size in (2, 3))
    return Signatures(molecules_of(SMILES), molecule, cells, doses, values)


def test_a_sample_does_not_depend_on_the_others():
    network, samples = tiny(), some_samples(7)
    together = predict_deepce(network, samples)
    for size in (1, 2, 5):
        np.testing.assert_allclose(predict_deepce(network, samples, batch_size=size), together, atol=1e-6)
    order = np.array([3, 0, 6, 1])
    np.testing.assert_allclose(predict_deepce(network, samples, order), together[order], atol=1e-6)
    whole = network(
        MoleculeBatch.of([samples.molecules[number] for number in samples.molecule]),
        torch.from_numpy(samples.cell_lines),
        torch.from_numpy(samples.doses),
    )
    np.testing.assert_allclose(whole.detach(), together, atol=1e-6)
    # drug, dose and cell line all matter
    assert all(np.abs(together[0] - row).max() > 1e-7 for row in together[1:4])


def test_order_of_genes_does_not_matter():
    network, samples = tiny(), some_samples(4)
    before = predict_deepce(network, samples)
    order = np.random.default_rng(0).permutation(12)
    network.genes = network.genes[order]
    np.testing.assert_allclose(predict_deepce(network, samples), before[:, order], atol=1e-6)


def test_training_learns_chooses_and_repeats():
    samples, rows = some_samples(), np.arange(24)
    options = DeepCETraining(max_epochs=8, batch_size=8, lr=2e-2, seed=2, monitor="RMSE")
    state = torch.random.get_rng_state()
    runs = []
    for _ in range(2):
        network = tiny(dropout=0.1)
        history = list(train_deepce(network, samples, rows[:16], rows[16:], options))
        runs.append((network, history))
    assert torch.equal(state, torch.random.get_rng_state())
    (network, history), (again, _) = runs
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert history[-1]["train_loss_epoch"] < 0.9 * history[0]["train_loss_epoch"]
    best = min(row["RMSE_validation"] for row in history)
    predicted = predict_deepce(network.eval(), samples, rows[16:])
    assert np.sqrt(np.mean((predicted - samples.values[16:]) ** 2)) == pytest.approx(best, rel=1e-5)
    assert [row["kept"] for row in history].count(1.0) >= 1


def test_schedule_of_the_paper():
    training = DeepCETraining(max_epochs=100, lr=2e-5, warmup_epochs=5)
    assert training.rate(0) == pytest.approx(4e-6)
    assert training.rate(4) == training.rate(5) == pytest.approx(2e-5)
    assert training.rate(99) == pytest.approx(2e-5 / 95)
    assert DeepCETraining().rate(0) == DeepCETraining().rate(99) == 2e-4


def test_wrong_options():
    for options in ({"dim": 10, "heads": 4}, {"dropout": 1.0}, {"convolutions": (0,)}):
        with pytest.raises(ValueError, match="must"):
            tiny(**options)
    for options in ({"max_epochs": 0}, {"lr": 0}, {"monitor": "accuracy"}):
        with pytest.raises(ValueError, match="must be"):
            DeepCETraining(**options)
    samples = some_samples(4)
    samples.values[0, 0] = np.inf
    with pytest.raises(ValueError, match="no longer finite"):
        list(train_deepce(tiny(), samples, np.arange(4), np.arange(0), DeepCETraining(max_epochs=1)))


# -- replicates, doses and cell lines ------------------------------------------------------------------------------------


def test_central_replicate_has_the_middle_ranks():
    signatures = np.array([[1.0, 5, 2], [2, 6, 1], [3, 7, 9], [0, 0, 0], [4, 4, 4]])
    # ranks of the first three: (0, 0, 1), (1, 1, 0), (2, 2, 2); their means are 1/3, 2/3 and 2
    np.testing.assert_array_equal(central_replicates(signatures, ["a", "a", "a", "b", "c"]), [1, 3, 4])
    with pytest.raises(ValueError, match="missing"):
        central_replicates(np.full((2, 2), np.nan), ["a", "a"])
    with pytest.raises(ValueError, match="one group"):
        central_replicates(signatures, ["a"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_central_replicates_do_not_depend_on_the_order(seed):
    rng = np.random.default_rng(seed)
    signatures, groups = rng.standard_normal((15, 31)), rng.integers(4, size=15)
    chosen = set(map(int, central_replicates(signatures, groups)))
    assert sorted(groups[list(chosen)]) == sorted(set(groups.tolist()))
    order = rng.permutation(15)
    again = {int(order[row]) for row in central_replicates(signatures[order], groups[order])}
    # equally central ones are taken by their place
    sizes = np.bincount(groups, minlength=4)
    assert all(row in again for row in chosen if sizes[groups[row]] in (1,))
    assert len(again) == len(chosen)


def test_doses_by_size_and_in_between():
    doses = Categories.of(["10.0 um", "0.12 um", "1.11 um"], "dose", amounts=True)
    assert doses.names == ("0.12 um", "1.11 um", "10.0 um")
    np.testing.assert_array_equal(doses.indicators(["1.11 um", "10 um"]), [[0, 1, 0], [0, 0, 1]])
    between = doses.indicators([f"{np.sqrt(1.11 * 10)} um"])
    np.testing.assert_allclose(between, [[0, 0.5, 0.5]], atol=1e-6)
    for wrong in ("100 um", "0.01 um", "1 mm", "high"):
        with pytest.raises(ValueError, match=f"no dose {wrong}"):
            doses.indicators([wrong])
    for spelling in ("10 \N{MICRO SIGN}M", "10 \N{GREEK SMALL LETTER MU}M", "10 uM", "10um"):
        np.testing.assert_array_equal(doses.indicators([spelling]), doses.indicators(["10.0 um"]))
    marked = Categories.of(["1 \N{MICRO SIGN}M", "10 \N{GREEK SMALL LETTER MU}m"], "dose", amounts=True)
    np.testing.assert_allclose(marked.indicators(["10 um", "1 uM"]), [[0, 1], [1, 0]])
    assert Categories.of([10, 0.5, 10.0], "dose", amounts=True).names == ("0.5", "10")
    with pytest.raises(ValueError, match="1 samples have no dose"):
        Categories.of([1.0, np.nan], "dose", amounts=True)


def test_cell_lines_are_names_even_where_they_are_numbers():
    lines = Categories.of(["5637", "22RV1", "5637", "253"], "cell line")
    assert lines.names == ("22RV1", "253", "5637")
    with pytest.raises(ValueError, match="no cell line 1000; it has seen 22RV1, 253, 5637"):
        lines.indicators(["1000"])
