"""Latents and embeddings in shards: what the encoders compute, in training what on-the-fly encoding gives."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ecdit import UserError
from ecdit.assemble import start_topology
from ecdit.data.encoded import from_bits, read_encoded
from ecdit.data.encoders import load_autoencoder, load_text_encoder
from ecdit.data.inputs import Inputs, open_stream
from ecdit.data.prepare import Settings, prepare
from ecdit.data.shards import ShardFolder
from ecdit.data.stats import look
from ecdit.recipe_io import load_recipe
from launcher.plan.memory import encoders, encoders_used
from launcher.plan.spread import Place
from parallel import topology
from parallel.frozen import bytes_here, shard_frozen
from parallel.topology import Layout
from tests.pairs import as_folder
from tests.ranks import run_on_ranks
from tests.tiny_encoders import CHANNELS, FACTOR, WIDTH, make_autoencoder, make_clip, make_t5gemma, make_text_encoder

COUNT, RESOLUTION, TOKENS = 24, 32, 12
CPU = torch.device("cpu")


def picture(index):
    """A JPEG of the size that is asked for, which the shards keep as it is."""
    coarse = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((RESOLUTION,) * 2, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Encoders, a source, and its shards: plain, with everything encoded, and with a drawn sample."""
    root = tmp_path_factory.mktemp("encoded")
    text, pictures = make_text_encoder(root / "t5"), make_autoencoder(root / "vae")
    words = [f"a picture of the man {'with ' * (i % 4)}\n" for i in range(COUNT)]
    source = as_folder({str(i): (picture(i), words[i]) for i in range(COUNT)}, root / "in")
    base = {"source": str(source), "resolution": RESOLUTION, "min_side": 16, "part": 10}
    encoders = {"autoencoder": str(pictures), "text_encoder": str(text), "text_tokens": TOKENS, "pictures": False}
    prepare(Settings(**base), root / "plain", workers=1)
    prepare(Settings(**base, **encoders, latents="posterior"), root / "posterior", workers=2)
    prepare(Settings(**base, **encoders, latents="sample", seed=5), root / "sample", workers=1)
    return root


def settings(made, data, *more):
    return load_recipe(
        "recipes/quickstart.yaml",
        [
            f"data.streams=[{{path: {made / data}}}]", f"data.text_encoder={made / 't5'}",
            f"data.autoencoder={made / 'vae'}", f"data.resolution={RESOLUTION}", "model.side=4",
            f"model.channels={CHANNELS}", "model.patch=2", f"model.text_width={WIDTH}", "model.group_tokens=8",
            f"model.text_tokens={TOKENS}", "masking.ratio=0.0", "train.batch=8", "train.micro_batch=8",
            "data.workers=0", "diffusion.text_drop=0.3", *more,
        ],
    )  # fmt: skip


def inputs_of(recipe, step=3):
    """Keys, latents, text and mask of a step, as training makes them."""
    place = start_topology(recipe)
    try:
        stream = open_stream(recipe, 0, 1)
        inputs = Inputs(recipe, stream.encoded, place, torch.float32)
        batch = next(stream.batches(step))
        latents = inputs.latents(step, batch.samples, batch.positions)
        text, mask = inputs.text(step, batch.samples, batch.positions)
        return batch.samples.keys, latents, text, mask
    finally:
        topology.stop()


def test_shards_hold_what_the_encoders_compute(made):
    folder, plain = ShardFolder(str(made / "posterior")), ShardFolder(str(made / "plain"))
    assert len(folder) == COUNT and "image" not in folder.columns
    vae, t5 = load_autoencoder(str(made / "vae"), device=CPU), load_text_encoder(
        str(made / "t5"), width=WIDTH, tokens=TOKENS, device=CPU
    )  # fmt: skip
    for number in range(0, COUNT, 5):
        sample = folder.sample(number)
        assert sample["key"] == plain.sample(number)["key"]
        embedded, mask = t5(sample["captions"])
        assert sample["text_tokens"].tolist() == mask.sum(1).tolist() and len(set(sample["text_tokens"])) == 1
        torch.testing.assert_close(from_bits(sample["text"]).float(), embedded[mask], rtol=1e-2, atol=1e-2)
    assert vae.scale == read_encoded(str(made / "posterior")).pictures.scale == 0.5


@pytest.mark.parametrize("posterior", ["mode", "sample"])
def test_training_gets_what_it_would_have_encoded_itself(made, posterior):
    """To the tolerances of the storage, fp16 and bf16."""
    more = f"data.posterior={posterior}"
    stored, fresh = (inputs_of(settings(made, data, more)) for data in ("posterior", "plain"))
    assert stored[0] == fresh[0] and torch.equal(stored[3], fresh[3])
    assert (stored[1] - fresh[1]).abs().mean() < 0.002 * fresh[1].abs().mean()
    torch.testing.assert_close(stored[2], fresh[2], rtol=1e-2, atol=1e-2)
    assert 0 < (stored[3].sum(1) == 1).sum() < 8  # some captions are dropped: the end token alone is left


def test_posteriors_are_drawn_anew_in_every_step_and_alike_on_every_run(made):
    recipe = settings(made, "posterior", "data.posterior=sample", "data.shuffle=false", "train.batch=24")
    first, second = inputs_of(recipe, 0), inputs_of(recipe, 1)
    assert first[0] == second[0] and not torch.equal(first[1], second[1])
    assert torch.equal(first[1], inputs_of(recipe, 0)[1])


def test_drawn_samples_are_of_the_posterior_and_their_own(made):
    mean, drawn = (ShardFolder(str(made / data)) for data in ("posterior", "sample"))
    scores = []
    for number in range(COUNT):
        of, sample = mean.sample(number), drawn.sample(number)["latent"].astype(float)
        scores.append((sample - of["latent_mean"]) / np.exp(0.5 * of["latent_logvar"].astype(float)))
    scores = np.array(scores)
    assert abs(scores.mean()) < 0.1 and scores.std() == pytest.approx(1, abs=0.08)
    assert np.abs(np.corrcoef(scores.reshape(COUNT, -1)) - np.eye(COUNT)).max() < 0.6


def test_what_does_not_fit_the_recipe_is_named(made):
    pixels = ("data.autoencoder=pixels", "model.side=32", "model.channels=3", "model.group_tokens=256")
    larger = ("data.resolution=64", "model.side=8", "model.group_tokens=16")
    cases = {
        pixels: "data.autoencoder: pixels is not the one",
        larger: "data.resolution: 64 asks for latents of side 8: .* has 4",
        ("data.text_encoder=hash",): "data.text_encoder: hash is not the one",
        ("model.text_tokens=8",): "model.text_tokens: 8 is under the 12",
        ("model.text_width=16",): "model.text_width: 16 .* have 32",
        ("model.channels=3",): "model.channels: 3 .*have 4",
    }
    for changes, message in cases.items():
        with pytest.raises(UserError, match=message):
            inputs_of(settings(made, "posterior", *changes))
    with pytest.raises(UserError, match=r"data.posterior: sample needs"):
        inputs_of(settings(made, "sample", "data.posterior=sample"))
    recipe = settings(made, "posterior", f"data.streams=[{{path: {made / 'posterior'}}}, {{path: {made / 'plain'}}}]")
    with pytest.raises(UserError, match="mixed only where all hold the same"):
        inputs_of(recipe)


def test_the_plan_leaves_out_encoders_that_do_not_run(made):
    place = Place(Layout(), 4)
    assert encoders_used(settings(made, "plain")) == (True, True)
    assert encoders_used(settings(made, "posterior")) == (False, False)
    whole = encoders(settings(made, "plain"), place)
    assert whole == {"text encoder": 670e6 * 4, "autoencoder": 34e6 * 4}
    assert encoders(settings(made, "plain", "data.shard_encoders=true"), place)["text encoder"] == 670e6
    assert encoders(settings(made, "posterior"), place) == {}


def test_stats_tell_latents_moments_and_the_scale_that_would_make_them_one(made):
    found = look(str(made / "sample"), 1000, 0).as_dict()
    latents = np.stack([ShardFolder(str(made / "sample")).sample(i)["latent"] for i in range(COUNT)]).astype(float)
    assert found["pairs"] == COUNT and found["caption_tokens"]["most"] == 9
    assert found["latents"]["mean"] == pytest.approx(latents.mean((0, 2, 3)).tolist(), abs=1e-3)
    assert found["latents"]["deviation"] == pytest.approx(latents.std((0, 2, 3)).tolist(), rel=1e-3)
    assert found["latents"]["scale_for_unit_deviation"] == pytest.approx(1 / latents.std(), rel=1e-3)
    assert json.dumps(found)


@pytest.mark.parametrize("make", [make_clip, make_t5gemma])
def test_clip_and_t5gemma_are_what_transformers_computes(make, tmp_path):
    from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, T5GemmaEncoderModel

    folder = make(tmp_path / "encoder")
    encode = load_text_encoder(str(folder), width=WIDTH, tokens=8, device=CPU)
    embedded, mask = encode(["a man with a photo", "the"])
    tokens = AutoTokenizer.from_pretrained(folder)("a man with a photo", return_tensors="pt")
    kind = CLIPTextModel if make is make_clip else T5GemmaEncoderModel
    config = AutoConfig.from_pretrained(folder)
    config.is_encoder_decoder = False
    model = kind.from_pretrained(folder, config=config).eval()
    with torch.no_grad():
        expected = model(**tokens).last_hidden_state[0]
    assert mask.sum(1).tolist() == [6, 2]
    torch.testing.assert_close(embedded[0, :6], expected, rtol=1e-4, atol=1e-5)
    assert embedded[~mask].eq(0).all()


def test_a_text_encoder_with_too_few_places_is_named(tmp_path):
    with pytest.raises(UserError, match=r"model.text_tokens: 77 is more than the 16 places"):
        load_text_encoder(str(make_clip(tmp_path / "clip")), width=WIDTH, tokens=77, device=CPU)


def encode_on_rank(text: str, pictures: str, sharded: bool, tensor: int):
    place = topology.start(Layout(tensor=tensor), 1.0)
    encoder = load_text_encoder(text, width=WIDTH, tokens=TOKENS, device=CPU)
    whole = bytes_here(encoder.model)
    if sharded:
        shard_frozen(encoder.model, place)
    captions = ["a man", "the photo of a woman", "", "on"]
    out = place.shared(4, lambda rows: encoder(captions[rows]))
    again = place.shared(3, lambda rows: encoder(captions[rows]))  # three do not divide: every rank does all
    held = bytes_here(encoder.model)
    topology.stop()
    return [value.tolist() for value in (*out, *again)], held / whole


@pytest.mark.parametrize(("ranks", "tensor", "sharded"), [(2, 1, True), (4, 2, True), (2, 2, False)])
def test_encoders_spread_over_ranks_give_what_one_gives(made, ranks, tensor, sharded):
    alone = encode_on_rank(str(made / "t5"), "", False, 1)[0]
    for found, held in run_on_ranks(encode_on_rank, ranks, str(made / "t5"), "", sharded, tensor):
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-6)
        assert held == 1 if not sharded else held < 1.2 / ranks


def test_factor_is_the_autoencoders(made):
    assert read_encoded(str(made / "posterior")).pictures.factor == FACTOR
