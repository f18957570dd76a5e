"""The peer cases: transformers compiled and behind exact graphs for real, other engines on stand-ins of their shape."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peer_fakes import fake_tensorrt, fake_vllm

from jitgraph.bench.cases import baseline, hf_compile, hf_graphs, openai, tensorrt_llm, vllm
from jitgraph.bench.cases.checkpoint import Checkpoint
from jitgraph.bench.cases.common import CaseUnavailable, Decoded
from jitgraph.bench.plan import DECODE_TOKENS, FILE_STEMS, PEERS, TITLES, Options, Plan
from jitgraph.errors import JitgraphError

ROOT = Path(__file__).resolve().parents[1]
PROMPT = [5, 6, 7, 8]


def plan(device: str = "cpu") -> Plan:
    settings = {"model": "tiny", "weights": "random", "prompt_lengths": (4, 9), "p99_iterations": 2}
    return Options(**settings).plan(device)  # type: ignore[arg-type]


def reference_tokens(count: int) -> list[int]:
    """What eager transformers generates after ``PROMPT``."""
    case = baseline.BaselineCase()
    case.load(plan())
    return [int(one) for one in case._generate(PROMPT, count, None)[0, len(PROMPT) :]]


def test_a_decoded_answer_tells_all_times() -> None:
    answer = Decoded.from_times(1_000_000, [3_000_000, 4_000_000, 7_000_000], 3)
    assert (answer.ttft_ms, answer.gaps_ms) == (2.0, (1.0, 3.0))
    assert (answer.e2e_ms, answer.tpot_ms) == (6.0, 2.0)
    with pytest.raises(JitgraphError, match="asked for 4 tokens, got 3"):
        Decoded.from_times(0, [1, 2, 3], 4)


def test_every_peer_has_a_name_and_files() -> None:
    assert {*PEERS} <= {*FILE_STEMS} & {*TITLES}


def test_exact_graphs_compute_what_eager_transformers_does() -> None:
    case = hf_graphs.ExactGraphsCase()
    case.load(plan())
    expected = reference_tokens(3)
    assert case.first_token(PROMPT).token_id == expected[0]
    answer = case.decode(PROMPT, 3)
    assert [*case._ids[0, 4:6].tolist()] == expected[:2], "each token goes into the input of the next length"
    assert len(answer.gaps_ms) == 2 and answer.ttft_ms > 0
    assert case.paths() == {
        "prefill": {"exact": 2, "padded": 0, "eager": 0},
        "decode": {"exact": 2, "padded": 0, "eager": 0},
    }
    about = case.describe()
    assert about["emulated"] is True and about["kv_cache"] is False
    assert about["captures"] == len({*range(4, 4 + DECODE_TOKENS), *range(9, 9 + DECODE_TOKENS)})
    with pytest.raises(JitgraphError, match="no graph was captured for 3 tokens"):
        case.first_token([1, 2, 3])
    case.close()


@pytest.mark.gpu
def test_exact_graphs_are_captured_on_a_gpu() -> None:
    case = hf_graphs.ExactGraphsCase()
    case.load(plan("cuda"))
    assert case.describe()["emulated"] is False
    assert len({case.first_token(PROMPT).token_id for _ in range(3)}) == 1
    assert len(case.decode(PROMPT, 8).gaps_ms) == 7
    case.close()


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for the CPU with a C++ compiler")
def test_compiled_transformers_computes_the_same_and_compiles_nothing_later() -> None:
    case = hf_compile.CompiledCase()
    case.load(plan())
    expected = reference_tokens(6)
    assert case.first_token(PROMPT).token_id == expected[0]
    assert len(case.decode(PROMPT, 6).gaps_ms) == 5
    assert [int(one) for one in _generated(case, 6)] == expected
    case.decode([5, 6, 7, 8, 9, 10, 11, 12, 13], 4)
    about = case.describe()
    assert about["compile_mode"] == "reduce-overhead" and about["cache"] == "static"
    assert case._compiled >= 1, "the forward pass was compiled before ready"
    assert about["compiles_after_ready"] == 0, "and at no other length"
    assert about["cuda_graphs"] is False


def _generated(case: hf_compile.CompiledCase, tokens: int) -> list[int]:
    case._fresh()
    return list(case._generate(PROMPT, tokens, None)[0, len(PROMPT) :])


def test_vllm_is_driven_by_its_documented_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = fake_vllm(monkeypatch)
    monkeypatch.setattr(Checkpoint, "path", lambda self, plan: "folder")
    case = vllm.VLLMCase()
    case.load(plan("cuda"))
    (engine,) = engines.made
    arguments = vars(engine.arguments)
    assert arguments["model"] == "folder" and arguments["enable_prefix_caching"] is False
    assert "max_num_seqs" not in arguments, "it would capture no graphs for prompts"
    assert arguments["max_model_len"] == 1024 and arguments["dtype"] == "float16"
    token = case.first_token(PROMPT)
    assert token.token_id == 7 and token.engine_ms == pytest.approx(2.0) and token.client_ms > 0
    answer = case.decode(PROMPT, 5)
    assert len(answer.gaps_ms) == 4 and answer.gaps_ms[1] == 0.0, "tokens of one message share its time"
    assert case.describe()["version"] == "0.0"
    prompt, params, _ = engine.asked[0]
    assert prompt == {"prompt_token_ids": PROMPT}
    assert params.temperature == 0.0 and params.ignore_eos and not params.detokenize
    assert len({name for _, _, name in engine.asked}) == 2, "each request has a name of its own"
    case.close()
    assert engine.closed


def test_vllm_gets_the_memory_that_one_stream_needs() -> None:
    assert vllm.memory_share(13.0, 140.0) == pytest.approx(21 / 140)
    assert vllm.memory_share(100.0, 80.0) == vllm.memory_share(1.0, None) == vllm.USUAL_SHARE


def test_tensorrt_llm_is_driven_by_its_documented_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = fake_tensorrt(monkeypatch)
    monkeypatch.setattr(Checkpoint, "path", lambda self, plan: "folder")
    case = tensorrt_llm.TensorRTLLMCase()
    case.load(plan("cuda"))
    (engine,) = engines.made
    assert engine.arguments["model"] == "folder" and not engine.arguments["kv_cache_config"].enable_block_reuse
    assert case.first_token(PROMPT).token_id == 7
    answer = case.decode(PROMPT, 5)
    assert len(answer.gaps_ms) == 4 and min(answer.gaps_ms) >= 0.0, "the closing message is no token"
    case.close()
    assert engine.closed


@pytest.mark.parametrize(
    ("make", "status"),
    [(vllm.make, "not installed"), (tensorrt_llm.make, "not installed")],
)
def test_what_is_not_installed_says_how_to_get_it(make: object, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "tensorrt_llm"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CaseUnavailable, match=r"not installed: run scripts/make_venv_.*--python") as error:
        make().load(plan("cuda"))  # type: ignore[operator]
    assert error.value.status == status


def test_peers_on_the_cpu_say_so_and_a_server_needs_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm(monkeypatch)
    with pytest.raises(CaseUnavailable, match="no CUDA device"):
        vllm.make().load(plan())
    with pytest.raises(CaseUnavailable, match="pass --url openai=URL"):
        openai.make()


def test_a_worker_needs_nothing_but_python_itself() -> None:
    """A case of another environment is measured there: numpy, rich or msgspec may be missing."""
    program = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names and top != "jitgraph":
            raise ModuleNotFoundError(f"{name} is not part of Python")
sys.meta_path.insert(0, Nothing())
import jitgraph.bench.worker, jitgraph.bench.cases.url, jitgraph.bench.cases.vllm
import jitgraph.bench.cases.tensorrt_llm, jitgraph.bench.cases.openai
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
