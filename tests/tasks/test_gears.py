"""GEARS: against the reference implementations of three papers, and what holds for any network."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import scfm
from scfm.tasks.gears import annotated_genes, annotation_table, coexpression_graph, gears_loss, go_graph, read_gears
from scfm.tasks.gears_network import GearsConfig, GearsNetwork, Graph, fresh_network


def close(actual, expected, **tolerance):
    actual = actual.detach().numpy() if torch.is_tensor(actual) else np.asarray(actual)
    np.testing.assert_allclose(actual, expected, **tolerance)


def tensor(data, name):
    return torch.from_numpy(data.input[name])


def conditions(names, n_genes, genes_of):
    """Number of the condition of each cell, and the genes that count in it."""
    counted = torch.ones(len(names), n_genes, dtype=torch.bool)
    for row, name in enumerate(names):
        if name != "ctrl":
            counted[row] = False
            counted[row, genes_of(name)] = True
    return torch.from_numpy(np.unique(names, return_inverse=True)[1]), counted


def gradient_norms(network, report):
    """Norms of the gradients by official name."""
    official = {ours: theirs for theirs, ours in report.renamed.items()}
    names = dict(network.named_parameters())
    keys = {name: name.replace("entry.", "mix.", 1) if name.startswith("entry.") else name for name in names}
    return {official.get(keys[name], name): float(p.grad.norm()) for name, p in names.items()}


# -- golden cases ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cellfm(golden):
    data = golden("cellfm", "gears_context_embedding")
    graph = Graph(tensor(data, "go_edge_index"), tensor(data, "go_edge_weight"))
    states = tensor(data, "context_embedding")[tensor(data, "z")]
    network, report = read_gears(data.path / "checkpoint" / "model.pt", graph, states=states.shape[2])
    inputs = tensor(data, "x"), tensor(data, "pert_idx").clamp_min(-1), states
    return data, network, report, inputs


def test_cellfm_predictions_loss_and_gradients(cellfm):
    data, network, report, inputs = cellfm
    assert network.config.entry == "mlp"
    assert report.ok
    tolerance = {name: data.case["tolerance"][name] for name in ("rtol", "atol")}
    codes, counted = conditions(data.input["pert_name"], 20, lambda name: data.input[f"retain/{name}"])
    rest = tensor(data, "y"), tensor(data, "ctrl_mean"), codes, counted
    predicted = network(*inputs)
    close(predicted, data.expected["eval_pred"], **tolerance)
    close(gears_loss(predicted, *rest), data.expected["loss_eval_mode"], **tolerance)
    predicted = network.train()(*inputs)
    close(predicted, data.expected["train_pred"], **tolerance)
    loss = gears_loss(predicted, *rest)
    close(loss, data.expected["train_loss"], **tolerance)
    loss.backward()
    norms = gradient_norms(network, report)
    expected = {name: float(data.expected[f"train/gradnorm/{name}"]) for name in norms}
    # biases before batch normalisation have no gradient but rounding
    bound = data.case["tolerance"]["grad_rtol"]
    close(list(norms.values()), list(expected.values()), rtol=bound, atol=bound * max(expected.values()))
    assert min(expected[name] for name in ("pert_emb.weight", "sim_layers.0.lin.weight", "indv_w1")) > 0


@pytest.fixture
def sclong(golden):
    data = golden("sclong", "perturb_gears")
    weights = next((data.path / "checkpoint").glob("*.pth")).name
    backbone = scfm.load(data.path / "checkpoint", weights=weights, device="cpu")
    match = backbone.vocab.match(data.input["input_genes"])
    tokens = backbone.tokenize(sparse.csr_matrix(data.input["x"]), match, normalization="as_is")
    every = backbone.gene_states(tokens, genes=np.arange(len(backbone.vocab)), key_max="batch").clone()
    # genes that the model does not know have the mean over all that it has
    assert (match.ids < 0).any()
    known = torch.from_numpy(match.ids >= 0)[None, :, None]
    states = torch.where(known, every[:, match.ids], every.mean(1, keepdim=True))
    table = annotation_table(data.path / "gears_go" / "toy" / "go.csv")
    graph = go_graph(table, data.input["symbols"], neighbors=len(table), min_similarity=0.0)
    network, report = read_gears(
        data.path / "checkpoint" / "gears_head_model.pt", graph, states=states.shape[2], places=torch.arange(60)
    )
    perturbed = torch.full((5, 2), -1)
    for row, flags in enumerate(data.input["pert"]):
        genes = np.flatnonzero(flags)
        perturbed[row, : len(genes)] = torch.from_numpy(genes)
    return data, network, report, (tensor(data, "x"), perturbed, states)


def test_sclong_predictions_loss_and_gradients(sclong):
    data, network, report, inputs = sclong
    assert network.config.indicator
    assert report.ok
    tolerance = {name: data.case["tolerance"][name] for name in ("rtol", "atol")}
    gradient = {"rtol": data.case["tolerance"]["grad"]["rtol"], "atol": 1e-3}
    codes, counted = conditions(data.input["perts"], 60, lambda name: data.input[f"filter/{name}"])
    rest = tensor(data, "y"), tensor(data, "ctrl_mean"), codes, counted
    close(network.project(inputs[2]), data.expected["eval/cell_gene_emb"], **tolerance)
    predicted = network(*inputs)
    close(predicted, data.expected["eval/pred"], **tolerance)
    close(gears_loss(predicted, *rest), data.expected["eval/loss"], **tolerance)
    predicted = network.train()(*inputs)
    close(predicted, data.expected["train/pred"], **tolerance)
    loss = gears_loss(predicted, *rest)
    close(loss, data.expected["train/loss"], **tolerance)
    loss.backward()
    for ours, theirs in (
        ("indicator.weight", "pert_w.weight"),
        ("perturbations.weight", "pert_emb.weight"),
        ("go.layers.0.bias", "sim_layers.0.lin.bias"),
        ("cross_bias", "indv_b2"),
    ):
        close(network.get_parameter(ours).grad, data.expected[f"train/grad/{theirs}"], **gradient)
    close(network.state_norm.running_mean, data.expected["train/after/bn_emb.running_mean"], **tolerance)
    close(network.norm.running_var, data.expected["train/after/bn_pert_base.running_var"], **tolerance)


def test_sclong_projection_can_stay_as_it_is(sclong):
    data, network, _, inputs = sclong
    frozen = json.loads((data.path / "grads_metrics.json").read_text())["frozen"]
    assert sorted(frozen) == ["singlecell_model.feedforward.bias", "singlecell_model.feedforward.weight"]
    fixed = GearsNetwork(replace(network.config, frozen_projection=True), Graph.empty(), None, network.places)
    fixed.go = network.go
    fixed.load_state_dict(network.state_dict())
    for one in (network, fixed):
        one.train()(*inputs).sum().backward()
    assert network.project.weight.grad is not None
    assert [name for name, part in fixed.named_parameters() if part.grad is None] == ["project.weight", "project.bias"]
    close(fixed.gene_weight.grad, network.gene_weight.grad)


@pytest.fixture
def scfoundation(golden):
    data = golden("scfoundation", "gears_perturbation")
    genes = [f"G{i}" for i in range(120)]
    backbone = scfm.load(data.path / "checkpoint", weights="gene", genes=genes, device="cpu")
    x = data.input["x_with_total"]
    options = backbone.normalized_input(10 ** x[:, -1] if x[:, -1].max() < 10 else x[:, -1])
    tokens = backbone.tokenize(sparse.csr_matrix(x[:, :-1]), genes, **options)
    states = backbone.gene_states(tokens, key_max="batch").clone()
    graphs = [Graph(tensor(data, name), tensor(data, f"{name}_weight")) for name in ("G_go", "G_coexpress")]
    file = data.path / "checkpoint" / "gears" / "model.pt"
    return data, file, graphs, (torch.from_numpy(x[:, :-1].copy()), tensor(data, "pert_idx"), states)


def test_scfoundation_modes_graphs_loss_and_gradients(scfoundation):
    data, file, graphs, inputs = scfoundation
    tolerance = {"rtol": 2e-4, "atol": 5e-5}
    assert data.case["tolerance"] == "rtol 2e-4 atol 5e-5"
    network, report = read_gears(file, *graphs, states=16)
    assert network.config.positions == "table"
    assert report.ok
    close(inputs[2], data.expected["gene_embeddings"], **tolerance)
    predicted = network.train()(*inputs, first_cell_only=True)
    close(predicted, data.expected["pred_train"], **tolerance)
    codes, counted = conditions(data.input["conditions"], 120, lambda name: data.input[f"filter_{name}"])
    loss = gears_loss(predicted, tensor(data, "y"), tensor(data, "ctrl"), codes, counted)
    close(loss, data.expected["loss"], **tolerance)
    loss.backward()
    norms = gradient_norms(network, report)
    expected = dict(zip(data.expected["param_names"], data.expected["grad_norms"], strict=True))
    expected = {name: expected[name] for name in norms}
    close(list(norms.values()), list(expected.values()), rtol=2e-4, atol=2e-4 * max(expected.values()))
    close(network.gene_weight.grad, data.expected["grad_indv_w1"], **tolerance)
    close(network.go.layers[0].weight.grad, data.expected["grad_sim_layers.0.lin.weight"], **tolerance)
    close(network.recover[0].weight.grad, data.expected["grad_recovery_w.network.0.weight"], **tolerance)
    network.eval()
    with torch.no_grad():
        before = data.expected["pred_eval_after_1_train_forward"]
        close(network(*inputs, first_cell_only=True), before, **tolerance)
        # the authors' numbers depend on the order of cells, because only the first one has neighbours ...
        turned = [1, 2, 3, 0]
        back = np.argsort(turned)
        moved = network(*(part[turned] for part in inputs), first_cell_only=True)[back]
        close(moved, data.expected["pred_eval_rotated_batch_order"], **tolerance)
        assert np.abs(moved.numpy() - before).max() > 1e-3
        # ... by default they do not, and the first cell is the same
        right = network(*inputs)
        close(right[0], before[0], **tolerance)
        close(network(*(part[turned] for part in inputs))[back], right, rtol=1e-5, atol=1e-5)
        other, _ = read_gears(file, *graphs, states=16, positions="states")
        other.load_state_dict({key: value for key, value in network.state_dict().items() if key in other.state_dict()})
        close(other(*inputs, first_cell_only=True), data.expected["pred_eval_v2"], **tolerance)


@pytest.mark.parametrize("layers", [(1, 2), (3, 1)])
def test_files_with_other_numbers_of_layers_on_each_graph(scfoundation, layers):
    _, file, graphs, inputs = scfoundation
    official = torch.load(file, weights_only=True)
    for prefix, number in zip(("sim_layers", "layers_emb_pos"), layers, strict=True):
        for layer in range(1, number):
            for part in ("weight", "bias"):
                official[f"{prefix}.{layer}.lin.{part}"] = official[f"{prefix}.0.lin.{part}"] * (layer + 1)
    network, report = read_gears(official, *graphs, states=16)
    assert report.ok
    assert (network.config.n_go_layers, network.config.n_coexpression_layers) == layers
    with torch.no_grad():
        assert torch.isfinite(network(*inputs)).all()
        close(network.go.layers[-1].weight, network.go.layers[0].weight * layers[0])
        close(network.coexpression.layers[-1].weight, network.coexpression.layers[0].weight * layers[1])


def test_one_number_of_layers_for_both_graphs():
    config = GearsConfig(n_genes=7, n_perturbations=5, n_graph_layers=2)
    assert (config.n_go_layers, config.n_coexpression_layers) == (2, 2)
    assert "n_graph_layers" not in vars(config)
    assert GearsConfig(**vars(config)) == config
    with pytest.raises(ValueError, match="at least one"):
        GearsConfig(n_genes=7, n_perturbations=5, n_coexpression_layers=0)


def test_coexpression_is_that_of_the_authors(golden):
    import json

    data = golden("scfoundation", "gears_utils")
    expected = json.loads((data.path / "expected.json").read_text())
    # cells of control and of single perturbations
    singles = [name for name in expected["split_seed1"]["train"] if "ctrl" in name]
    train = np.isin(data.input["condition"], singles)
    genes = data.input["gene_names"]
    for name, rows in expected.items():
        if not name.startswith("coexpress"):
            continue
        threshold, k = (float(part.lstrip("thrk")) for part in name.removeprefix("coexpress_").split("_"))
        graph = coexpression_graph(
            sparse.csr_matrix(data.input["X"][train]), neighbors=int(k), min_correlation=threshold
        )
        source, target = genes[graph.edges.numpy()]
        ours = pd.Series(graph.weight.numpy(), index=pd.MultiIndex.from_arrays([source, target])).sort_index()
        theirs = pd.DataFrame(rows).set_index([0, 1])[2].sort_index()
        assert set(ours.index) == set(theirs.index)
        close(ours.to_numpy(), theirs[ours.index].to_numpy(float), rtol=1e-5, atol=1e-5)


# -- graphs ----------------------------------------------------------------------------------------------------------


def test_graph_convolution_is_that_of_torch_geometric():
    conv = pytest.importorskip("torch_geometric.nn").SGConv
    rng = np.random.default_rng(0)
    pairs = np.unique(rng.integers(0, 9, (2, 20)), axis=1)
    graph = Graph(torch.from_numpy(pairs), torch.rand(pairs.shape[1], generator=torch.Generator().manual_seed(0)))
    network = fresh_network(GearsConfig(3, 9, hidden=4, positions="none"), 0, graph)
    layer = conv(4, 4, K=1)
    layer.lin.load_state_dict(network.go.layers[0].state_dict())
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    close(network.go(x), layer(x, graph.edges, graph.weight).detach(), atol=1e-6, rtol=1e-5)
    some = torch.tensor([7, 2])
    close(network.go(x, some), network.go(x)[some].detach(), atol=1e-6, rtol=1e-5)
    cells = torch.stack([x, 2 * x])
    close(network.go(cells)[1], network.go(2 * x).detach(), atol=1e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_coexpression_by_hand(seed, neighbors):
    rng = np.random.default_rng(seed)
    values = rng.poisson(1.0, (30, 8)).astype(float) + rng.normal(size=(30, 1)) * rng.random(8)
    values[:, 5] = 2.0  # does not vary
    graph = coexpression_graph(values, neighbors=neighbors, min_correlation=0.1)
    with np.errstate(invalid="ignore"):
        size = np.nan_to_num(np.abs(np.corrcoef(values.T)))
    found = {(s, t): w for s, t, w in zip(*graph.edges.numpy(), graph.weight.numpy(), strict=True)}
    for target in range(8):
        best = np.argsort(-size[:, target], kind="stable")[: neighbors + 1]
        assert {s for s, t in found if t == target} == {s for s in best if size[s, target] > 0.1}
    for (source, target), weight in found.items():
        assert weight == pytest.approx(size[source, target], abs=1e-6)
    assert 5 not in graph.edges


def test_annotations_in_every_form(tmp_path):
    table = pd.DataFrame({"go_id": ["t1", "t1", "t2", "t2", "t3"], "symbol": ["A", "B", "B", "C", "D"], "x": 0})
    renamed = table.rename(columns={"go_id": "term", "symbol": "gene"})
    mapping = renamed.groupby("gene")["term"].agg(list).to_dict()
    graphs = [go_graph(annotation_table(form), ["A", "B", "C", "D", "E"]) for form in (table, renamed, mapping)]
    for graph in graphs:
        edges = {tuple(edge): float(w) for edge, w in zip(graph.edges.T.tolist(), graph.weight, strict=True)}
        assert edges[0, 1] == edges[1, 0] == pytest.approx(0.5)
        assert edges[3, 3] == 1
        assert (0, 2) not in edges
        assert all(4 not in edge for edge in edges)
    (tmp_path / "go.tsv").write_text("A\tt1\nB\tt1\nB\tt2\nC\tt2\n")
    assert go_graph(annotation_table(tmp_path / "go.tsv"), ["A", "B"]).weight.tolist() == [1, 0.5, 1, 0.5]
    pairs = pd.DataFrame({"source": ["A", "C"], "target": ["B", "A"], "importance": [0.7, 0.05]})
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    for form in (pairs, tmp_path / "pairs.csv", str(tmp_path / "pairs.csv")):
        graph = go_graph(annotation_table(form), ["A", "B", "C"])
        assert graph.edges.T.tolist() == [[0, 1]]
    assert annotated_genes(annotation_table(pairs)).tolist() == ["A", "B", "C"]
    with pytest.raises(ValueError, match="need the columns 'gene' and 'term'"):
        annotation_table(pd.DataFrame({"a": ["x"]}))


# -- network and loss --------------------------------------------------------------------------------------------------

FORMS = {
    "gears": {"positions": "table"},
    "states": {"positions": "states", "states": 5},
    "norm": {"positions": "none", "states": 8},
    "mlp": {"positions": "none", "states": 5, "entry": "mlp", "entry_hidden": 6},
    "indicator": {"positions": "none", "states": 5, "indicator": True},
    "two layers": {"positions": "table", "n_graph_layers": 2},
    "one and two layers": {"positions": "table", "n_go_layers": 1, "n_coexpression_layers": 2},
}


@pytest.fixture(params=FORMS)
def network(request):
    config = GearsConfig(n_genes=7, n_perturbations=5, hidden=8, **FORMS[request.param])
    go = Graph(torch.tensor([[0, 1, 2], [1, 0, 4]]), torch.tensor([0.5, 0.5, 0.9]))
    near = Graph(torch.tensor([[0, 3, 6], [1, 0, 2]]), torch.tensor([0.8, 0.6, 0.7]))
    places = torch.tensor([0, 2, -1, 5, 6])
    made = fresh_network(config, 0, go, near, places)
    # running statistics of a trained network
    generator = torch.Generator().manual_seed(1)
    for part in made.modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            part.running_mean.normal_(generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
    return made.eval()


def cells(network, n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 7, generator=generator)
    perturbed = torch.tensor([[0, -1], [1, 3], [-1, -1], [4, 2], [2, -1], [3, -1]])[:n]
    width = network.config.states
    return x, perturbed, torch.randn(n, 7, width, generator=generator) if width else None


def picked(parts, rows):
    return [part if part is None else part[rows] for part in parts]


def test_a_cell_does_not_depend_on_others(network):
    inputs = cells(network)
    with torch.no_grad():
        whole = network(*inputs)
        for rows in ([5, 3, 1], [2], [4, 4, 0]):
            close(network(*picked(inputs, rows)), whole[rows], rtol=1e-5, atol=1e-5)
        shared = network.cell_states(inputs[2], 6)
        effects = network.effects(network.perturbation_vectors(), inputs[1])
        close(network.respond(shared, effects, inputs[1], inputs[0]), whole, rtol=1e-5, atol=1e-5)
    assert (effects[2] == 0).all() or network.config.indicator


def test_cells_without_states_share_what_a_perturbation_adds(network):
    if network.config.states:
        pytest.skip("states differ between cells")
    seen = []
    network.recover.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    x = torch.rand(50, 7)
    perturbed = torch.tensor([[0, -1], [1, 3]]).repeat(25, 1)
    with torch.no_grad():
        change = network(x, perturbed) - x
    assert seen == [2 * 7], "the network runs once for each perturbation"
    close(change[2:], change[:2].repeat(24, 1), rtol=1e-5, atol=1e-5)
    assert (change[0] - change[1]).abs().max() > 1e-4


def test_the_order_of_genes_of_a_pair_is_nothing(network):
    x, perturbed, states = cells(network)
    with torch.no_grad():
        close(network(x, perturbed.flip(1), states), network(x, perturbed, states), rtol=1e-5, atol=1e-5)


def test_tables_are_cut_in_training_only(network):
    before = network.perturbations.weight.detach().clone()
    assert (before.norm(dim=1) > 1).any()
    with torch.no_grad():
        network(*cells(network))
    assert torch.equal(network.perturbations.weight, before)
    network.train()(*cells(network))
    assert (network.perturbations.weight.norm(dim=1) <= 1 + 1e-5).all()


def test_every_weight_learns(network):
    network.train()(*cells(network)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
    assert network.perturbations.weight.grad.abs().sum() > 0


def test_a_single_perturbed_cell_can_be_trained_on(network):
    x, perturbed, states = picked(cells(network), [2, 0, 2])
    assert network.train()(x, perturbed, states).isfinite().all()


def test_fresh_weights_leave_the_global_state_alone():
    before = torch.random.get_rng_state()
    config = GearsConfig(4, 3, hidden=4, positions="none")
    one, same, other = (fresh_network(config, seed, Graph.empty()) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.gene_weight, same.gene_weight)
    assert not torch.equal(one.gene_weight, other.gene_weight)


def test_loss_by_hand():
    rng = np.random.default_rng(0)
    predicted, observed = torch.from_numpy(rng.normal(size=(2, 5, 4)))
    control = torch.from_numpy(rng.normal(size=4))
    codes = torch.tensor([2, 0, 2, 7, 0])
    counted = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 1, 1]], dtype=torch.bool)
    parts = []
    for code in (0, 2, 7):
        rows = codes == code
        columns = counted[rows][0]
        p, y, c = predicted[rows][:, columns], observed[rows][:, columns], control[columns]
        parts.append(((p - y) ** 4 + 0.1 * (torch.sign(y - c) - torch.sign(p - c)) ** 2).mean())
    assert gears_loss(predicted, observed, control, codes, counted).item() == pytest.approx(np.mean(parts))
    every = torch.ones_like(counted)
    assert gears_loss(predicted, observed, control, codes).item() == pytest.approx(
        gears_loss(predicted, observed, control, codes, every).item()
    )


def test_wrong_inputs(network):
    x, perturbed, states = cells(network)
    with pytest.raises(ValueError, match="states"):
        network(x, perturbed, None if states is not None else torch.zeros(6, 7, 3))
    with pytest.raises(ValueError, match="an edge to a node that is not among the 5"):
        fresh_network(network.config, 0, Graph(torch.tensor([[0], [5]]), torch.ones(1)), Graph.empty(), torch.zeros(5))
    for wrong in ({"entry": "x"}, {"positions": "x"}, {"positions": "states"}, {"entry": "mlp"}, {"hidden": 0}):
        with pytest.raises(ValueError, match=r"entry|positions|width"):
            GearsConfig(**({"n_genes": 3, "n_perturbations": 3} | wrong))
    with pytest.raises(scfm.CheckpointError, match="no network of GEARS"):
        read_gears({"x": torch.zeros(1)}, Graph.empty())
