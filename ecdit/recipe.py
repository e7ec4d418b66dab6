"""The schema of recipes: what a run is made of, every key with its default, its meaning and its rules.

A recipe is data. Reading it (`ecdit.recipe_io.load_recipe`) checks every rule that can be checked without opening
a data set or a device, so that a run that starts has no mistake of this kind left in it.
"""

from typing import Annotated, Literal

from pydantic import Field, PlainSerializer, PlainValidator, model_validator

from ecdit.recipe_data import DataRecipe
from ecdit.recipe_engine import EngineOptions, engine_fits
from ecdit.recipe_evaluation import EvaluationRecipe
from ecdit.recipe_model import ModelRecipe
from ecdit.recipe_rules import (
    compile_fits,
    divides,
    evaluations_have_checkpoints,
    fp8_fits,
    graph_fits,
    held_out_fits,
    layout_divides,
)
from ecdit.recipe_section import FOLDER_NAME, PositiveFloat, PositiveInt, Section, Share


def _ratio(value):
    """A share, or pairs of (step, share) whose steps begin with 0 and ascend."""
    pairs = value if isinstance(value, list) else [[0, value]]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError("a list holds pairs of a step and a share, such as [[0, 0.5], [700000, 0.0]]")
    steps, shares = zip(*pairs, strict=True) if pairs else ((), ())
    if not all(isinstance(share, int | float) and 0 <= share < 1 for share in shares):
        raise ValueError("a share is a number from 0 to below 1")
    if not all(isinstance(step, int) for step in steps) or not steps or steps[0] != 0:
        raise ValueError("the steps are whole numbers and begin with 0")
    if list(steps) != sorted(set(steps)):
        raise ValueError("the steps ascend")
    return value


def _as_it_is(value):
    return value


class TimeRecipe(Section):
    """Logit-normal density of the training time: t = sigmoid(u), u ~ N(mean, std)."""

    mean: float = Field(0.0, description="mu of the normal under the sigmoid.")
    std: PositiveFloat = Field(1.0, description="sigma of the normal under the sigmoid.")


class DiffusionRecipe(Section):
    """The rectified flow."""

    time: TimeRecipe = Field(TimeRecipe(), description="Density of the training time.")
    text_drop: Share = Field(0.1, description="Share of captions replaced by the empty one, for guidance.")


class MaskingRecipe(Section):
    """Masked training: only some tokens of an image enter the backbone, and the loss is over those."""

    ratio: Annotated[float | list[list[float]], PlainValidator(_ratio), PlainSerializer(_as_it_is)] = Field(
        0.5, description="Share of tokens left out; or [[0, 0.5], [700000, 0.0]]: a ratio from each step on."
    )
    mae: Annotated[float, Field(ge=0)] = Field(
        0.1, description="Weight of the reconstruction of masked tokens; used when model.decoder has layers."
    )

    @property
    def schedule(self) -> list[tuple[int, float]]:
        """The ratio as (from step, ratio) pairs."""
        return [tuple(pair) for pair in self.ratio] if isinstance(self.ratio, list) else [(0, self.ratio)]


class OptimizerRecipe(Section):
    """The update. rmsprop_momentum is AdaStar's form; torch_rmsprop is torch.optim.RMSprop with momentum 0.9; adamw has
    betas 0.9 and 0.999, and DeepSpeed's own kernels under its engine."""

    name: Literal["rmsprop_momentum", "torch_rmsprop", "adamw"] = Field("rmsprop_momentum", description="Which form.")
    lr: PositiveFloat = Field(1e-4, description="Learning rate after the warm-up.")
    warmup: Annotated[int, Field(ge=0)] = Field(20_000, description="Steps of linear warm-up.")
    schedule: Literal["constant", "cosine"] = Field("constant", description="After the warm-up.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Decay of matrices; never of biases and one-dimensional tensors."
    )
    clip: PositiveFloat = Field(1.0, description="Largest global gradient norm.")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(0.9999, description="Decay of the weights' average.")


class TrainRecipe(Section):
    """How long and how much at once."""

    steps: PositiveInt = Field(800_000, description="Optimizer steps of the run.")
    batch: PositiveInt = Field(4096, description="Images of a step, over all ranks.")
    micro_batch: PositiveInt = Field(8, description="Images of one forward and backward pass on a rank.")
    precision: Literal["bf16", "fp32", "fp64"] = Field(
        "bf16", description="Of the compute; master weights are fp32. fp64 is for drawing alone."
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Of weights, data order, noise, times, masks.")
    recompute: Literal["none", "moe", "block"] = Field(
        "none", description="What backward computes again instead of keeping: nothing, MoE layers, whole blocks."
    )
    graph: bool = Field(
        False, description="Replay the step as one CUDA graph; needs a GPU and static shapes (no megatron_topk)."
    )
    compile: bool = Field(
        False, description="Compile the blocks with torch.compile: a minute's start for faster steps on a GPU."
    )
    linears: Literal["torch", "transformer_engine"] = Field(
        "torch", description="Whose linears the blocks are made of; transformer_engine needs its extra and a GPU."
    )


class PrecisionRecipe(Section):
    """Products in FP8, by Transformer Engine on a GPU, from fp32 masters as under bf16."""

    fp8: Literal["none", "delayed", "current", "block"] = Field(
        "none",
        description="How tensors are scaled: by the steps before (delayed), by themselves (current), or each block of "
        "them (block). Shapes that the library has no product for stay in bf16, which is told.",
    )
    where: list[Literal["experts", "linears"]] = Field(
        ["experts", "linears"], min_length=1, description="Whose products: experts', and those of attention and FFNs."
    )


class ParallelRecipe(Section):
    """How the model is spread over ranks; what is left of them shares the batch."""

    tensor: PositiveInt = Field(1, description="Ranks that share every matrix by its heads or hidden features.")
    expert: PositiveInt = Field(1, description="Ranks that share the experts of a layer; may span tensor ranks.")
    expert_tensor: PositiveInt = Field(1, description="Ranks that share the matrices of one expert.")
    pipeline: PositiveInt = Field(1, description="Stages that share the layers.")
    sequence: bool = Field(False, description="Tensor ranks share activations between the split layers, by images.")
    dispatch_chunks: PositiveInt = Field(
        1, description="Parts in which tokens travel to their experts, each while another is computed."
    )
    dispatch_fp8: bool = Field(
        False,
        description="Tokens go to their experts as FP8, each with a scale of its own, whatever the layout; results and "
        "gradients go in the model's type.",
    )
    timeout_minutes: Annotated[PositiveFloat, Field(le=1e5)] = Field(
        10.0, description="Time-out of every process group."
    )


class KeepRecipe(Section):
    """Which checkpoints stay. Nothing is deleted before its successor is committed."""

    last: PositiveInt = Field(3, description="The newest ones.")
    every: Annotated[int, Field(ge=0)] = Field(0, description="And those of every so many steps; 0: none.")


class CheckpointRecipe(Section):
    """What is saved of a run, and when."""

    every: PositiveInt = Field(1000, description="Steps between checkpoints; the last step always has one.")
    keep: KeepRecipe = Field(KeepRecipe(), description="Which of them stay.")
    asynchronous: bool = Field(
        True, description="Write in the background, from a copy in host memory, while training goes on."
    )


class HeldOutRecipe(Section):
    """The loss on pictures that are not trained on, from the averaged weights: always the same pictures, noise and
    times, all tokens, no dropped captions, so that runs are compared without the noise of their batches."""

    path: str | None = Field(None, description="Folder or URL of their shards; null: none.")
    every: PositiveInt = Field(1000, description="Steps between evaluations; the last step has one too.")
    pictures: PositiveInt = Field(1024, description="The first so many, a multiple of train.micro_batch.")


class LogRecipe(Section):
    """What is told of a run while it runs."""

    every: PositiveInt = Field(10, description="Steps between lines of metrics.jsonl.")
    samples: bool = Field(False, description="Write the sample ids of every logged step.")
    collectives: Annotated[int, Field(ge=0)] = Field(
        0, description="Step whose time in each collective is measured, into collectives.json; 0: none."
    )
    tensorboard: bool = Field(True, description="Write TensorBoard files.")
    wandb: str | None = Field(None, description="Weights & Biases project; null: none.")
    grid_every: Annotated[int, Field(ge=0)] = Field(0, description="Steps between picture grids; 0: none.")
    held_out: HeldOutRecipe = Field(HeldOutRecipe(), description="Loss on pictures that are not trained on.")
    prompts: list[str] = Field(
        ["a red circle", "a blue square", "two green triangles", "a yellow star left of a purple ring"],
        min_length=1,
        description="The fixed prompts of the grids, and what `ecdit sample` draws when no prompt is given.",
    )


class SampleRecipe(Section):
    """Defaults of sampling."""

    steps: PositiveInt = Field(50, description="Steps of the solver.")
    solver: Literal["euler", "heun"] = Field("euler", description="Of the ODE.")
    guidance: Annotated[float, Field(ge=0)] = Field(5.0, description="Scale of classifier-free guidance.")
    shift: PositiveFloat = Field(1.0, description="Shift of the time grid towards noise (SD3's map).")
    batch: PositiveInt = Field(
        1, description="Pictures that a rank computes at once: always as many, so that they are always rounded alike."
    )


class HangRecipe(Section):
    """When a step counts as hung: all ranks' stacks are written, and the job ends to be started again."""

    times_median: PositiveFloat = Field(20.0, description="So many times the median of the steps before.")
    seconds: PositiveFloat = Field(600.0, description="But no sooner than this; the first step gets twice as long.")


class ClusterRecipe(Section):
    """The job on SLURM, from which `recipes/*.slurm` are rendered."""

    nodes: PositiveInt = Field(1, description="Nodes of the job.")
    min_nodes: PositiveInt | None = Field(
        None, description="The fewest that it may go on with when nodes are lost; null: as many as nodes."
    )
    gpus_per_node: Annotated[int, Field(ge=0)] = Field(8, description="GPUs of a node, a task each; 0: CPU alone.")
    tasks_per_node: PositiveInt | None = Field(None, description="Tasks of a node; null: one a GPU.")
    cpus_per_task: PositiveInt = Field(8, description="Cores of a task.")
    exclusive: bool = Field(True, description="Whole nodes, with all of their memory.")
    gpu: str = Field(
        "h100", description="What `ecdit plan` plans for: a100, h100, h200, b200, rtx4090, or a YAML file."
    )
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")] = Field(
        "1-00:00:00", description="Time limit of one attempt; the job requeues itself until the run is done."
    )
    partition: str | None = Field(None, description="SLURM partition; null: the cluster's default.")
    account: str | None = Field(None, description="Account that is charged; null: the user's default.")
    options: list[str] = Field([], description="Further options of sbatch, such as --qos=high.")
    setup: list[str] = Field(
        [". .venv/bin/activate"], description="Shell lines before the job's commands, such as those that load modules."
    )
    container: str | None = Field(None, description="Image that tasks run in (pyxis); null: none.")
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str] = Field(
        {}, description="Further environment variables of the tasks."
    )
    signal_seconds: PositiveInt = Field(
        300, description="How long before the time limit the job saves a checkpoint and requeues itself."
    )
    crashes: PositiveInt = Field(3, description="Crashes in a row without a new checkpoint that end the run.")
    back_off_seconds: Annotated[int, Field(ge=0)] = Field(
        30, description="Wait before the restart after a crash, twice as long after each further one."
    )
    preflight: bool = Field(True, description="Check every node before the first step, and leave out bad ones.")
    hang: HangRecipe = Field(HangRecipe(), description="When a step counts as hung.")

    @property
    def tasks(self) -> int:
        """Of a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @model_validator(mode="after")
    def _nodes_suffice(self):
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"@min_nodes: {self.min_nodes} is over nodes: {self.nodes}")
        return self


class Recipe(Section):
    """A run, whole."""

    run: str = Field(pattern=FOLDER_NAME, description="Name of the run; its folder is runs/NAME.")
    init_from: str | None = Field(
        None,
        description="Where the first weights come from: a run's folder, or what `ecdit export` wrote; null: the seed.",
    )
    model: ModelRecipe = Field(description="The network.")
    data: DataRecipe = Field(description="Images and captions.")
    diffusion: DiffusionRecipe = Field(DiffusionRecipe(), description="The flow.")
    masking: MaskingRecipe = Field(MaskingRecipe(), description="Masked training.")
    optimizer: OptimizerRecipe = Field(OptimizerRecipe(), description="The update.")
    train: TrainRecipe = Field(TrainRecipe(), description="Length and batch.")
    precision: PrecisionRecipe = Field(PrecisionRecipe(), description="Below bf16.")
    parallel: ParallelRecipe = Field(ParallelRecipe(), description="Layout.")
    engine: Literal["megatron", "deepspeed"] = Field("megatron", description="What drives data parallelism.")
    engine_options: EngineOptions = Field(EngineOptions(), description="How it does; for deepspeed alone.")
    checkpoint: CheckpointRecipe = Field(CheckpointRecipe(), description="Checkpoints.")
    log: LogRecipe = Field(LogRecipe(), description="Logging.")
    sample: SampleRecipe = Field(SampleRecipe(), description="Sampling.")
    evaluation: EvaluationRecipe = Field(EvaluationRecipe(), description="Evaluation while it trains.")
    cluster: ClusterRecipe = Field(ClusterRecipe(), description="The job on SLURM.")

    @model_validator(mode="after")
    def _batchdivides(self):
        divides(self.train.micro_batch, self.train.batch, "train.micro_batch", "train.batch")
        divides(self.data.canonical_nodes, self.train.batch, "data.canonical_nodes", "train.batch")
        return self

    @model_validator(mode="after")
    def _layout_divides(self):
        layout_divides(self)
        graph_fits(self)
        compile_fits(self)
        fp8_fits(self)
        engine_fits(self)
        evaluations_have_checkpoints(self)
        held_out_fits(self)
        return self

    @model_validator(mode="after")
    def _groups_fit(self):
        for _, ratio in self.masking.schedule:
            kept = int(self.model.tokens * (1 - ratio))
            if kept < 1:
                raise ValueError(f"@masking.ratio: {ratio:g} leaves no token of {self.model.tokens}")
            if self.model.grouped:
                self._groups_are_whole(kept, ratio)
        return self

    def _groups_are_whole(self, kept: int, ratio: float) -> None:
        group, micro = self.model.group_tokens, self.train.micro_batch
        if group % kept:
            raise ValueError(
                f"@model.group_tokens: {group} is no whole number of images: under masking.ratio {ratio:g} an "
                f"image has {kept} tokens; try a multiple of {kept}"
            )
        if micro * kept % group:
            raise ValueError(
                f"@train.micro_batch: {micro} images of {kept} tokens (masking.ratio {ratio:g}) do not fill "
                f"groups of model.group_tokens: {group}; try a multiple of {group // kept}"
            )

    @model_validator(mode="after")
    def _pixels_are_the_latent(self):
        if self.data.autoencoder == "pixels":
            for key, value, needed in (
                ("side", self.model.side, self.data.resolution),
                ("channels", self.model.channels, 3),
            ):
                if value != needed:
                    raise ValueError(
                        f"@model.{key}: {value} does not fit data.autoencoder: pixels, where the RGB picture of "
                        f"data.resolution {self.data.resolution} is the latent; it must be {needed}"
                    )
        return self

    @model_validator(mode="after")
    def _decoder_is_used(self):
        if self.model.decoder.layers and not any(ratio for _, ratio in self.masking.schedule):
            raise ValueError(
                f"@model.decoder.layers: {self.model.decoder.layers} decoder layers, but masking.ratio masks "
                "nothing; set it to 0, or mask"
            )
        return self
