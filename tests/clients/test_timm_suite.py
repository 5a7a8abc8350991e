"""timm's own tests of models, from its source package, on our models."""

import subprocess
import sys
import tarfile

import pytest
import timm

import l2vit

# What timm's tests/test_models.py asks of a model. Scripting and symbolic tracing are left out:
# torch has deprecated torch.jit.script, and torch.fx cannot trace padding that depends on sizes;
# torch.export, which came after both, is tested in tests/models/test_l2vit_export.py.
ASKED = "not torchscript and not _fx"
SMALL = ("l2vit_mini", "flatten_swin_mini", "inline_swin_mini")
ONE = "import sys, l2vit, pytest; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def timms_tests(tmp_path_factory):
    """timm's source package of the installed version, unpacked; skips where it cannot be had."""
    place = tmp_path_factory.mktemp("timm")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run(
        [*command, "-d", str(place), f"timm=={timm.__version__}"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"timm's source package cannot be fetched: {done.stderr.strip()[-200:]}")
    with tarfile.open(next(place.glob("*.tar.gz"))) as archive:
        archive.extractall(place, filter="data")
    return next(place.glob("timm-*/tests"))


def run_suite(tests, names):
    arguments = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "test_models.py"]
    arguments += ["-k", f"({' or '.join(names)}) and {ASKED}"]
    return subprocess.run(
        [sys.executable, "-c", ONE, *arguments], cwd=tests, capture_output=True, text=True
    )


@pytest.mark.ci
def test_timms_tests_pass_on_small_models(timms_tests):
    done = run_suite(timms_tests, SMALL)
    assert done.returncode == 0, done.stdout[-3000:]
    # Forward, backward, features, configuration, at least, of each.
    passed = int(done.stdout.rpartition(" passed")[0].split()[-1])
    assert passed >= 4 * len(SMALL), done.stdout[-1000:]


@pytest.mark.slow
def test_timms_tests_pass_on_every_model(timms_tests):
    done = run_suite(timms_tests, timm.list_models(module="l2vit"))
    assert done.returncode == 0, done.stdout[-5000:]


def test_our_models_are_found_as_a_module():
    names = timm.list_models(module="l2vit")
    assert {"l2vit_tiny", "l2vit_base", "flatten_swin_t", "inline_cswin_b"} & set(names)
    assert l2vit.__version__ and len(names) == len(set(names))
    for name in names:
        assert timm.model_entrypoint(name).__module__.startswith("l2vit.")
    ours = [n for n in timm.list_models() if timm.model_entrypoint(n).__module__[:6] == "l2vit."]
    assert sorted(names) == sorted(ours)
