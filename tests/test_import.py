"""``import l2vit`` registers the models with timm, whichever is imported first."""

import pickle
import subprocess
import sys

import pytest
import timm

MAKE = "timm.create_model('l2vit_tiny', num_classes=3)"


@pytest.mark.parametrize(
    "code",
    [
        f"import l2vit, timm; {MAKE}",
        f"import timm, l2vit; {MAKE}; import importlib; importlib.reload(l2vit); {MAKE}",
        # looked for but not imported, as launchers and other libraries do
        "import l2vit, importlib.util; assert importlib.util.find_spec('timm')\n"
        "from timm.models import create_model; create_model('l2vit_tiny', num_classes=3)\n"
        "assert not [f for f in __import__('sys').meta_path if 'l2vit' in type(f).__module__]",
        f"import l2vit.models.registry, timm; {MAKE}",
        "import sys, l2vit; assert 'torch' not in sys.modules; l2vit.models.registry",
    ],
    ids=["before", "after and reloaded", "looked for", "inside", "attribute"],
)
def test_models_are_registered(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_pickled_model_is_read_by_a_process_that_imported_nothing(tmp_path):
    import l2vit  # noqa: F401

    model = timm.create_model("l2vit_tiny", num_classes=3, depths=(1, 1, 1, 1))
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    code = f"""
import pickle
model = pickle.load(open({str(tmp_path / "model")!r}, "rb"))
import timm
assert timm.is_model("l2vit_tiny") and model.num_classes == 3
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_attributes_are_errors():
    import l2vit

    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = l2vit.no_such_thing
