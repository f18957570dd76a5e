"""Train the bundled default model: a small Llama that writes Python, from the standard library's own source.

Run from anywhere, with the bench extra installed: ``python scripts/train_default_model.py --output FOLDER``. It takes
under nine minutes on one data-centre GPU; a run that was broken off goes on where its last checkpoint was
(``--resume``). The same library, versions and device give the same data, order and start; the committed files are
what counts. Written: the model as a Hugging Face folder, and ``training.json`` with data, loss curve, held-out
perplexity and samples, from which ``docs/default_model.md`` is made.

Texts: every source file of the standard library (PSF-2.0) but tests; besides whole files, its functions and classes one
by one, so that the model knows how one begins without a file around it. Files are held out by the hash of their path;
the weights that are kept are those of the look with the least loss on them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import random
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "turtledemo"}
HELD_OUT_PER_MILLE = 30
PROMPTS = (
    "def read_json(path):",
    "class Stack:\n",
    "import argparse\n\n\ndef main():",
    "def is_prime(n):",
    "for line in",
)


@dataclass(frozen=True)
class Plan:
    """Everything that decides about the result."""

    vocabulary: int = 6144
    hidden: int = 256
    intermediate: int = 640
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    context: int = 1024
    batch: int = 64
    steps: int = 450
    peak_rate: float = 3e-3
    last_rate: float = 1e-4
    warm_up: int = 200
    weight_decay: float = 0.1
    seed: int = 20261122
    starts: float = 0.3
    """Share of windows that begin where a text begins; the others begin anywhere."""


# ----------------------------------------------------------------------------------------------------------------- data


def source_files(root: Path) -> list[tuple[str, str]]:
    """(path below the library, text) of every source file, in the order of their paths."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            try:
                found.append((relative.as_posix(), path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue
    return found


def is_held_out(name: str) -> bool:
    """Whether a file is kept from training, by the hash of its path alone."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 < HELD_OUT_PER_MILLE


def definitions(text: str) -> Iterator[str]:
    """The functions and classes of a source, methods as well, each as if it stood alone."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            yield textwrap.dedent("".join(lines[first - 1 : node.end_lineno]))


def train_tokenizer(texts: list[str], entries: int) -> Tokenizer:
    """A byte-level BPE that puts BOS in front of every text and keeps runs of spaces together."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[AddedToken(text, special=True) for text in (BOS, EOS, PAD)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, begin)]
    )
    return tokenizer


@dataclass
class Corpus:
    """Texts as one row of ids, each from BOS to EOS."""

    ids: np.ndarray[Any, np.dtype[np.int64]]
    begins: np.ndarray[Any, np.dtype[np.int64]]


def encode(tokenizer: Tokenizer, texts: list[str]) -> Corpus:
    """All texts, in order."""
    end = tokenizer.token_to_id(EOS)
    rows = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(texts)]
    begins = np.cumsum([0, *(len(row) for row in rows)])[:-1]
    return Corpus(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]), begins)


def windows(corpus: Corpus, plan: Plan, step: int, device: torch.device) -> torch.Tensor:
    """The ids of one step, int64 ``[batch, context + 1]``; the same for the same step whatever came before."""
    draw = np.random.default_rng([plan.seed, step])
    last = len(corpus.ids) - plan.context - 1
    anywhere = draw.integers(0, last, plan.batch)
    at_a_text = np.minimum(draw.choice(corpus.begins, plan.batch), last)
    first = np.where(draw.random(plan.batch) < plan.starts, at_a_text, anywhere)
    rows = corpus.ids[first[:, None] + np.arange(plan.context + 1)]
    return torch.from_numpy(rows).to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------------------- training


def build_model(plan: Plan, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """The model with seeded random weights, in float32."""
    torch.manual_seed(plan.seed)
    config = LlamaConfig(
        vocab_size=plan.vocabulary,
        hidden_size=plan.hidden,
        intermediate_size=plan.intermediate,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.kv_heads,
        max_position_embeddings=plan.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return LlamaForCausalLM(config)


def rate(plan: Plan, step: int) -> float:
    """Learning rate: a straight warm-up, then half a cosine."""
    if step < plan.warm_up:
        return plan.peak_rate * (step + 1) / plan.warm_up
    done = (step - plan.warm_up) / max(1, plan.steps - plan.warm_up)
    return plan.last_rate + (plan.peak_rate - plan.last_rate) * 0.5 * (1 + math.cos(math.pi * done))


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each id given those before, in nats."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, corpus: Corpus, plan: Plan, device: torch.device) -> float:
    """Mean over the held-out files, in windows of the context one after the other."""
    count = min(256, (len(corpus.ids) - 1) // plan.context)
    rows = np.arange(count)[:, None] * plan.context + np.arange(plan.context + 1)
    ids = torch.from_numpy(corpus.ids[rows]).to(device)
    losses = [loss_of(model, part).item() * len(part) for part in ids.split(plan.batch)]
    return sum(losses) / count


class Training:
    """One run, and its checkpoint."""

    def __init__(self, plan: Plan, model: LlamaForCausalLM, device: torch.device, checkpoint: Path) -> None:
        self.plan, self.model, self.device = plan, model.to(device), device
        self._checkpoint = checkpoint
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.best: dict[str, torch.Tensor] = {}
        """Weights of the look with the least loss on the held-out files."""

    def resume(self) -> None:
        """Goes on from the checkpoint, if there is one of the same plan."""
        if self._checkpoint.exists():
            state = torch.load(self._checkpoint, map_location=self.device, weights_only=True)
            if state["plan"] == asdict(self.plan):
                self.model.load_state_dict(state["model"])
                self._optimiser.load_state_dict(state["optimiser"])
                self.step, self.curve, self.best = state["step"], state["curve"], state["best"]

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        state = {"plan": asdict(self.plan), "model": self.model.state_dict()}
        state |= {"optimiser": self._optimiser.state_dict(), "step": self.step, "curve": self.curve}
        state["best"] = self.best
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._checkpoint)

    def run(self, corpus: Corpus, held_out: Corpus, limit_s: float) -> bool:
        """Trains until the plan is done (True) or time is up (False)."""
        begun, told = time.monotonic(), 0.0
        while self.step < self.plan.steps:
            for group in self._optimiser.param_groups:
                group["lr"] = rate(self.plan, self.step)
            loss = loss_of(self.model, windows(corpus, self.plan, self.step, self.device))
            self._optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimiser.step()
            self.step += 1
            if self.step % max(1, self.plan.steps // 24) == 0 or self.step == self.plan.steps:
                outside = held_out_loss(self.model, held_out, self.plan, self.device)
                self.curve.append({"step": self.step, "train": loss.item(), "held_out": outside})
                if outside == min(look["held_out"] for look in self.curve):
                    self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
                print(f"step {self.step}: loss {loss.item():.3f}, held out {outside:.3f}", file=sys.stderr, flush=True)
            elapsed = time.monotonic() - begun
            if elapsed > told + 2:
                told = elapsed
                print(f"  {self.step} of {self.plan.steps}, {elapsed:.0f} s", file=sys.stderr, flush=True)
            if elapsed > limit_s:
                self.save()
                return False
        self.save()
        return True


# -------------------------------------------------------------------------------------------------------------- results


def write_model(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """The Hugging Face folder, weights in float16 by way of bfloat16; returns the model as it was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = model.to("cpu").to(torch.bfloat16).to(torch.float16)
    written.config.dtype = "float16"
    written.generation_config.do_sample = True
    written.generation_config.temperature, written.generation_config.top_p = 0.4, 0.95
    written.generation_config.repetition_penalty = 1.1  # a model this small goes round in circles without
    written.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors lets the owner alone read
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return written


@torch.inference_mode()
def sample(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, device: torch.device, tokens: int = 120) -> str:
    """What the model writes after a prompt, greedily."""
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
    settings = {"max_new_tokens": tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    out = model.to(device).float().generate(ids, **settings)
    return str(tokenizer.decode(out[0].tolist(), skip_special_tokens=True))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the model and training.json")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    parser.add_argument("--minutes", type=float, default=8.0, help="save and stop after so long")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    return parser.parse_args()


def main() -> int:
    options = parse()
    plan, device = Plan(steps=options.steps), torch.device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    random.seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    files = source_files(options.library)
    train = [(name, text) for name, text in files if not is_held_out(name)]
    outside = [(name, text) for name, text in files if is_held_out(name)]
    tokenizer = train_tokenizer([text for _, text in train], plan.vocabulary)
    texts = [text for _, text in train] + [piece for _, text in train for piece in definitions(text)]
    corpus, held_out = encode(tokenizer, texts), encode(tokenizer, [text for _, text in outside])
    model = build_model(plan, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(files)} files, {len(corpus.ids):,} ids, {parameters:,} parameters", file=sys.stderr, flush=True)
    training = Training(plan, model, device, options.output / "checkpoint.pt")
    if options.resume:
        training.resume()
    if not training.run(corpus, held_out, options.minutes * 60):
        print("Time is up: run again with --resume.", file=sys.stderr)
        return 3
    model.load_state_dict(training.best)
    loss = held_out_loss(model, held_out, plan, device)
    written = write_model(options.output, model, tokenizer)
    digest = hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in files).encode()).hexdigest()
    record = {
        "plan": asdict(plan),
        "parameters": parameters,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "files": [name for name, _ in files],
        "held_out_files": [name for name, _ in outside],
        "files_sha256": digest,
        "training_ids": len(corpus.ids),
        "held_out_ids": len(held_out.ids),
        "curve": training.curve,
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(loss),
        "samples": {prompt: sample(written, tokenizer, prompt, device) for prompt in PROMPTS},
    }
    (options.output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"held-out perplexity {math.exp(loss):.2f}; written to {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
