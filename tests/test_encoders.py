"""The frozen encoders: offline ones by their promises, T5 and AutoencoderKL against transformers and diffusers."""

import subprocess
import sys

import pytest
import torch

from ecdit import UserError
from ecdit.data.encoders import load_autoencoder, load_text_encoder
from tests.tiny_encoders import CHANNELS, FACTOR, WIDTH, make_autoencoder, make_text_encoder

CPU = torch.device("cpu")
CAPTIONS = ["a red dog", "", "the picture of a man and a woman with a dog on the red and blue photo"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return make_text_encoder(root / "t5"), make_autoencoder(root / "vae")


def test_hash_is_the_same_in_every_process():
    code = (
        "import torch; from ecdit.data.encoders import load_text_encoder as load;"
        "e, m = load('hash', width=8, tokens=4, device=torch.device('cpu'))(['a Red, dog']);"
        "print(e[0, 2, :3].tolist(), m[0].tolist())"
    )
    out = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(2)]
    assert out[0].stdout == out[1].stdout != ""
    embedded, mask = load_text_encoder("hash", width=8, tokens=4, device=CPU)(["a red dog"])
    assert out[0].stdout.strip() == f"{embedded[0, 2, :3].tolist()} {mask[0].tolist()}"
    assert embedded[0, 2, :3].tolist() == pytest.approx(GOLDEN_HASH, abs=1e-5)


GOLDEN_HASH = [0.784181, 0.3933518, -0.2597322]


def test_hash_tells_words_and_their_order_and_marks_what_is_real():
    encode = load_text_encoder("hash", width=64, tokens=6, device=CPU)
    embedded, mask = encode(["red circle", "circle red", "", "one two three four five six seven"])
    assert mask.sum(1).tolist() == [3, 3, 1, 6]
    assert embedded[~mask].eq(0).all()
    assert not torch.allclose(embedded[0, 1], embedded[1, 2])  # the word is the same, its place is not
    assert embedded[0, 1].std().item() == pytest.approx(1.1, abs=0.25)


def test_pixels_come_back_exactly():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    pixels = load_autoencoder("pixels", device=CPU)
    latents = pixels.encode(images)
    assert latents.min() >= -1 and latents.max() <= 1
    assert torch.equal(pixels.decode(latents), images)


def test_t5_is_what_transformers_computes(folders):
    from transformers import AutoTokenizer, T5EncoderModel

    encode = load_text_encoder(str(folders[0]), width=WIDTH, tokens=8, device=CPU)
    embedded, mask = encode(CAPTIONS)
    assert embedded.shape == (3, 8, WIDTH) and mask.sum(1).tolist() == [4, 1, 8]
    tokens = AutoTokenizer.from_pretrained(folders[0])(CAPTIONS[0], return_tensors="pt")
    expected = T5EncoderModel.from_pretrained(folders[0]).eval()(**tokens).last_hidden_state[0]
    torch.testing.assert_close(embedded[0, :4], expected, rtol=1e-4, atol=1e-5)
    assert embedded[~mask].eq(0).all() and not embedded.requires_grad


def test_autoencoder_is_what_diffusers_computes(folders):
    from diffusers import AutoencoderKL

    loaded = load_autoencoder(str(folders[1]), device=CPU)
    assert (loaded.channels, loaded.factor) == (CHANNELS, FACTOR)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    latents = loaded.encode(images)
    model = AutoencoderKL.from_pretrained(folders[1]).eval()
    with torch.no_grad():
        mean = model.encode(images / 127.5 - 1).latent_dist.mean
        torch.testing.assert_close(latents, mean * 0.5)
        decoded = ((model.decode(mean).sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert (loaded.decode(latents).int() - decoded.int()).abs().max() <= 1


@pytest.mark.parametrize("load", [load_text_encoder, load_autoencoder])
def test_a_folder_that_is_missing_or_of_another_kind_is_named(load, folders, tmp_path):
    wrong = tmp_path / "empty"
    wrong.mkdir()
    key = "data.text_encoder" if load is load_text_encoder else "data.autoencoder"
    more = {"width": WIDTH, "tokens": 8} if load is load_text_encoder else {}
    for name in (str(tmp_path / "absent"), str(wrong)):
        with pytest.raises(UserError, match=key) as error:
            load(name, device=CPU, **more)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_a_text_encoder_of_another_width_names_the_key(folders):
    with pytest.raises(UserError, match=rf"model.text_width: 64 .*{WIDTH} wide"):
        load_text_encoder(str(folders[0]), width=64, tokens=8, device=CPU)
