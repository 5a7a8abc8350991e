"""The shards as webdataset, timm and DALI see them: every sample, with its label."""

import io

import numpy as np
import pytest
from PIL import Image
from shard_contents import samples


@pytest.fixture(scope="module")
def shards(tmp_path_factory, release):
    from data_prep.__main__ import main

    out = tmp_path_factory.mktemp("readers") / "out"
    words = ["build", "--dataset", "imagenet22k", "--source", str(release), "--out", str(out)]
    assert main([*words, "--workers", "1", "--shard-samples", "25"]) == 0
    return out


def test_webdataset(shards):
    import webdataset

    urls = sorted(str(path) for path in shards.glob("*.tar"))
    found = [
        (sample["__key__"], sample["jpg"], int(sample["cls"]))
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    ]
    assert found == samples(shards)


def test_timm(shards):
    from timm.data import create_dataset

    dataset = create_dataset(
        "wds/", root=str(shards), split="train", is_training=False, batch_size=1
    )
    assert len(dataset) == 60
    found = [(np.asarray(image).tobytes(), target) for image, target in dataset]
    expected = [
        (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes(), label)
        for _, data, label in samples(shards)
    ]
    assert found == expected


def test_dali(shards):
    from nvidia.dali import fn, pipeline_def, types

    tars = sorted(str(path) for path in shards.glob("*.tar"))
    indexes = [path.replace(".tar", ".idx") for path in tars]

    @pipeline_def(batch_size=20, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline():
        image, label = fn.readers.webdataset(
            paths=tars,
            index_paths=indexes,
            ext=["jpg", "cls"],
            missing_component_behavior="error",
            dtypes=[types.UINT8, types.UINT8],
        )
        return image, label

    built = pipeline()
    built.build()
    found = []
    for _ in range(3):
        images, labels = built.run()
        for place in range(20):
            label = np.asarray(labels.at(place)).tobytes()
            found.append((np.asarray(images.at(place)).tobytes(), int(label)))
    assert found == [(data, label) for _, data, label in samples(shards)]
