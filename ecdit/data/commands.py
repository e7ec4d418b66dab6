"""The commands of data sets. Each imports what it runs, so that the others start quickly."""

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ecdit.errors import UserError
from ecdit.terminal import Json, console, join_job

SHAPES_COUNT = 20_000


def register(app: typer.Typer) -> None:
    """Adds them to the `ecdit` command."""
    app.command()(prepare)
    data = typer.Typer(no_args_is_help=True, help="Look at data sets.")
    data.command("stats")(stats)
    app.add_typer(data, name="data")


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="shapes; or WebDataset tars, a folder of images with captions, .jsonl, .parquet, MDS shards: a path "
            "or URL, with * and {000..123}."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the MDS shards.")],
    resolution: Annotated[int | None, typer.Option(min=8, help="Side of the pictures: 256; shapes have 32.")] = None,
    crop: Annotated[str, typer.Option(help="The square that is kept: centre or random.")] = "centre",
    min_side: Annotated[int | None, typer.Option(min=1, help="Leave smaller pictures out; the resolution.")] = None,
    max_aspect: Annotated[
        float | None, typer.Option(min=1, help="Leave out longer ones: long over short side.")
    ] = None,
    max_megapixels: Annotated[float, typer.Option(min=0.01, help="Leave out larger ones, undecoded.")] = 64.0,
    clean: Annotated[
        bool, typer.Option("--clean", help="Resolve HTML's entities and tidy blanks in captions.")
    ] = False,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of a caption is a caption of its own.")] = False,
    image_column: Annotated[str, typer.Option(help="Field of the picture, where fields have names.")] = "image",
    caption_column: Annotated[str, typer.Option(help="Field of the caption or captions.")] = "caption",
    autoencoder: Annotated[str | None, typer.Option(help="Encode pictures: an AutoencoderKL's folder or name.")] = None,
    latents: Annotated[str, typer.Option(help="posterior (mean and log-variance) or sample.")] = "posterior",
    text_encoder: Annotated[str | None, typer.Option(help="Encode captions: a T5, T5Gemma or CLIP encoder.")] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens at which encoded captions are cut.")] = 120,
    pictures: Annotated[
        bool | None, typer.Option("--pictures/--no-pictures", help="Keep JPEG files; unless latents are made.")
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="MiB of a shard at most.")] = 64,
    compression: Annotated[str | None, typer.Option(help="zstd, or zstd:LEVEL; none if not given.")] = None,
    part: Annotated[
        int, typer.Option(min=1, help="Pairs that a process takes at a time; tars are taken whole.")
    ] = 4096,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes of a rank; one a core.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help=f"Pictures of shapes to make: {SHAPES_COUNT}.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of shapes, of random crops, of latents that are drawn.")] = 0,
) -> None:
    """Turn image-text pairs into MDS shards, or make the embedded data set of coloured shapes; resumes when killed.

    Under torchrun or srun all ranks share the work.
    """
    from ecdit.data.prepare import Settings, prepare_shapes
    from ecdit.data.prepare import prepare as run_prepare
    from ecdit.data.sources import Columns
    from parallel.crew import Crew

    join_job()
    if source == "shapes":
        if resolution not in (None, 32):
            raise UserError(f"--resolution: {resolution}: shapes are drawn with 32 pixels a side")
        with closing(Crew()) as crew:
            cores = workers or os.cpu_count() or 1
            prepare_shapes(out, count=count or SHAPES_COUNT, seed=seed, workers=cores, crew=crew)
        return
    if count is not None:
        raise UserError(f"--count: {count}: only shapes are made in a number of your choice")
    for option, value, valid in (
        ("--crop", crop, ("centre", "random")),
        ("--latents", latents, ("posterior", "sample")),
    ):
        if value not in valid:
            raise UserError(f"{option}: {value!r} is not known; valid: {', '.join(valid)}")
    if compression is not None and not _is_zstd(compression):
        raise UserError(f"--compression: {compression!r} is not known; valid: zstd, zstd:1 ... zstd:22")
    for option, name, needless in (("--autoencoder", autoencoder, "pixels"), ("--text-encoder", text_encoder, "hash")):
        if name == needless:
            raise UserError(f"{option}: {needless} costs next to nothing in training; it is not for shards")
    resolution = resolution or 256
    settings = Settings(
        source=source if "://" in source else os.path.abspath(Path(source).expanduser()),
        resolution=resolution,
        crop=crop,
        min_side=resolution if min_side is None else min_side,
        max_aspect=max_aspect,
        max_megapixels=max_megapixels,
        clean=clean,
        columns=Columns(image_column, caption_column, lines),
        seed=seed,
        part=part,
        shard_mib=shard_size,
        compression=compression,
        latents=latents if autoencoder else None,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        text_tokens=text_tokens if text_encoder else None,
        pictures=pictures if pictures is not None else autoencoder is None,
    )
    if not (settings.pictures or settings.latents):
        raise UserError("--no-pictures: without --autoencoder nothing would be left of the pictures")
    with closing(Crew()) as crew:
        run_prepare(settings, out, workers=workers or max(1, (os.cpu_count() or 1) // crew.local_ranks), crew=crew)


def _is_zstd(compression: str) -> bool:
    kind, _, level = compression.partition(":")
    return kind == "zstd" and (not level or (level.isdigit() and 1 <= int(level) <= 22))


def stats(
    source: Annotated[str, typer.Argument(metavar="DIR", help="Folder or URL of MDS shards.")],
    sample: Annotated[int, typer.Option(min=1, help="Samples to look at, drawn at random.")] = 10_000,
    sheet: Annotated[Path | None, typer.Option(help="Contact sheet; DIR/contact-sheet.png, where DIR is here.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples that are drawn.")] = 0,
    as_json: Json = False,
) -> None:
    """Tell what shards hold: pairs, captions' lengths, latents' mean and deviation; and draw a sheet of 64 pairs."""
    from ecdit.data.stats import as_table, contact_sheet, look

    with console.status("Reading"):
        found = look(source, sample, seed)
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        Console(width=max(Console().width, 100)).print(as_table(found))
    if found.shown:
        file = sheet or Path(source if "://" not in source else ".") / "contact-sheet.png"
        contact_sheet(found.shown).save(file)
        console.print(f"{len(found.shown)} pairs on {file}", markup=False)
