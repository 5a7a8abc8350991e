"""Host files and the flags that choose among their nodes."""

import pytest

from l2vit.errors import ConfigError
from l2vit.launch import command, hosts

TEXT = """
# the racks
node-0 slots=4   # the first one keeps the store

node-1 slots=4
node-2 slots=2
"""


@pytest.fixture
def nodes(tmp_path):
    (tmp_path / "hostfile").write_text(TEXT)
    return hosts.read(tmp_path / "hostfile")


def test_every_node_with_its_slots(nodes):
    assert [(n.host, len(n.slots), n.devices) for n in nodes] == [
        ("node-0", 4, ""),
        ("node-1", 4, ""),
        ("node-2", 2, ""),
    ]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"count": 2}, [("node-0", ""), ("node-1", "")]),
        ({"include": "node-1@node-0:0,2"}, [("node-0", "0,2"), ("node-1", "")]),
        ({"exclude": "node-0@node-2:1"}, [("node-1", ""), ("node-2", "0")]),
        ({"exclude": "node-0", "count": 1}, [("node-1", "")]),
    ],
)
def test_a_part_of_them(nodes, flags, expected):
    assert [(n.host, n.devices) for n in hosts.select(nodes, **flags)] == expected


@pytest.mark.parametrize("flag", ["include", "exclude"])
@pytest.mark.parametrize("text", ["node-0", "node-1:1@node-2", "node-0:0,3@node-1:2"])
def test_the_same_part_as_deepspeed_takes(nodes, flag, text, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    pool = {node.host: len(node.slots) for node in nodes}
    texts = {"include": "", "exclude": ""} | {flag: text}
    theirs = parse_inclusion_exclusion(pool, texts["include"], texts["exclude"])
    ours = {n.host: list(n.slots) for n in hosts.select(nodes, **{flag: text})}
    assert ours == theirs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"include": "node-7"}, "--include: 'node-7' is not in the host file"),
        ({"exclude": "node-2:5"}, "--exclude: node-2 has no slot 5"),
        ({"include": "node-1", "exclude": "node-0"}, "cannot be given together"),
        ({"exclude": "node-0@node-1@node-2"}, "leaves no node"),
        ({"count": 4}, "--num_nodes: 4 of 3 nodes"),
    ],
)
def test_flags_that_cannot_be(nodes, flags, message):
    with pytest.raises(ConfigError) as error:
        hosts.select(nodes, **flags)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-0 4", ":1: 'node-0 4' is not 'HOST slots=N'"),
        ("node-0 slots=0", "is not 'HOST slots=N'"),
        ("-oProxyCommand=x slots=1", "is not 'HOST slots=N'"),
        ("a slots=1\na slots=1", ":2: host a is listed twice"),
        ("# nobody", "lists no host"),
    ],
)
def test_a_file_that_is_wrong_names_its_line(tmp_path, text, message):
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(ConfigError) as error:
        hosts.read(tmp_path / "hostfile")
    assert message in str(error.value)


def test_times_on_the_command_line():
    found = [command.seconds(text, "--x") for text in ("90", "1.5s", "30m", "24h", "2d")]
    assert found == [90, 1.5, 1800, 86400, 172800]
