"""Greedy answers of many requests at a time against those of each alone, as a Markdown table.

All prompts are sent at once to a worker with few cells: it batches them, shares their beginnings
and preempts some. Then each is sent alone, sharing nothing. Where two answers part, the difference
is how much likelier the lone request found its own token than the other one: whether rounding can
have decided.

Exits with 1 where answers part at a difference above the tolerance.
"""

import argparse
import pydoc_data.topics
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gguf_dequantize import dequantize

from kvserve.ipc.messages import Load, Loaded, Prompt, Shutdown, TextPrompt, TokenPrompt
from tests.models import write_model
from tests.worker.conftest import Answer, Peer, Workers

TOLERANCE = 0.01
KINDS = ("llama", "gemma3", "qwen35", "mamba2")
N_SLOTS = 8
_N_LIKELIEST = 8
_FEWEST_REAL = 1_000
"""Vocabularies of fewer tokens are made of bytes, others of words."""
HEADER = (
    "| model | answers | tokens | cached tokens | decoded again after preemption "
    "| answers that part | largest difference of the two tokens there |\n"
    "|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Outcome:
    """How the answers of one model compare. `gaps` are the differences where answers part."""

    n_answers: int
    n_tokens: int
    n_cached: int
    n_again: int
    gaps: list[float]

    def row(self, name: str) -> str:
        worst = f"{max(self.gaps):.4f}" if self.gaps else "–"
        return (
            f"| {name} | {self.n_answers} | {self.n_tokens:,} | {self.n_cached:,} "
            f"| {self.n_again:,} | {len(self.gaps)} | {worst} |"
        )


def main() -> int:
    arguments = read_arguments()
    with tempfile.TemporaryDirectory() as folder:
        models = {arguments.model: arguments.model} if arguments.model else {}
        if arguments.model and arguments.weights:
            name = f"{Path(arguments.model).stem}, {arguments.weights} weights"
            whole = Path(folder) / "whole.gguf"
            models = {name: str(dequantize(Path(arguments.model), whole, arguments.weights))}
        for kind in () if arguments.model else arguments.kinds.split(","):
            path = Path(folder) / f"{kind}.gguf"
            write_model(path, kind, n_layer=4, window=64, seed=3)
            models[f"{kind}, generated, F16"] = str(path)
        print(HEADER, flush=True)
        outcomes = []
        for name, path in models.items():
            workers = Workers(Path(folder) / "worker.log")
            try:
                outcome = compare(workers.start(), path, arguments)
            finally:
                workers.end_all()
            print(outcome.row(Path(name).name), flush=True)
            outcomes.append(outcome)
    gaps = [gap for outcome in outcomes for gap in outcome.gaps]
    return int(max(gaps, default=0.0) > arguments.tolerance)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a GGUF file; generated models where it is left out")
    parser.add_argument("--weights", choices=("F16", "F32"), help="dequantize the model first")
    parser.add_argument("--cache-type", default="f16", help="of K and V")
    parser.add_argument("--no-repack", action="store_true", help="without repacked CPU weights")
    parser.add_argument("--no-flash-attn", action="store_true")
    parser.add_argument("--ubatch", type=int, default=256, help="tokens of a micro-batch")
    parser.add_argument("--slots", type=int, default=N_SLOTS, help="places, all of one batch")
    parser.add_argument(
        "--text", action="store_true", help="prompts of real text, no random tokens"
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="of generated models")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--ctx", type=int, default=1024, help="cells for all of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    return parser.parse_args()


def compare(worker: Peer, path: str, arguments: argparse.Namespace) -> Outcome:
    load = Load(
        model_path=path, type_k=arguments.cache_type, type_v=arguments.cache_type,
        n_ctx=arguments.ctx, n_seq_max=arguments.slots, n_batch=256, n_ubatch=arguments.ubatch,
        n_gpu_layers=0, n_cpu_moe=0, flash_attn=not arguments.no_flash_attn,
        n_threads=arguments.threads, n_threads_batch=arguments.threads,
        extra_buffers=not arguments.no_repack,
    )  # fmt: skip
    loaded = worker.load(load)
    assert isinstance(loaded, Loaded), loaded
    make = text_prompts if arguments.text else token_prompts
    prompts = make(arguments.prompts, arguments.ctx // 4, loaded.n_vocab)

    def ask(prompt: Prompt, salt: str) -> int:
        return worker.ask(
            prompt,
            max_tokens=arguments.tokens,
            ignore_eos=True,
            n_logprobs=_N_LIKELIEST,
            cache_salt=salt,
        )

    together = worker.finish(*[ask(prompt, "") for prompt in prompts])
    n_prefilled = sum(step.n_prefilled for step in worker.steps)
    n_cached = sum(answer.end.n_cached_tokens for answer in together)
    n_again = n_prefilled - (sum(answer.n_prompt or 0 for answer in together) - n_cached)
    gaps = []
    for n, (prompt, answer) in enumerate(zip(prompts, together, strict=True)):
        alone = worker.finish(ask(prompt, f"alone {n}"))[0]
        assert alone.end.n_cached_tokens == 0
        gaps += gap_where_they_part(answer, alone)
    worker.send(Shutdown())
    n_tokens = sum(len(answer.tokens) for answer in together)
    return Outcome(len(together), n_tokens, n_cached, n_again, gaps)


def token_prompts(n: int, longest: int, n_vocab: int) -> list[Prompt]:
    """Random tokens; half of them begin like another one, of any length up to `longest`."""
    chance = random.Random(7)
    ids = range(5, min(n_vocab, 20_000))
    prompts: list[list[int]] = []
    for _ in range(n):
        older = chance.choice(prompts) if prompts and chance.random() < 0.5 else []
        base = older[: chance.randint(0, len(older))]
        prompts.append((base + chance.choices(ids, k=chance.randint(8, longest // 2)))[:longest])
    return [TokenPrompt(tuple(prompt)) for prompt in prompts]


def text_prompts(n: int, longest: int, n_vocab: int) -> list[Prompt]:
    """Python's own documentation from random places on, half of them beginning at the same ones;
    about `longest` tokens at most."""
    chance = random.Random(7)
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    n_characters = longest * (3 if n_vocab > _FEWEST_REAL else 1)
    prompts: list[Prompt] = []
    starts: list[int] = []
    for _ in range(n):
        again = starts and chance.random() < 0.5
        start = chance.choice(starts) if again else chance.randrange(len(text) - n_characters)
        starts.append(start)
        prompts.append(TextPrompt(text[start : start + chance.randint(30, n_characters)]))
    return prompts


def gap_where_they_part(answer: Answer, alone: Answer) -> list[float]:
    """How much likelier the lone answer's token is than the other's, in log probability; of a token
    that is not among the likeliest at least so much. An end token that may not be drawn is no rival
    of theirs, however likely."""
    for mine, theirs in zip(answer.tokens, alone.logprobs, strict=True):
        if mine != theirs.drawn.token:
            of = {one.token: one.logprob for one in theirs.top}
            return [theirs.drawn.logprob - of.get(mine, theirs.top[-1].logprob)]
    return []


if __name__ == "__main__":
    sys.exit(main())
