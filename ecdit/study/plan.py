"""What a study compares: a folder of recipes, one a variant, and `study.yaml`, which says what each is for."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from ecdit.errors import UserError
from ecdit.recipe import Recipe
from ecdit.recipe_io import load_recipe
from ecdit.recipe_section import FOLDER_NAME, PositiveInt, Section

PLAN = "study.yaml"


class Ablation(Section):
    """One choice of the default variant, and other variants that choose otherwise."""

    question: str = Field(description="What is asked, as the page says it.")
    default: str = Field(description="The variant with the paper's choice.")
    variants: list[str] = Field(min_length=1, description="Those with other choices.")


class StudyPlan(Section):
    """`study.yaml`. Variants are the names of recipes beside it, without .yaml."""

    name: str = Field(pattern=FOLDER_NAME, description="The runs' folder is runs/NAME.")
    reference: str = Field(description="The dense model, whose last loss the others are to reach.")
    equal_compute: str = Field(description="A dense model of as many operations as the sparse ones.")
    token_choice: str = Field(description="The token-choice model, of as many experts as the first expert-choice one.")
    expert_choice: list[str] = Field(min_length=1, description="Expert-choice models, by their experts, ascending.")
    ablations: list[Ablation] = Field([], description="Further comparisons, run with --ablations.")
    seeds: PositiveInt = Field(1, description="Runs of each variant, with train.seed 0, 1, ...")
    pictures: PositiveInt = Field(100, description="Pictures of each task of the shapes suite.")

    @property
    def main(self) -> list[str]:
        """The variants of the main comparison, in the order in which they are shown."""
        return list(dict.fromkeys([self.reference, self.equal_compute, self.token_choice, *self.expert_choice]))

    @property
    def others(self) -> list[str]:
        """Those of the ablations alone."""
        named = [name for ablation in self.ablations for name in (ablation.default, *ablation.variants)]
        return [name for name in dict.fromkeys(named) if name not in self.main]


@dataclass(frozen=True)
class StudyRun:
    """One run. file: its recipe; overrides: what makes it this run; recipe: both together."""

    variant: str
    seed: int
    file: Path
    overrides: tuple[str, ...]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.recipe.run


class Study:
    """A plan with its recipes, all of them read. Raises UserError for what is wrong with any of them."""

    def __init__(
        self,
        folder: Path,
        overrides: Sequence[str] = (),
        *,
        seeds: Sequence[int] | None = None,
        only: Sequence[str] = (),
        ablations: bool = False,
        runs: Path = Path("runs"),
    ):
        """only: these variants alone are run; what is compared stays. seeds: of the runs; None: the plan's."""
        self.source, self.overrides = folder, tuple(overrides)
        self.plan = read_plan(folder / PLAN)
        self.folder = runs / self.plan.name
        known = [*self.plan.main, *self.plan.others]
        for name in only:
            if name not in known:
                raise UserError(f"--only: {name!r} is no variant of {folder / PLAN}{_near(name, known)}")
        self.seeds = list(range(self.plan.seeds)) if seeds is None else sorted(set(seeds))
        wanted = list(only) or (known if ablations else self.plan.main)
        # a seed after the other: what is there when time is up is a comparison
        self.runs = [self._run(name, seed) for seed in self.seeds for name in wanted]
        self._compare_alike()

    def run_of(self, variant: str, seed: int) -> StudyRun:
        """Also of what is not to be run now."""
        found = [run for run in self.runs if (run.variant, run.seed) == (variant, seed)]
        return found[0] if found else self._run(variant, seed)

    def _run(self, variant: str, seed: int) -> StudyRun:
        file = self.source / f"{variant}.yaml"
        name = f"{Path(variant).name}-seed-{seed}"
        overrides = (*self.overrides, f"run={name}", f"train.seed={seed}")
        return StudyRun(variant, seed, file, overrides, load_recipe(file, overrides))

    def _compare_alike(self) -> None:
        """Variants are compared at the same step, on the same held-out pictures."""
        first = self.runs[0]
        for run in self.runs:
            for key, ours, theirs in (
                ("train.steps", first.recipe.train.steps, run.recipe.train.steps),
                ("train.batch", first.recipe.train.batch, run.recipe.train.batch),
                ("log.held_out", first.recipe.log.held_out, run.recipe.log.held_out),
                ("diffusion.time", first.recipe.diffusion.time, run.recipe.diffusion.time),
            ):
                if ours != theirs:
                    raise UserError(
                        f"{run.file}: {key}: {theirs}, where {first.file} has {ours}: the variants of a study are "
                        "compared on the same terms"
                    )
            if run.recipe.log.held_out.path is None:
                raise UserError(f"{run.file}: log.held_out.path: null, but variants are compared by this loss")
            if run.recipe.optimizer.schedule != "constant":
                raise UserError(
                    f"{run.file}: optimizer.schedule: {run.recipe.optimizer.schedule}; with constant, a study of fewer "
                    "steps is the beginning of a longer one"
                )


def read_plan(file: Path) -> StudyPlan:
    """Raises UserError for a file that is no plan, naming the key, or a variant that has no recipe."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        plan = StudyPlan.model_validate(values)
    except OSError as error:
        raise UserError(f"{file}: cannot read this plan of a study: {error.strerror}; valid: recipes/study") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{file}: {key}: {first['msg']}; valid keys: {', '.join(StudyPlan.model_fields)}") from None
    for name in (*plan.main, *plan.others):
        if not (file.parent / f"{name}.yaml").exists():
            there = [path.stem for path in sorted(file.parent.glob("*.yaml")) if path.name != PLAN]
            raise UserError(f"{file}: {name!r}: there is no {name}.yaml beside it{_near(name, there)}")
    return plan


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; valid: {', '.join(known)}"
