"""``jitgraph collect-env``: on this machine, with a GPU (played by a fake library), and where parts are broken."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

import jitgraph
from jitgraph import cli_collect_env as report
from jitgraph.bench.nvml import NvmlError, gpu_facts
from jitgraph.cli import app
from jitgraph.config import ENVIRONMENT, environment_settings
from jitgraph.graphs.loop import why_no_loops
from jitgraph.model.device import resolve_device

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["jitgraph", "system", "cpu", "gpu", "torch", "kernels", "cache", "packages", "environment"]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The report on this machine."""
    return report.collect()


def shown(*words: str) -> str:
    """What the command prints."""
    result = CliRunner().invoke(app, ["collect-env", *words])
    assert result.exit_code == 0, result.output
    return result.output


# -------------------------------------------------------------------------------------------------------- this machine


def test_as_json() -> None:
    document = json.loads(shown("--json"))
    assert list(document) == PARTS
    assert document["jitgraph"]["version"] == jitgraph.__version__
    assert document["torch"]["version"] == torch.__version__


def test_as_text() -> None:
    text = shown()
    lines = text.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == PARTS
    assert f"  version: {torch.__version__}" in lines and f"  version: {jitgraph.__version__}" in lines
    assert all(ord(char) >= 32 for char in text.replace("\n", ""))


def test_no_part_fails_here(found: dict[str, Any]) -> None:
    assert [part for part in PARTS if "error" in found[part]] == []
    assert found["cpu"]["cores"] >= found["cpu"]["cores_usable"] >= 1
    assert found["cpu"]["memory_gib"] > found["cpu"]["memory_available_gib"] > 0
    assert found["system"]["kernel"] == os.uname().release
    assert found["packages"]["torch"] == torch.__version__


def test_kernels_say_why_there_are_no_loops(found: dict[str, Any]) -> None:
    why = why_no_loops(resolve_device("auto"))
    kernels = found["kernels"]
    assert kernels["device_loops"] == (why is None) and kernels["no_device_loops_because"] == why
    assert why_no_loops(torch.device("cpu")) == "graphs are emulated on this device"


@pytest.mark.gpu
def test_a_real_gpu(found: dict[str, Any]) -> None:
    """NVML and PyTorch speak of the same card."""
    names = [gpu["name"] for gpu in found["gpu"]["gpus"]]
    assert found["torch"]["devices"][0]["name"] in names
    (gpu, *_) = found["gpu"]["gpus"]
    assert gpu["uuid"].startswith("GPU-") and gpu["power_limit_w"] > 10 and gpu["memory_gib"] > 1
    assert gpu["sm_clock_max_mhz"] >= gpu["sm_clock_mhz"] > 0 and gpu["clocks_held_by"]
    assert found["gpu"]["driver"].count(".") >= 1 and float(found["gpu"]["cuda_driver"]) >= 11
    assert "error" not in found["kernels"]


def test_every_package_that_the_project_asks_for_is_listed() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = table["optional-dependencies"]
    asked = {Requirement(text).name for text in [*table["dependencies"], *extras["bench"], *extras["serve"]]}
    assert asked <= set(report.PACKAGES)


# ------------------------------------------------------------------------------------------------------ broken machines


def test_a_part_that_fails_says_why_and_the_others_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("libcudart.so.13: cannot open")

    for part in ("_torch", "_gpu", "_kernels", "_cpu", "_system", "_cache"):
        monkeypatch.setattr(report, part, broken)
    found = report.collect()
    assert found["torch"] == {"error": "RuntimeError: libcudart.so.13: cannot open"}
    assert found["jitgraph"]["version"] == jitgraph.__version__ and "error" not in found["packages"]
    assert "error: RuntimeError" in report.as_text(found)


def test_without_torch_and_without_tools(tmp_path: Path) -> None:
    """PyTorch cannot be imported, no program is on the path, and there is no home: a report all the same."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch_cuda.so: undefined symbol')\n")
    environment = {"PATH": "/nowhere", "HOME": "/nowhere/home", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "jitgraph", "collect-env", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["torch"] == {"error": "ImportError: libtorch_cuda.so: undefined symbol"}
    assert "undefined symbol" in document["kernels"]["error"]
    assert document["cache"] == {"folder": "~/.cache/jitgraph", "files": 0, "mib": 0.0, "writable": os.getuid() == 0}
    assert document["cpu"]["cores"] >= 1


# -------------------------------------------------------------------------------------------- secrets, cache, commit


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, f"value of {name}")
    monkeypatch.setenv("SOMEBODY_ELSES", "business")
    settings = environment_settings()
    assert set(settings) == set(ENVIRONMENT)
    assert settings["HF_TOKEN"] == "(set)" and settings["HF_HOME"] == "value of HF_HOME"
    text = shown() + shown("--json")
    assert "value of HF_TOKEN" not in text and "business" not in text
    assert not [name for name in ENVIRONMENT if name.endswith(("KEY", "TOKEN")) and f"value of {name}" in text]


def test_the_home_folder_is_not_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JITGRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", f"{tmp_path}-of-another")
    (tmp_path / "cache" / "kernels").mkdir(parents=True)
    (tmp_path / "cache" / "kernels" / "one").write_bytes(bytes(3 * 2**20))
    found = report.collect()
    assert found["cache"] == {"folder": "~/cache", "files": 1, "mib": 3.0, "writable": True}
    assert found["environment"]["JITGRAPH_CACHE"] == "~/cache"
    assert found["environment"]["HF_HOME"] == f"{tmp_path}-of-another", "another folder that begins alike"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    assert report.git_commit(tmp_path) is None
    write("plain/.git/HEAD", "ref: refs/heads/main\n")
    assert report.git_commit(tmp_path / "plain") is None, "no commit yet"
    write(
        "plain/.git/packed-refs", f"# pack-refs with: peeled\n{'f' * 40} refs/heads/other\n{COMMIT} refs/heads/main\n"
    )
    assert report.git_commit(tmp_path / "plain") == COMMIT
    write("plain/.git/refs/heads/main", f"{COMMIT[::-1]}\n")
    assert report.git_commit(tmp_path / "plain") == COMMIT[::-1], "the loose one is newer"
    write("detached/.git/HEAD", f"{COMMIT}\n")
    assert report.git_commit(tmp_path / "detached") == COMMIT
    write("beside/.git", f"gitdir: {tmp_path}/plain/.git/worktrees/beside\n")
    write("plain/.git/worktrees/beside/HEAD", "ref: refs/heads/other\n")
    write("plain/.git/worktrees/beside/commondir", "../..\n")
    assert report.git_commit(tmp_path / "beside") == "f" * 40


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no checkout, or no git")
def test_the_commit_is_the_one_git_names() -> None:
    command = ["git", "-c", f"safe.directory={ROOT}", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert report.git_commit(ROOT) == done.stdout.strip()


@pytest.mark.parametrize(
    ("text", "cores"), [(None, None), ("max 100000", None), ("150000 100000", 1.5), ("", None), ("7", None)]
)
def test_the_limit_of_a_control_group(text: str | None, cores: float | None) -> None:
    assert report._cpu_limit(text) == cores


# ----------------------------------------------------------------------------------------------------------- fake NVML


class FakeNvml:
    """A driver's library with one card. Names in ``missing`` are not in it, those in ``refused`` are not supported."""

    def __init__(self, missing: tuple[str, ...] = (), refused: tuple[str, ...] = (), slowed: int = 0x1 | 0x4) -> None:
        self.missing = missing
        self.refused = refused
        self.is_open = False
        self.slowed = slowed

    def __getattr__(self, name: str) -> Any:
        if name in self.missing:
            raise AttributeError(name)

        def call(*args: Any) -> int:
            if name in self.refused:
                return 3
            if name in ("nvmlInit_v2", "nvmlShutdown"):
                self.is_open = name == "nvmlInit_v2"
                return 0
            assert self.is_open, "called before nvmlInit_v2"
            return self.answer(name, args)

        return call

    def answer(self, name: str, args: tuple[Any, ...]) -> int:
        clock = args[1] if "Clock" in name else None
        numbers = {
            "nvmlSystemGetCudaDriverVersion_v2": 13000,
            "nvmlDeviceGetCount_v2": 1,
            "nvmlDeviceGetEnforcedPowerLimit": 650_000,
            "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
            "nvmlDeviceGetClockInfo": 1335 if clock == 1 else 3201,
            "nvmlDeviceGetMaxClockInfo": 1980 if clock == 1 else 3201,
            "nvmlDeviceGetCurrentClocksThrottleReasons": self.slowed,
            "nvmlDeviceGetTemperature": 41,
            "nvmlDeviceGetPersistenceMode": 1,
        }
        texts = {
            "nvmlSystemGetDriverVersion": b"580.159.04",
            "nvmlDeviceGetName": b"NVIDIA H200",
            "nvmlDeviceGetUUID": b"GPU-1234",
        }
        if name in numbers:
            args[-1]._obj.value = numbers[name]
        elif name in texts:
            assert args[-1].value >= len(texts[name])
            args[-2].value = texts[name]
        elif name == "nvmlDeviceGetHandleByIndex_v2":
            assert args[0].value == 0 and isinstance(args[1]._obj, ctypes.c_void_p)
        elif name == "nvmlDeviceGetMemoryInfo":
            args[1]._obj.total, args[1]._obj.used = 141 * 2**30, 2**30
        elif name == "nvmlDeviceGetEccMode":
            args[1]._obj.value = args[2]._obj.value = 1
        elif name == "nvmlDeviceGetMigMode":
            args[2]._obj.value = 1
        else:
            raise AssertionError(f"{name} is no function of the library")
        return 0


def test_a_gpu_as_nvml_tells_it() -> None:
    library = FakeNvml()
    assert gpu_facts(lambda: library) == {
        "driver": "580.159.04",
        "cuda_driver": "13.0",
        "gpus": [
            {
                "name": "NVIDIA H200",
                "uuid": "GPU-1234",
                "memory_gib": 141.0,
                "memory_used_gib": 1.0,
                "power_limit_w": 650.0,
                "power_limit_default_w": 700.0,
                "sm_clock_mhz": 1335,
                "sm_clock_max_mhz": 1980,
                "memory_clock_mhz": 3201,
                "memory_clock_max_mhz": 3201,
                "clocks_held_by": "idle, software power cap",
                "temperature_c": 41,
                "ecc": "on",
                "mig": "off, on after the next reset",
                "persistence": "on",
            }
        ],
    }
    assert not library.is_open, "shut down at the end"


def test_what_a_gpu_does_not_tell_is_left_out() -> None:
    library = FakeNvml(
        missing=("nvmlDeviceGetMigMode", "nvmlSystemGetCudaDriverVersion_v2"),
        refused=("nvmlDeviceGetEccMode", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetName"),
        slowed=0,
    )
    found = gpu_facts(lambda: library)
    (gpu,) = found["gpus"]
    assert found["cuda_driver"] is None and not {"mig", "ecc", "memory_gib", "memory_used_gib", "name"} & set(gpu)
    assert gpu["uuid"] == "GPU-1234" and gpu["clocks_held_by"] == "nothing"
    lost = gpu_facts(lambda: FakeNvml(refused=("nvmlDeviceGetHandleByIndex_v2",)))
    assert lost["gpus"] == [{"error": "nvmlDeviceGetHandleByIndex_v2: not supported"}]


def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NvmlError, match="nvmlInit_v2: not supported"):
        gpu_facts(lambda: FakeNvml(refused=("nvmlInit_v2",)))
    monkeypatch.setattr(report, "gpu_facts", lambda: gpu_facts(lambda: FakeNvml(missing=("nvmlInit_v2",))))
    assert report.collect()["gpu"]["none"] == "nvmlInit_v2: the driver is too old for this call"


def test_a_gpu_in_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "gpu_facts", lambda: gpu_facts(FakeNvml))
    text = shown()
    assert "  gpus 0:\n    name: NVIDIA H200\n    uuid: GPU-1234\n" in text and "  driver: 580.159.04\n" in text
