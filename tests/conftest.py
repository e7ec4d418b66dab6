"""Options of the test run, the order in which it takes the files, and Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported, whoever does that

LONG = ("test_slurm", "test_resume", "test_train", "test_layouts_cli", "test_docs")  # minutes each, so they go first


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a test of both runs: on a GPU with `-m gpu`, else on the CPU."""
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("no GPU" if request.param == "cuda" else "these run on the GPU, with -m gpu")
    return request.param


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
