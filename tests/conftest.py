"""Options of the test run, and the order in which it takes the files."""

LONG = ("test_slurm", "test_resume", "test_train", "test_layouts_cli", "test_docs")  # minutes each, so they go first


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
