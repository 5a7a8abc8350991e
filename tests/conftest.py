"""Options every test file shares, and what makes a test the same in any order on any worker."""

import multiprocessing
import os
import random

import numpy as np
import pytest
import torch

# Long files with few tests. pytest-xdist would begin them last, and one worker would end alone.
LONGEST = (
    "test_resumed_runs.py",
    "test_launchers.py",
    "test_survival.py",
    "test_two_nodes.py",
    "test_numerics.py",
    "test_options.py",
    "test_train.py",
    "test_kernels.py",
    "test_export_timm.py",
    "test_launcher.py",
)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    gpu = pytest.mark.skip(reason="needs a CUDA device")
    slow = pytest.mark.skip(reason="takes minutes; run with --slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(gpu)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(slow)
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def seed_everything():
    """Draws without a seed of their own then do not depend on which tests ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup():
    seed_everything()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    seed_everything()


@pytest.fixture(autouse=True)
def environment_restored():
    """Programs run in this process settle variables; the next test must not inherit them."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before) - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({k: v for k, v in before.items() if k != "PYTEST_CURRENT_TEST"})


@pytest.fixture(autouse=True)
def no_process_left():
    """What a failed test leaves running would disturb the next, and be waited for at the end."""
    before = set(multiprocessing.active_children())
    yield
    for process in set(multiprocessing.active_children()) - before:
        process.kill()
        process.join()


@pytest.fixture
def same_process(monkeypatch):
    """Load an export through timm here: starting a process each time takes seconds."""
    import timm

    import l2vit  # noqa: F401
    from finetune import verification

    def logits(directory, samples):
        model = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
        cfg = timm.data.resolve_model_data_config(model)
        show = timm.data.create_transform(**cfg, is_training=False)
        with torch.inference_mode():
            return model(torch.stack([show(sample.picture()) for sample in samples]))

    monkeypatch.setattr(verification, "fresh_logits", logits)
