"""The section of a recipe that says what is drawn and scored of a run while it trains."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ecdit.recipe_section import PositiveInt, Section

SuiteName = Literal["samples", "shapes", "fid", "clip", "geneval", "dsg", "parti"]


class EvaluationRecipe(Section):
    """Samples and scores of a run while it trains, drawn from its checkpoints, beside the training."""

    every: Annotated[int, Field(ge=0)] = Field(
        0, description="Steps between evaluations, a multiple of checkpoint.every, and the last step; 0: none."
    )
    suites: list[SuiteName] = Field(
        ["samples"], min_length=1, description="What is evaluated: samples (of log.prompts) and suites of scores."
    )
    options: dict[str, str | int] = Field(
        {}, description="Options of `ecdit evaluate` by name, such as {n: 10, clip: FOLDER, prompts: FILE}."
    )
    keys: list[str] = Field(
        [], description="Keys that `ecdit evaluate` changes, such as [sample.steps=20, parallel.expert=8]."
    )
    where: Literal["background", "job"] = Field(
        "background",
        description="background: the first rank's node, at the lowest priority, without its GPUs; job: a job of its "
        "own on SLURM, or a process of its own where there is none.",
    )
    tasks: PositiveInt = Field(1, description="Ranks of the job, each with a GPU where cluster.gpus_per_node has any.")

    @model_validator(mode="after")
    def _a_job_has_tasks(self):
        if self.tasks > 1 and self.where != "job":
            raise ValueError(f"@tasks: {self.tasks} are for evaluation.where: job; the background has one")
        return self
