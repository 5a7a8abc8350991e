"""The history of a run: events survive kills and damage."""

from l2vit.train import history


def test_an_event_after_a_line_cut_short_is_kept(tmp_path):
    history.append(tmp_path, "start", step=0, ranks=2)
    with (tmp_path / history.NAME).open("a") as stream:
        stream.write('{"event": "stop')
    history.append(tmp_path, "finished", step=8)
    found = history.read(tmp_path)
    assert [(event["event"], event["step"]) for event in found] == [("start", 0), ("finished", 8)]
    assert found[0]["ranks"] == 2 and found[0]["time"] <= found[1]["time"]


def test_what_is_no_event_is_left_out(tmp_path):
    assert history.read(tmp_path) == []
    lines = ['{"event": 3, "time": 1}', "[]", '{"event": "x"}', '{"event": "y", "time": 2}', "\xff"]
    (tmp_path / history.NAME).write_text("\n".join(lines), "latin-1")
    assert history.read(tmp_path) == [{"event": "y", "time": 2}]


def test_a_directory_that_cannot_be_written_stops_nothing(tmp_path):
    history.append(tmp_path / "gone", "finished", step=1)
    assert not (tmp_path / "gone").exists()
