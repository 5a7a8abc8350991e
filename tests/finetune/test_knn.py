"""The nearest neighbours' answers against scikit-learn's, through the program."""

import json

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from finetune import evaluate, knn
from finetune.datasets import read_picture, transform
from l2vit.train.weights import read_pretrained


def test_votes_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(4)
    bank = torch.nn.functional.normalize(torch.randn(300, 16, generator=generator))
    queries = torch.nn.functional.normalize(torch.randn(70, 16, generator=generator))
    labels = torch.randint(0, 5, (300,), generator=generator)

    def weight(distance):
        # On the unit sphere a squared distance is 2 - 2 · similarity.
        return np.exp((1 - distance**2 / 2) / 0.07)

    theirs = KNeighborsClassifier(20, algorithm="brute", weights=weight)
    theirs.fit(bank.double().numpy(), labels.numpy())
    found = knn.votes(knn.Bank(bank, labels), queries, classes=5, neighbours=20)
    shares = (found / found.sum(1, keepdim=True)).numpy()
    assert np.allclose(shares, theirs.predict_proba(queries.double().numpy()), atol=1e-4)


def test_the_program_scores_shards_by_folders_and_says_how(exported, folders, shards, tmp_path):
    """By a plain loop over PIL pictures: each picture's nearest neighbour is itself."""
    out = tmp_path / "knn.json"
    arguments = ["--model", str(exported), "--data", str(shards), "--knn", str(folders)]
    arguments += ["--threads", "0", "--json", str(out)]
    assert evaluate.main([*arguments, "--neighbours", "1"]) == 0
    found = json.loads(out.read_text())
    assert found["knn_right"] == found["count"] == 120
    assert evaluate.main([*arguments, "--neighbours", "5"]) == 0
    source = read_pretrained(exported)
    model, show = source.build(), transform(source.preprocessing)
    paths = sorted(folders.glob("*/*.jpg"))
    with torch.inference_mode():
        pictures = torch.stack([show(read_picture(path)) for path in paths])
        maps = model.forward_head(model.forward_features(pictures), pre_logits=True).double()
    maps = (maps / maps.norm(dim=1, keepdim=True)).numpy()
    classes = np.array([path.parent.name for path in paths])
    right = 0
    for vector, name in zip(maps, classes, strict=True):
        similarity = maps @ vector
        best = np.argsort(-similarity)[:5]
        weights = {c: np.exp(similarity[best] / 0.07)[classes[best] == c].sum() for c in classes}
        right += max(weights, key=weights.get) == name
    assert json.loads(out.read_text())["knn_right"] == right


def test_classes_without_neighbours_are_named(exported, folders, tmp_path, capfd):
    (tmp_path / "n00000001").mkdir()
    first = next(folders.glob("*/*.jpg"))
    (tmp_path / "n00000001" / "a.jpg").write_bytes(first.read_bytes())
    arguments = ["--model", str(exported), "--data", str(tmp_path), "--knn", str(folders)]
    assert evaluate.main(arguments) == 1
    assert "has no pictures of n00000001" in capfd.readouterr().err
    assert evaluate.main([*arguments, "--label-set", "real"]) == 2
