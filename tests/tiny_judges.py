"""What judges pictures, tiny and random: a CLIP, a ViLT and an Inception, saved as downloaded ones are; and a server
that speaks OpenAI's chat completions."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ecdit.data.torchvision_guard import hide_broken_torchvision

hide_broken_torchvision()

SIDE, FEATURES = 32, 4


def make_clip(folder: Path) -> Path:
    """A CLIP whose tokens are single characters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    folder.mkdir()
    characters = list(bytes_to_unicode().values())
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)
    pictures = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config=small | ends | {"vocab_size": len(words), "max_position_embeddings": 24},
        vision_config=small | {"image_size": SIDE, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def make_vilt(folder: Path) -> Path:
    """A ViLT that answers yes or no."""
    from transformers import BertTokenizer, ViltConfig, ViltForQuestionAnswering, ViltImageProcessor, ViltProcessor

    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz?"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    pictures = ViltImageProcessor(size={"shortest_edge": SIDE}, size_divisor=8)
    ViltProcessor(pictures, BertTokenizer(str(folder / "vocab.txt"), model_max_length=40)).save_pretrained(folder)
    torch.manual_seed(0)
    config = ViltConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIDE, patch_size=8, num_labels=2, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1},
        initializer_range=0.5,
    )  # fmt: skip
    ViltForQuestionAnswering(config).save_pretrained(folder)
    return folder


class TinyInception(nn.Module):
    """Features of a picture's quarters: (B, 3, R, R) uint8 -> (B, 4); called as the real one is."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(12, FEATURES)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        """Means of the quarters' colours, mixed."""
        assert return_features
        pooled = nn.functional.adaptive_avg_pool2d(x.float() / 255, 2)
        return self.mix(pooled.flatten(1))


def make_inception(file: Path) -> Path:
    """A TorchScript file."""
    torch.manual_seed(0)
    torch.jit.script(TinyInception()).save(file)
    return file


@contextmanager
def chat_server(answer: str | None = "Yes.", failures: int = 0) -> Iterator[tuple[str, list[dict]]]:
    """Its address, and what it was asked. A question about blue is answered with no. The first `failures` times it is
    busy."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions" or len(asked) < failures:
                asked.append({})
                self.send_response(503 if self.path == "/v1/chat/completions" else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            parts = {part["type"]: part for part in body["messages"][0]["content"]}
            header, data = parts["image_url"]["image_url"]["url"].split(",")
            picture = Image.open(io.BytesIO(base64.b64decode(data)))
            question = parts["text"]["text"]
            asked.append({
                "size": picture.size, "question": question, "model": body["model"], "header": header,
                "key": self.headers.get("Authorization"),
            })  # fmt: skip
            said = "No" if "blue" in question else answer
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
