"""The command line as a person meets it: text on standard output, the rest on standard error, one sentence an error."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jitgraph import __version__
from jitgraph.cli import app, run_cli
from jitgraph.model.spec import ModelSpec

QUICK = ["--device", "cpu", "--max-model-len", "64"]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(*words, given=None)``: (exit code, standard output, standard error) of ``jitgraph`` in this process."""

    def run(*words: str, given: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(given or ""))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_cli(lambda: app(list(words)))
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def test_generate_streams_text(run: Run) -> None:
    code, out, err = run("generate", "tiny", "--prompt", "The train", "--max-tokens", "5", *QUICK)
    assert code == 0 and out.endswith("\n")
    assert "5 tokens, max_tokens" in err and "emulated graphs" in err


def test_generate_json_and_seed(run: Run) -> None:
    words = [
        "generate",
        "tiny",
        "--token-ids",
        "3,4,5",
        "--max-tokens",
        "6",
        "--temperature",
        "1",
        "--seed",
        "3",
        "--json",
    ]
    first, second = (run(*words, "--logprobs", "2", *QUICK) for _ in range(2))
    document = json.loads(first[1])
    assert document["prompt_token_ids"] == [3, 4, 5] and len(document["token_ids"]) == 6
    assert document["finish_reason"] == "length" and len(document["logprobs"]) == 6
    assert document["timings"]["ttft_ms"] > 0
    assert json.loads(second[1])["token_ids"] == document["token_ids"]


def test_generate_reads_standard_input(run: Run) -> None:
    code, out, _ = run("generate", "tiny", "--prompt", "-", "--max-tokens", "2", "--json", *QUICK, given="Hello there")
    assert code == 0 and len(json.loads(out)["prompt_token_ids"]) >= 2


def test_penalties_and_bias(run: Run) -> None:
    words = ["generate", "tiny", "--token-ids", "3,4,5", "--max-tokens", "16", "--json", *QUICK]

    def tokens(*more: str) -> list[int]:
        code, out, err = run(*words, *more)
        assert code == 0, err
        found: list[int] = json.loads(out)["token_ids"]
        return found

    assert tokens("--logit-bias", "9=100") == [9] * 16
    assert tokens("--logit-bias", "9=1", "--logit-bias", "8=-100", "--presence-penalty", "2").count(9) == 1
    assert 1 < tokens("--logit-bias", "9=1", "--frequency-penalty", "0.2").count(9) < 10
    assert len(set(tokens("--repetition-penalty", "5"))) == 16
    assert len(set(tokens("--presence-penalty", "-2"))) == 1


def test_engine_settings(run: Run) -> None:
    """Each is taken and does what it says; none changes what a greedy request gets."""
    words = ["generate", "tiny", "--token-ids", "3,4,5", "--max-tokens", "6", "--json"]
    expected = json.loads(run(*words, *QUICK)[1])["token_ids"]
    for more in (["--strict"], ["--batch-invariant"], ["--precapture", "1-3, 5"], ["--max-graphs", "0"]):
        code, out, err = run(*words, *more, *QUICK)
        assert code == 0 and json.loads(out)["token_ids"] == expected, err


def test_a_stream_longer_than_its_window(run: Run) -> None:
    words = ["--token-ids", "3,4,5", "--max-tokens", "60", "--ignore-eos", "--json", "--device", "cpu"]
    code, out, err = run("generate", "tiny", *words, "--kv-window", "24")
    assert code == 0 and len(json.loads(out)["token_ids"]) == 60, err
    whole = json.loads(run("generate", "tiny", *words)[1])["token_ids"]
    assert json.loads(out)["token_ids"][:20] == whole[:20], "until the window is full"


def test_chat_past_its_window(run: Run) -> None:
    given = "Hello, how are you today, and what do you do there?\n" * 4 + "\n"
    words = ["chat", "tiny", "--max-tokens", "12", "--kv-window", "32", "--device", "cpu", "--strict"]
    code, _, err = run(*words, given=given)
    assert code == 0 and err.count("12 tokens, max_tokens") == 4


def test_chat_keeps_the_conversation(run: Run) -> None:
    code, out, err = run("chat", "tiny", "--max-tokens", "4", "--device", "cpu", given="Hello\nAnd then?\n\n")
    assert code == 0 and out.count("> ") == 3
    assert err.count("4 tokens, max_tokens") == 2


def test_chat_takes_penalties(run: Run) -> None:
    """The same question with penalties that make the model repeat itself, and with none: other answers."""
    words = ["chat", "tiny", "--max-tokens", "12", "--device", "cpu"]
    plain = run(*words, given="Hello\n\n")[1]
    for penalty in ("--presence-penalty=-2", "--frequency-penalty=-2", "--repetition-penalty=0.3"):
        code, out, _ = run(*words, penalty, given="Hello\n\n")
        assert code == 0 and out != plain, penalty


@pytest.mark.parametrize(("given", "parameters", "threads"), [("", 10, 1), ("3", 10, 4), ("", 10**9, 4)])
def test_a_small_model_gets_one_thread(
    monkeypatch: pytest.MonkeyPatch, run: Run, given: str, parameters: int, threads: int
) -> None:
    """On the CPU, unless the user has said how many."""
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(ModelSpec, "linear_parameters", lambda _: parameters)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert run("generate", "tiny", "--prompt", "x", "--max-tokens", "2", *QUICK)[0] == 0
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_export_and_use(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-export"
    assert run("export", "tiny", str(folder), "--device", "cpu")[0] == 0
    assert (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists()
    words = ["--prompt", "The train", "--max-tokens", "5", "--json", "--dtype", "float16", *QUICK]
    exported, preset = (json.loads(run("generate", where, *words)[1]) for where in (str(folder), "tiny"))
    assert exported["token_ids"] == preset["token_ids"]


def test_version_and_environment(run: Run) -> None:
    assert run("--version")[1].strip() == f"jitgraph {__version__}"
    found = json.loads(run("collect-env", "--json")[1])
    assert "torch" in json.dumps(found) and "python" in json.dumps(found).lower()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "tiny"], "give the prompt either as --prompt TEXT or as --token-ids"),
        (["generate", "tiny", "--prompt", ""], "the prompt is empty"),
        (["generate", "tiny", "--token-ids", "1,x"], "--token-ids must be whole numbers"),
        (["generate", "tiny", "--token-ids", "1,2048", *QUICK], "token id 2048 is not in the vocabulary"),
        (["generate", "/nowhere/at/all", "--prompt", "x"], "no existing folder, no preset"),
        (["generate", "llama-2-7b", "--prompt", "x"], "--weights random"),
        (["generate", "tiny", "--prompt", "x", "--temperature", "-1"], "temperature must be between 0 and 100"),
        (["generate", "tiny", "--prompt", "x", "--temperature", "nan"], "temperature must be a finite number"),
        (["generate", "tiny", "--prompt", "x", "--logprobs", "5"], "--logprobs needs --json"),
        (["generate", "tiny", "--prompt", "x", "--logit-bias", "5:1"], "--logit-bias must be ID=VALUE"),
        (["generate", "tiny", "--prompt", "x", "--logit-bias", "a=1"], "--logit-bias must be ID=VALUE"),
        (["generate", "tiny", "--prompt", "x", "--logit-bias", "5=101"], "must be between -100 and 100, not 101"),
        (["generate", "tiny", "--prompt", "x", "--logit-bias", "2048=1", *QUICK], "logit_bias token id 2048 is not"),
        (["generate", "tiny", "--prompt", "x", "--presence-penalty", "3"], "presence_penalty must be between -2 and 2"),
        (["generate", "tiny", "--prompt", "x", "--max-tokens", "3000000000"], "below 2**31"),
        (["generate", "tiny", "--prompt", "x", "--kv-cache-memory", "5B", *QUICK], "is too small"),
        (["generate", "tiny", "--token-ids", ",".join(["5"] * 80), *QUICK], "the prompt has 80 tokens"),
        (["generate", "tiny", "--prompt", "x", "--kv-window", "5"], "kv_window must be at least 20, not 5"),
        (["generate", "tiny", "--prompt", "x", "--kv-window", "32", *QUICK], "exclude each other"),
        (["generate", "tiny", "--prompt", "x", "--precapture", "0-3"], "'0-3' is not between 1 and the largest bucket"),
        (["generate", "tiny", "--prompt", "x", "--precapture", "three"], "'three' is no length"),
        (["generate", "tiny", "--prompt", "x", "--max-graphs", "-1"], "max_graphs must be 0 or more, not -1"),
        (["serve", "tiny", "--allowed-origin", "app.example"], "--allowed-origin must be like https://host:port"),
        (["serve", "tiny", "--request-timeout", "0"], "request_timeout_s must be above 0"),
        (["serve", "tiny", "--max-streams", "9"], "max_streams must be between 1 and 8, not 9"),
        (["serve", "tiny", "--max-queued", "-1"], "--max-queued must be 0 or more, not -1"),
        (["serve", "tiny", "--host", "0.0.0.0"], "set JITGRAPH_API_KEY or give --api-key"),
        (["engine", "tiny", "--socket", "/tmp/x", "--shutdown-timeout", "nan"], "--shutdown-timeout must be a number"),
        (["export", "gpt-17", "/tmp"], "gpt-17"),
        (["export", "tiny", "/proc/nowhere"], "/proc"),
    ],
)
def test_one_sentence_and_exit_code_2(run: Run, words: list[str], said: str) -> None:
    code, out, err = run(*words)
    assert code == 2 and said in err.replace("\n", " ") and err.startswith("error:")
    assert "Traceback" not in out + err


def test_as_a_process() -> None:
    """``python -m jitgraph`` itself: exit code, streams, and no traceback where the mistake is the user's."""
    done = subprocess.run(
        [sys.executable, "-m", "jitgraph", "generate", "no-such-model", "--prompt", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error:")


def test_the_models_own_sampling_is_used_and_named(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert run("export", "tiny", str(folder), "--device", "cpu")[0] == 0
    path = folder / "generation_config.json"
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    words = ["generate", str(folder), "--prompt", "x", "--max-tokens", "12", "--json", *QUICK]
    code, sampled, err = run(*words, "--seed", "1")
    assert code == 0 and "generation_config.json: temperature 0.6, top_p 0.9" in err
    greedy = run(*words, "--temperature", "0", "--top-p", "1")[1]
    assert json.loads(sampled)["token_ids"] != json.loads(greedy)["token_ids"]
    path.write_text(json.dumps({"repetition_penalty": 1.8, "no_repeat_ngram_size": 3}))
    code, penalised, err = run(*words)
    assert code == 0 and "generation_config.json: repetition_penalty 1.8" in err
    assert "what is not supported: no_repeat_ngram_size 3" in err
    assert json.loads(penalised)["token_ids"] != json.loads(greedy)["token_ids"]
    assert run(*words, "--repetition-penalty", "1")[1].split('"timings"')[0] == greedy.split('"timings"')[0]
    path.write_text(json.dumps({"do_sample": True, "temperature": "hot"}))
    code, _, err = run(*words)
    assert code == 2 and "generation_config.json: temperature must be a finite number above zero" in err.replace(
        "\n", " "
    )
    path.write_text(json.dumps({"eos_token_id": [1, 99999]}))
    code, _, err = run(*words)
    assert code == 2 and "eos_token_id 99999 is not in the vocabulary of 2048" in err.replace("\n", " ")
