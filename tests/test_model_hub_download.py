"""Hub ids with the real ``huggingface_hub`` client against a hub on localhost: resume, revisions, gates, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import REPO, FakeHub, serving
from test_model_loader import save

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 10 << 20
"""What the client writes at once: a broken connection costs it less than that."""
GET = """
import sys
from jitgraph.errors import JitgraphError
from jitgraph.model.hub import download
try:
    print(download(sys.argv[1], sys.argv[2] or None, weights=sys.argv[3] == "weights"))
except JitgraphError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""
LOAD = """
import sys, socket
if sys.argv[2] == "no sockets":
    class Refused(socket.socket):
        def __init__(self, *a, **k): raise AssertionError("a socket was opened")
    socket.socket = Refused
from jitgraph.errors import JitgraphError
from jitgraph.model.loader import load_model
try:
    loaded = load_model(sys.argv[1], device="cpu")
    print(loaded.name, loaded.folder, float(loaded.weights.embedding.double().sum()))
except JitgraphError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of the same shapes, in two large files each and more."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    save(first, shard="12MB", vocab_size=90_000)
    save(second, shard="12MB", vocab_size=90_000, rope_theta=5000.0)
    return first, second


@pytest.fixture
def hub(folders: tuple[Path, Path]) -> Iterator[FakeHub]:
    with serving() as hub:
        hub.commit(folders[0])
        yield hub


class Client:
    """Processes of a user with one cache."""

    def __init__(self, home: Path, hub: FakeHub) -> None:
        self.home, self._hub = home, hub

    def run(self, code: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own = {"HF_HOME": str(self.home), "HF_ENDPOINT": self._hub.url, "PYTHONPATH": str(ROOT)}
        quick = {"HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5"}
        return subprocess.run(
            [sys.executable, "-c", code, *words],
            env={**kept, **own, **quick, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def get(self, repo: str = REPO, revision: str = "", what: str = "weights", **environment: str) -> Path:
        """The snapshot of a download that succeeds."""
        done = self.run(GET, repo, revision, what, **environment)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip().splitlines()[-1])

    def refused(self, code: str, *words: str, **environment: str) -> str:
        """The one sentence of a call that fails."""
        done = self.run(code, *words, **environment)
        assert done.returncode == 2, done.stdout + done.stderr
        said = done.stderr.strip().splitlines()
        assert "Traceback" not in done.stderr
        return said[-1]


@pytest.fixture
def client(tmp_path: Path, hub: FakeHub) -> Client:
    return Client(tmp_path / "home", hub)


def assert_whole(snapshot: Path, folder: Path) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    assert len(weights) > 1
    for path in weights:
        assert (snapshot / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_download_is_what_the_hub_has(hub: FakeHub, client: Client, folders: tuple[Path, Path]) -> None:
    """In HF_HOME; the small files alone where no weights are wanted; nothing twice."""
    small = client.get(what="small")
    assert (small / "config.json").exists() and not list(small.glob("*.safetensors"))
    assert hub.downloads(".safetensors") == []
    snapshot = client.get()
    assert snapshot == small and client.home in snapshot.parents
    assert_whole(snapshot, folders[0])
    count = len(hub.downloads(".safetensors"))
    client.get()
    assert len(hub.downloads(".safetensors")) == count and count == len(list(folders[0].glob("*.safetensors")))


def test_a_broken_connection_is_resumed(hub: FakeHub, client: Client, folders: tuple[Path, Path]) -> None:
    """Within one call: what has come is not asked for again."""
    hub.break_after, hub.breaks = CHUNK + 1000, 1
    assert_whole(client.get(), folders[0])
    assert f"bytes={CHUNK}-" in hub.downloads(".safetensors")


def test_a_download_that_failed_is_none_and_is_completed(
    hub: FakeHub, client: Client, folders: tuple[Path, Path]
) -> None:
    """A hub that never gets through with one file: one sentence, nothing that looks whole, offline refuses it; the next
    call fetches that file, and the whole ones not again."""
    broken = sorted(path.name for path in folders[0].glob("*.safetensors"))[1]
    hub.break_after, hub.breaks, hub.broken_file = CHUNK + 1000, 10**6, broken
    said = client.refused(GET, REPO, "", "weights")
    assert f"downloading {REPO} failed" in said and "try again, files that are whole are kept" in said
    assert f"bytes={CHUNK}-" in hub.downloads(broken), "it was taken up, several times"
    assert broken not in [path.name for path in client.home.rglob("snapshots/*/*")]
    said = client.refused(GET, REPO, "", "weights", HF_HUB_OFFLINE="1")
    assert "not as a whole" in said and "HF_HUB_OFFLINE" in said
    hub.breaks, begun = 0, len(hub.requests)
    assert_whole(client.get(), folders[0])
    fetched = [path.rpartition("/")[2] for method, path, _ in hub.requests[begun:] if method == "GET"]
    assert broken in fetched and [name for name in fetched if name.endswith(".safetensors")] == [broken]


def test_offline_opens_no_socket(hub: FakeHub, client: Client) -> None:
    online = client.run(LOAD, REPO, "")
    assert online.returncode == 0, online.stderr
    before = len(hub.requests)
    offline = client.run(LOAD, REPO, "no sockets", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == online.stdout and len(hub.requests) == before
    said = client.refused(GET, "owner/other", "", "small", HF_HUB_OFFLINE="1")
    assert "'owner/other' is not a local folder" in said and "HF_HUB_OFFLINE" in said


def test_revisions_are_pinned(hub: FakeHub, client: Client, folders: tuple[Path, Path]) -> None:
    """A branch, a tag and a commit name what they name; a branch that moves is followed, a commit stays."""
    old = hub.names["main"]
    hub.names["v1"] = old
    new = hub.commit(folders[1], "main")
    assert old != new
    assert_whole(client.get(revision="v1"), folders[0])
    assert client.get(revision=old).name == old
    assert client.get().name == client.get(revision="main").name == new
    assert client.get(revision=old, HF_HUB_OFFLINE="1").name == old
    done = client.run(LOAD, f"{REPO}@v1", "")
    assert done.returncode == 0 and done.stdout.startswith(f"{REPO}@v1 ") and old in done.stdout
    said = client.refused(GET, REPO, "v2", "small")
    assert said == f"the hub repository {REPO} has no revision 'v2': check its name"


def test_configuration_and_weights_are_of_one_commit(
    hub: FakeHub, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch moves between the two downloads; the weights that are asked for are those of the first commit."""
    from jitgraph.model import hub as module
    from jitgraph.model.loader import find_model

    old, asked = hub.names["main"], []

    def stand_in(repo: str, revision: str | None = None, **_: object) -> str:
        asked.append(revision)
        commit = hub.find(revision or "main")
        assert commit is not None
        place = tmp_path / commit
        place.mkdir(exist_ok=True)
        for name, data in hub.commits[commit].items():
            (place / name).write_bytes(data)
        hub.commit(folders[1], "main")
        return str(place)

    monkeypatch.setattr(module, "snapshot_download", stand_in)
    source = find_model(REPO)
    assert asked == [None, old] and source.folder is not None and source.folder.name == old


def test_a_gated_model(hub: FakeHub, client: Client, folders: tuple[Path, Path]) -> None:
    """One sentence without a token and with a wrong one, nothing is left that looks like a model; HF_TOKEN opens."""
    hub.gated = True
    expected = f"the hub repository {REPO} is gated: accept its terms at https://huggingface.co/{REPO} and set HF_TOKEN"
    assert client.refused(GET, REPO, "", "small") == expected
    assert client.refused(GET, REPO, "", "weights", HF_TOKEN="wrong") == expected
    assert not list(client.home.rglob("snapshots/*/*"))
    assert_whole(client.get(HF_TOKEN="right"), folders[0])
    assert hub.tokens == {"wrong", "right"}


def test_what_is_not_there(hub: FakeHub, client: Client) -> None:
    said = client.refused(GET, "owner/other", "", "weights")
    assert "'owner/other' is neither a local folder nor a hub repository you can see" in said
    said = client.refused(GET, REPO, "", "weights", HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub cannot be reached" in said


def test_progress_counts_bytes(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "big"
    save(folder, shard="3MB", vocab_size=60_000)  # 15 MB
    hub.commit(folder)
    code = (
        "import sys\nfrom jitgraph.model.hub import download\nheard = []\n"
        "download(sys.argv[1], None, True, lambda *news: heard.append(news))\n"
        "assert {phase for phase, *_ in heard} == {'downloading (MiB)'}, heard\n"
        "done = [one for _, one, _ in heard]\nassert done == sorted(done) and len(done) > 2\n"
        "print(heard[-1][1], heard[-1][2])\n"
    )
    done = Client(tmp_path / "home", hub).run(code, REPO)
    assert done.returncode == 0, done.stderr
    total = sum(len(data) for name, data in hub.commits[hub.names["main"]].items()) >> 20
    assert done.stdout.split() == [str(total), str(total)] and total >= 14
    assert "Fetching" not in done.stderr, "no bars of the client's own"


def test_a_model_that_does_not_fit_is_not_downloaded(hub: FakeHub, client: Client) -> None:
    code = LOAD.replace('load_model(sys.argv[1], device="cpu")', "refuse()").replace(
        "try:",
        "from jitgraph.engine import opening\nopening.free_bytes = lambda _: 1 << 20\n"
        "from jitgraph.config import EngineConfig\n"
        "refuse = lambda: opening.open_engine(sys.argv[1], config=EngineConfig(device='cpu', max_model_len=64))\ntry:",
    )
    said = client.refused(code, REPO, "")
    assert "does not fit on cpu: it needs" in said and "use a device with" in said
    assert hub.downloads("config.json") and hub.downloads(".safetensors") == []


INSPECT = """
import json, sys
from jitgraph.engine.inspection import inspect_model
facts = inspect_model(sys.argv[1], device="cpu")
print(json.dumps({name: facts[name] for name in ("name", "family", "parameters", "runs", "stored", "own_dtype")}))
"""


def test_inspecting_a_hub_model(hub: FakeHub, client: Client, folders: tuple[Path, Path]) -> None:
    """Without its weights, though its index of shards names them; and with them once they are there."""
    done = client.run(INSPECT, REPO)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["name"], facts["family"], facts["runs"], facts["stored"]) == (REPO, "llama", "native", None)
    assert hub.downloads(".safetensors") == []
    client.get()
    after = json.loads(client.run(INSPECT, REPO, HF_HUB_OFFLINE="1").stdout)
    assert after["stored"]["files"] == len(list(folders[0].glob("*.safetensors")))
    assert after["stored"]["elements_by_dtype"] == {"F32": facts["parameters"]}
