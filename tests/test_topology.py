"""Process groups: who is in which, one time-out for all, ranks that do not divide."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from parallel import topology
from parallel.topology import Layout, LayoutError
from tests.ranks import run_on_ranks

NAMES = ("tp", "dp", "ep", "expt_tp", "expt_dp", "pp")
PAIRS, STRIDE_2, EVEN_ODD, HALVES = "01 23 45 67", "02 13 46 57", "0246 1357", "04 15 26 37"
ALONE = "0 1 2 3 4 5 6 7"

# the tables of parallel/topology.py
TABLES = {
    Layout(tensor=2, expert=4): (PAIRS, EVEN_ODD, "0123 4567", ALONE, HALVES, ALONE),
    Layout(tensor=2, expert=2, pipeline=2): (PAIRS, STRIDE_2, PAIRS, ALONE, STRIDE_2, HALVES),
    Layout(tensor=2, expert=2, expert_tensor=2): (PAIRS, EVEN_ODD, STRIDE_2, PAIRS, HALVES, ALONE),
}


def groups_of(layouts):
    """For each layout, the ranks of this rank's groups; and the time-outs of all groups of the last."""
    found = []
    for layout in layouts:
        place = topology.start(layout, 7)
        found.append({name: dist.get_process_group_ranks(getattr(place.groups, name)) for name in NAMES})
        groups = [g for g in vars(place.groups).values() if isinstance(g, dist.ProcessGroup)]
        timeouts = {g._get_backend(torch.device("cpu")).options._timeout for g in groups}
        topology.parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return found, timeouts


def test_groups_are_those_of_the_table():
    layouts = list(TABLES)
    answers = run_on_ranks(groups_of, 8, layouts)
    for i, layout in enumerate(layouts):
        for name, table in zip(NAMES, TABLES[layout], strict=True):
            for rank, (found, _) in enumerate(answers):
                expected = next(group for group in table.split() if str(rank) in group)
                assert "".join(map(str, found[i][name])) == expected, (layout, name, rank)
    assert all(timeouts == {timedelta(minutes=7)} for _, timeouts in answers)


@pytest.mark.parametrize(
    ("layout", "ranks", "message"),
    [
        (Layout(tensor=2, pipeline=2), 6, "parallel.tensor x parallel.pipeline: 4 does not divide the 6 ranks"),
        (Layout(expert=8), 4, "parallel.expert x parallel.expert_tensor x parallel.pipeline: 8 does not divide"),
    ],
)
def test_ranks_that_do_not_divide_are_refused(layout, ranks, message):
    with pytest.raises(LayoutError, match=message):
        layout.check(ranks)
