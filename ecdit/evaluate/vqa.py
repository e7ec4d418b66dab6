"""Asks questions about pictures: a server that speaks OpenAI's chat completions, or a local model (transformers)."""

import base64
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ecdit.data.pretrained import is_local, loader
from ecdit.data.torchvision_guard import hide_broken_torchvision
from ecdit.errors import UserError
from ecdit.evaluate.suite import device, packages, whole

ASKED_AT_ONCE = 8
TIMEOUT, RETRIES = 120, 5  # seconds, and how often a busy or failing server is asked again
SECONDS_TO_REACH = 10
INSTRUCTION = "Answer with yes or no and nothing else."


class Vqa(Protocol):
    """name: for the record."""

    name: str

    def ask(self, pairs: list[tuple[Path, str]]) -> list[str]:
        """The answer to each (picture, question)."""


def open_vqa(name: str, model: str | None) -> Vqa:
    """A server where the name is an address, else a local folder or a hub name. Raises UserError."""
    if not name.startswith(("http://", "https://")):
        return LocalVqa(name)
    if model is None:
        raise UserError(f"--vqa: {name} is a server: needs --vqa-model, the name of the model that it shall ask")
    return Server(name, model)


def says_yes(answer: str) -> bool:
    """Whether an answer's first word is yes."""
    words = re.findall(r"[a-z]+", answer.lower())
    return words[:1] == ["yes"]


class LocalVqa:
    """A ViLT, a BLIP or the like, through transformers' pipeline."""

    def __init__(self, name: str):
        packages("dsg", "transformers")
        hide_broken_torchvision()
        from transformers import AutoModelForVisualQuestionAnswering, pipeline

        self.name = name
        load, local = loader("--vqa", name, "a model that answers questions about pictures"), is_local("--vqa", name)
        from_pretrained = AutoModelForVisualQuestionAnswering.from_pretrained
        model = whole("--vqa", name, load(from_pretrained, name, local_files_only=local, output_loading_info=True))
        parts = {"model": model, "tokenizer": name, "image_processor": name, "device": device()}
        self._pipeline = load(pipeline, "visual-question-answering", **parts)

    def ask(self, pairs: list[tuple[Path, str]]) -> list[str]:
        """The likeliest answer of each; a question that is too long for the model is cut off."""
        answers = []
        for path, question in pairs:
            with Image.open(path) as picture:
                found = self._pipeline(picture.convert("RGB"), question, top_k=1, truncation=True)
                answers.append(found[0]["answer"])
        return answers


class Server:
    """POST URL/chat/completions with the picture as a data URL; the key is the environment's OPENAI_API_KEY. Raises
    UserError where nobody is there, or the key is wrong."""

    def __init__(self, url: str, model: str):
        packages("dsg", "requests")
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        self.name, self._model, self._url = model, model, f"{url.rstrip('/')}/chat/completions"
        self._session, self._failed = requests.Session(), requests.RequestException
        again = Retry(RETRIES, backoff_factor=0.5, status_forcelist=[429, 500, 502, 503, 504], allowed_methods=None)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=again, pool_maxsize=ASKED_AT_ONCE))
        if key := os.environ.get("OPENAI_API_KEY"):
            self._session.headers["Authorization"] = f"Bearer {key}"
        models = f"{url.rstrip('/')}/models"  # which not every server has: any answer but a refusal will do
        try:
            answer = requests.get(models, headers=self._session.headers, timeout=SECONDS_TO_REACH)
        except self._failed as error:
            raise UserError(f"--vqa: {url} cannot be reached: {error}") from None
        if answer.status_code in (401, 403):
            raise UserError(f"--vqa: {url} answers {answer.status_code}; valid: the server's key in OPENAI_API_KEY")

    def ask(self, pairs: list[tuple[Path, str]]) -> list[str]:
        """Several at once. Raises UserError where the server cannot be reached, refuses, or answers something else."""
        with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
            return list(threads.map(lambda pair: self._ask(*pair), pairs))

    def _ask(self, path: Path, question: str) -> str:
        picture = base64.b64encode(path.read_bytes()).decode()
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": f"{question} {INSTRUCTION}"},
        ]
        body = {"model": self._model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        try:
            answer = self._session.post(self._url, json=body | {"max_tokens": 20}, timeout=TIMEOUT)
        except self._failed as error:
            raise UserError(f"--vqa: {self._url} cannot be asked: {error}") from None
        if not answer.ok:
            raise UserError(f"--vqa: {self._url} answers {answer.status_code}: {' '.join(answer.text.split())[:200]}")
        try:
            said = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            said = None
        if not isinstance(said, str):  # a model that is still thinking after so few words has said nothing
            raise UserError(f"--vqa: {self._url} answers no chat completion: {answer.text[:200]!r}")
        return said
