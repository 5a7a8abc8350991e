"""Small scenes for every test of this folder."""

import pytest

from finetune import sample_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Eight scenes in COCO's and ADE20K's layouts."""
    root = tmp_path_factory.mktemp("scenes")
    assert sample_scenes.main(["--out", str(root), "--images", "8"]) == 0
    return root
