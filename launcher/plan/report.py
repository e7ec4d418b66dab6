"""A plan for the terminal."""

from rich.console import Group
from rich.table import Table

from ecdit.errors import UserError
from ecdit.recipe import Recipe
from launcher.plan import Plan, plan
from launcher.plan.gpus import Gpu
from launcher.plan.search import nearest

GIB = 2**30
MORE_NODES = (2, 4, 8, 16, 32, 64, 128)


def as_tables(made: Plan) -> Group:
    """Memory, traffic and time."""
    return Group(headline(made), _memory(made), _traffic(made), _time(made))


def headline(made: Plan) -> str:
    """The answer in a sentence."""
    fits = "fits" if made.margin >= 0 else "does not fit"
    return (
        f"{made.recipe.run}: {made.parameters / 1e9:.2f} B parameters on {made.nodes} x {made.ranks // made.nodes} "
        f"{made.gpu}, {layout(made)}\n"
        f"{fits}: {made.worst.peak / GIB:.1f} GiB of {made.capacity / GIB:.1f} on a GPU, "
        f"{abs(made.margin) / GIB:.1f} GiB ({abs(made.margin) / made.capacity:.0%}) "
        f"{'to spare' if made.margin >= 0 else 'too much'}; a step takes {made.step_seconds:.3g} s, "
        f"{made.images_per_s:.0f} images/s, MFU {made.mfu:.0%}, {made.days:.3g} days in all"
    )


def layout(made: Plan) -> str:
    """What is not as in the plainest layout."""
    plain = ("timeout_minutes", "micro_batch", "recompute")
    parts = [f"{key} {value}" for key, value in made.layout.items() if key not in plain and value not in (1, False)]
    parts = [part.removesuffix(" True") for part in parts]
    return ", ".join([*parts, f"micro-batch {made.layout['micro_batch']}", f"recompute {made.layout['recompute']}"])


def _memory(made: Plan) -> Table:
    stages = [f"stage {memory.stage}" for memory in made.memory] if len(made.memory) > 1 else ["GiB"]
    table = Table("memory of a rank", *stages)
    for part in made.worst.parts:
        table.add_row(part, *(f"{memory.parts.get(part, 0) / GIB:.2f}" for memory in made.memory))
    table.add_section()
    table.add_row("peak", *(f"{memory.peak / GIB:.2f}" for memory in made.memory))
    for place in ("host", "disk"):
        parts = getattr(made.worst, place)
        if parts:
            table.add_section()
        for part, size in (parts | {"in all": sum(parts.values())} if parts else {}).items():
            table.add_row(f"{place}: {part}", f"{size / GIB:.2f}")
    return table


def _traffic(made: Plan) -> Table:
    table = Table("collective", "axis", "ranks", "calls", "NVLink GB", "network GB", "ms", "of which exposed")
    for one in made.traffic:
        sizes = [f"{size / 1e9:.2f}" for size in (one.nvlink, one.network)]
        times = [f"{1e3 * one.seconds:.1f}", f"{1e3 * one.exposed:.1f}"]
        table.add_row(one.kind, one.axis, str(one.ranks), f"{one.calls:.0f}", *sizes, *times)
    return table


def _time(made: Plan) -> Table:
    table = Table("time of a step", "ms", "share")
    for part, seconds in made.seconds.items():
        if seconds:
            table.add_row(part, f"{1e3 * seconds:.1f}", f"{seconds / made.step_seconds:.0%}")
    return table


def ranking(plans: list[Plan], top: int) -> Table:
    """The best layouts."""
    table = Table("layout", "GiB", "to spare", "step s", "images/s", "MFU", "days")
    for made in plans[:top]:
        numbers = (made.worst.peak / GIB, made.margin / GIB)
        rates = [f"{made.step_seconds:.3g}", f"{made.images_per_s:.0f}", f"{made.mfu:.0%}", f"{made.days:.3g}"]
        table.add_row(layout(made), *(f"{number:.1f}" for number in numbers), *rates)
    return table


def refuse(made: Plan, recipe: Recipe, gpu: Gpu) -> UserError:
    """Names the largest part, how much is too much, and what would have to give. recipe: as it was typed."""
    worst, gpus = made.worst, made.ranks // made.nodes
    largest = f"{worst.largest}, {worst.parts[worst.largest] / GIB:.1f} GiB"
    enough = (nodes for nodes in MORE_NODES if nodes > made.nodes and _fits(recipe, nodes, gpus, gpu))
    options = [f"{nodes} nodes" for nodes in [next(enough, None)] if nodes]
    for change in ("moe", "block"):
        train = made.recipe.train.model_copy(update={"recompute": change})
        if _fits(made.recipe.model_copy(update={"train": train}), made.nodes, gpus, gpu):
            options.append(f"train.recompute={change}")
            break
    hint = f"It fits with {' or '.join(options)}" if options else "`ecdit plan --search` finds layouts that fit"
    return UserError(
        f"{made.recipe.run} does not fit on {made.nodes} x {gpus} {made.gpu}: {worst.peak / GIB:.1f} GiB of "
        f"{made.capacity / GIB:.1f}, {-made.margin / GIB:.1f} GiB too much. The largest part is {largest}. {hint}."
    )


def _fits(recipe: Recipe, nodes: int, gpus_per_node: int, gpu: Gpu) -> bool:
    """With the recipe's own layout, or the nearest one that divides."""
    try:
        return plan(nearest(recipe, nodes * gpus_per_node, gpus_per_node), nodes, gpus_per_node, gpu).margin >= 0
    except UserError:
        return False
