"""Tests pruning of graph attentions, and the tasks of nodes and of graphs."""

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import xprune
from xprune.core.plan import Plan
from xprune.modules.calls import Given
from xprune.modules.copies import shared_copy
from xprune.testing import check_adapter, check_criterion, check_selection, random_plan

pytest.importorskip("torch_geometric")
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv

from tests.support.graph_models import CLASSES, NETS, Classifier, Gps, Net, batch, built, graph, graphs, inputs


@pytest.mark.parametrize("name", NETS)
def test_pruned_equals_gated_and_costs_are_exact(name):
    kind, options = NETS[name]
    model, example = built(Net, kind, **options), inputs(name)
    sites = check_adapter(model, example, seeds=range(2))
    assert {site.name: site.size for site in sites} == {"conv1": 4, "conv2": 2, "conv3": 4}
    costs = xprune.measure_costs(model, sites, example)
    for seed in range(2):  # joined heads that feed joined heads: what they cost is a product
        plan = random_plan(sites, seed)
        pruned = xprune.apply(model, plan, example)
        assert xprune.count_params(pruned) == costs.params.total(plan.counts)
        assert xprune.count_macs(pruned, example) == pytest.approx(costs.macs.total(plan.counts), abs=0.51)


def test_every_adapter_of_pyg_is_exercised():
    names = {f"{site.adapter}" for kind, o in NETS.values() for site in xprune.find_sites(built(Net, kind), inputs(""))}
    assert names == {name for name in xprune.ADAPTERS if name.startswith("pyg")}


def test_the_mean_goes_on_dividing_by_the_dense_number_also_when_pruned_again():
    model, example = built(Net), inputs("")
    (site,) = (site for site in xprune.find_sites(model, example) if site.name == "conv3")
    once = xprune.apply(model, Plan((site,), ((0, 2, 3),)), example)
    assert once.conv3.heads == 3 and once.conv3.dense_heads == 4
    (again,) = (site for site in xprune.find_sites(once, example) if site.name == "conv3")
    twice = xprune.apply(once, Plan((again,), ((1, 2),)), example)
    at_once = xprune.apply(model, Plan((site,), ((2, 3),)), example)
    torch.testing.assert_close(twice(*example), at_once(*example))
    torch.testing.assert_close(copy.deepcopy(twice)(*example), twice(*example))


@pytest.mark.parametrize("kind", [TransformerConv, GATv2Conv])
def test_heads_reach_their_consumers_through_norms_and_pooling(kind):
    data = batch()
    sites = check_adapter(built(Classifier, kind), (data.x, data.edge_index, data.batch), seeds=range(2))
    assert [(site.name, site.kind, site.consumers) for site in sites] == [
        ("conv", "head", ("mlp.0",)),
        ("mlp", "neuron", ("mlp.2",)),
    ]


def test_gps_neurons_and_averaged_heads():
    data = batch()
    example = data.x, data.edge_index, data.batch
    sites = check_adapter(built(Gps, concat=False), example, seeds=range(2))
    assert {"gps.conv", "gps.mlp"} <= {site.name for site in sites}


class Residual(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.lin, self.conv, self.out = nn.Linear(5, 12), GATConv(12, 3, heads=4), nn.Linear(12, CLASSES)
        self.norm = nn.LayerNorm(12) if norm else None

    def forward(self, x, edge_index):
        x = self.lin(x)
        return self.out(self.norm(self.conv(x, edge_index)) if self.norm else x + self.conv(x, edge_index))


@pytest.mark.parametrize("norm", [False, True])
def test_heads_that_cannot_go_are_left_alone_with_a_reason(norm):
    with pytest.raises(xprune.ModelError, match=r"no sites .*: conv: with half of its units .* pruned forward fails"):
        xprune.find_sites(built(Residual, norm), inputs(""))


def test_heads_that_reach_the_output_are_left_alone():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = GATConv(5, 3, heads=4)

        def forward(self, x, edge_index):
            return self.conv(x, edge_index)

    with pytest.raises(xprune.ModelError, match=r"no sites .*: conv: its output reaches the output of the model"):
        xprune.find_sites(built(Bare), inputs(""))


def test_pygs_linear_is_seen_by_the_graph():
    from torch_geometric.nn import Linear

    model = built(lambda: nn.Sequential(nn.Sequential(Linear(5, 6), nn.ReLU(), Linear(6, 4)), Linear(4, 3)))
    (site,) = check_adapter(model, graph().x, seeds=range(1))
    pruned = xprune.apply(model, Plan((site,), ((1, 4),)), graph().x)
    assert (pruned[0][0].out_channels, pruned[0][2].in_channels) == (2, 2)


def test_each_graph_has_its_own_row():
    """A graph of a batch is gated as it is alone: nodes, pooled graphs, and dense attention rows alike."""
    for model in (built(Classifier), built(Gps, concat=False)):
        task, data = xprune.GraphClassification(), batch()
        (example, _), parts = task.unpack(data), [task.unpack(Batch.from_data_list([g]))[0] for g in graphs()[:3]]
        sites = xprune.find_sites(model, example)
        rows = [torch.rand(3, site.size) for site in sites]
        with xprune.Gates(sites, rows, rows=task.rows).attached(model):
            together = task.forward(model, example)
        for index, alone in enumerate(parts):
            with xprune.Gates(sites, [row[index] for row in rows]).attached(model):
                torch.testing.assert_close(together[index], task.forward(model, alone)[0], atol=1e-5, rtol=1e-4)


def gated_in_pieces(model, task, sites, parts, rows):
    """Outputs of graphs (units' gates of each graph in `rows`), one graph at a time."""
    found = []
    for index, part in enumerate(parts):
        with xprune.Gates(sites, [row[index] for row in rows]).attached(model), torch.no_grad():
            found.append(task.forward(model, task.unpack(Batch.from_data_list([part]))[0])[0])
    return torch.stack(found)


def batches_of_other_sizes():
    """Three batches of graphs: other numbers of graphs, and other numbers of nodes in them."""
    return [graphs()[:3], [graph(5, 1, 0), graph(9, 2, 1), graph(1, 3, 2)], graphs()[3:5]]


def test_batches_in_turn_through_the_same_gates_have_their_own_rows():
    """What the task says of one batch is not left over from the one before, in whatever order they come."""
    model, task = built(Classifier), xprune.GraphClassification()
    sites = xprune.find_sites(model, task.unpack(batch())[0])
    gates, parts = xprune.Gates(sites, rows=task.rows), batches_of_other_sizes()
    values = [[torch.rand(len(part), site.size) for site in sites] for part in parts]
    expected = [gated_in_pieces(model, task, sites, *pair) for pair in zip(parts, values, strict=True)]
    with gates.attached(model), torch.no_grad():
        for index in (0, 1, 0, 2, 1):
            gates.values = values[index]
            together = task.forward(model, task.unpack(Batch.from_data_list(parts[index]))[0])
            torch.testing.assert_close(together, expected[index], atol=1e-5, rtol=1e-4)


def test_threads_share_a_task_and_nothing_else():
    """Each thread is in the middle of its own batch while the others are in the middle of theirs."""
    task, parts = xprune.GraphClassification(), batches_of_other_sizes()
    models = [built(Classifier) for _ in parts]
    sites = xprune.find_sites(models[0], task.unpack(batch())[0])
    values = [[torch.rand(len(part), site.size) for site in sites] for part in parts]
    expected = [gated_in_pieces(*each) for each in zip(models, [task] * 3, [sites] * 3, parts, values, strict=True)]
    meet = threading.Barrier(len(parts), timeout=60)

    def all_have_begun(*_):
        meet.wait()

    def run(index):
        models[index].register_forward_pre_hook(all_have_begun)
        inputs = task.unpack(Batch.from_data_list(parts[index]))[0]
        with xprune.Gates(sites, values[index], rows=task.rows).attached(models[index]), torch.no_grad():
            return [task.forward(models[index], inputs) for _ in range(3)]

    with ThreadPoolExecutor(len(parts)) as pool:
        for index, outputs in enumerate(pool.map(run, range(len(parts)))):
            for each in outputs:
                torch.testing.assert_close(each, expected[index], atol=1e-5, rtol=1e-4)


def test_rows_that_are_neither_nodes_nor_graphs_are_refused():
    task, given = xprune.GraphClassification(), Given((None, None, torch.tensor([0, 0, 1])), {})
    site = xprune.Site("conv", "head", 2, 3, ("mlp.0",))
    assert task.rows(site, torch.zeros(3, 6), 2, given).tolist() == [0, 0, 1]
    assert task.rows(site, torch.zeros(2, 6), 2, given) is None
    with pytest.raises(xprune.GateError, match=r"4 rows of mlp\.0's input are neither the 3 nodes nor the 2 graphs"):
        task.rows(site, torch.zeros(4, 6), 2, given)


def test_the_graph_of_each_node_may_be_a_keyword_argument():
    task, site = xprune.GraphClassification(), xprune.Site("conv", "head", 2, 3, ("mlp.0",))
    given = Given((None, None), {"batch": torch.tensor([0, 0, 1])})
    assert task.rows(site, torch.zeros(3, 6), 2, given).tolist() == [0, 0, 1]
    with pytest.raises(xprune.GateError, match="called without `batch`"):
        task.rows(site, torch.zeros(3, 6), 2, Given((None, None), {}))


QUICK = {"xpruner": "xpruner,steps=6", "captum:IntegratedGradients": "captum:IntegratedGradients,n_steps=4"}
CASES = {
    "nodes": (lambda: built(Net), lambda: [graph()], xprune.NodeClassification()),
    "graphs": (lambda: built(Classifier), lambda: DataLoader(graphs(), 4), xprune.GraphClassification()),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("criterion", [QUICK.get(name, name) for name in xprune.CRITERIA])
def test_criteria(criterion, case):
    model, loader, task = CASES[case][0](), CASES[case][1](), CASES[case][2]
    check_criterion(criterion, model, loader, task=task)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("selection", ["global", "uniform", xprune.LearnedThresholds(weights="frozen", steps=5)])
def test_selections(selection, case):
    model, loader, task = CASES[case][0](), CASES[case][1](), CASES[case][2]
    sites = xprune.find_sites(model, task.example(task.unpack(next(iter(loader)))[0]))
    scores = xprune.score(model, sites, loader, "taylor", task=task)
    for budget in (xprune.Budget(macs=0.7), xprune.Budget(params=0.7)):
        check_selection(selection, model, scores, loader, budget, task=task)


@pytest.mark.parametrize("case", CASES)
def test_the_whole_way(case, tmp_path):
    model, loader, task = CASES[case][0](), CASES[case][1](), CASES[case][2]
    held_out = [(graph(), ~graph().train_mask)] if case == "nodes" else DataLoader(graphs(), 3)
    tune = xprune.Finetune(epochs=2, distill=0.5)
    result = xprune.Pruner(model, "taylor", xprune.Budget(macs=0.7), finetune=tune, task=task).run(loader, held_out)
    assert result.metrics["pruned"].macs <= 0.7 * result.metrics["dense"].macs + 1
    result.save(tmp_path / "pruned")
    again = xprune.load(tmp_path / "pruned", model_fn=CASES[case][0])
    example = task.example(task.unpack(next(iter(loader)))[0])
    torch.testing.assert_close(again(*example), shared_copy(result.model)(*example))


def test_one_class_is_drawn_for_a_graph():
    task, data = xprune.NodeClassification(), graph()
    example, targets = task.unpack(data)
    outputs = built(Net)(*example)
    own, classes = task.classes(outputs, targets)
    assert own.shape == (1,) and classes == CLASSES
    logs = outputs.log_softmax(-1)[data.train_mask]
    slow = [-logs[i, 1] if y == 1 else -torch.log1p(-logs[i, 1].exp()) for i, y in enumerate(data.y[data.train_mask])]
    found = task.one_vs_rest(outputs, targets, torch.tensor([1]))
    torch.testing.assert_close(found, torch.stack(slow).mean(), rtol=1e-4, atol=1e-5)
    right = (outputs.argmax(1) == data.y)[data.train_mask].float().mean()
    assert task.metric(outputs, targets).tolist() == [pytest.approx(float(right))]
    only = data.clone()
    only.y = torch.zeros_like(only.y)
    for _ in range(5):
        targets = task.unpack(only)[1]
        own = task.classes(outputs, targets)[0]
        assert own.tolist() == [0] and task.other(targets, own, CLASSES).item() != 0


def test_batches_that_do_not_fit_are_refused():
    data = graph()
    with pytest.raises(xprune.DataError, match="which nodes count"):
        xprune.NodeClassification(mask="no_mask").unpack(data)
    with pytest.raises(xprune.DataError, match=r"without the tensor pos.*fields="):
        xprune.NodeClassification(fields=("x", "pos")).unpack(data)
    with pytest.raises(xprune.DataError, match="no point of the batch"):
        xprune.evaluate(built(Net), [(data, torch.zeros(12, dtype=torch.bool))], task=xprune.NodeClassification())
    with pytest.raises(xprune.DataError, match="lacks 'batch'"):
        xprune.GraphClassification(fields=("x", "edge_index"))


def test_message_passing_is_counted():
    data, model = graph(), built(Net)
    twice = torch.cat([data.edge_index, data.edge_index], dim=1)
    counts = [xprune.count_macs(model, (data.x, edges)) * len(data.x) for edges in (data.edge_index, twice)]
    loops = int((data.edge_index[0] == data.edge_index[1]).sum())
    features = 4 * 3 + 2 * 4 + 4 * 3 + (4 + 2 + 4)  # messages, and the softmax's sums
    assert counts[1] - counts[0] == pytest.approx((data.num_edges - loops) * features, abs=len(data.x))


def test_the_package_works_without_pyg(new_process):
    code = "import sys; sys.modules['torch_geometric'] = None; import xprune; print(len(xprune.ADAPTERS))"
    assert int(new_process(code, check=True).stdout) == len(xprune.ADAPTERS)


warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
