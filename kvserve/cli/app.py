"""The command line: typer commands that hand over to one module each, loaded when called."""

from pathlib import Path
from typing import Annotated

import typer

from kvserve.cli import flags
from kvserve.cli.failing import explained

app = typer.Typer(
    name="kvserve",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Serve a GGUF model with the longest context at the best KV precision that fits.",
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Serve a GGUF model with the longest context at the best KV precision that fits."""
    if version:
        from kvserve import __version__  # noqa: PLC0415 - slow to look up

        print(f"kvserve {__version__}")
        raise typer.Exit


@app.command()
@explained
@flags.takes_settings(*flags.SHARED, "vram_free")
def plan(
    *,
    config: flags.Config = None,
    as_json: flags.Json = False,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Let llama.cpp check the sizes; takes a second.")
    ] = False,
    **given: object,
) -> None:
    """Print what `start` would choose, every candidate with its price, and start nothing."""
    from kvserve.cli.planning import show_plan  # noqa: PLC0415

    show_plan(given, config, as_json=as_json, confirm=confirm)


@app.command()
@explained
@flags.takes_settings(
    *flags.SHARED,
    "max_ctx",
    "adapt",
    "below_floor",
    "reasoning_format",
    "shrink_after",
    "min_reload_interval",
    "host",
    "port",
    "threads",
    "api_key",
    "admin_key",
    "insecure",
    "batch",
    "ubatch",
    "queue_limit",
    "request_timeout",
    "drain_timeout",
    "pause_timeout",
    "carry_ram",
    "cache_ram",
    "load_timeout",
    "step_timeout",
    "log_level",
    "log_format",
)
def start(
    *,
    config: flags.Config = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when it serves, and go on in the background.")
    ] = False,
    tell_fd: Annotated[int | None, typer.Option("--tell-fd", hidden=True)] = None,
    **given: object,
) -> None:
    """Choose the KV cache, load the model, serve the OpenAI API."""
    from kvserve.cli.starting import StartOptions, start  # noqa: PLC0415

    start(given, StartOptions(config=config, detach=detach, tell_fd=tell_fd))


@app.command()
@explained
def status(
    *, port: flags.Port = None, state_dir: flags.StateDir = None, as_json: flags.Json = False
) -> None:
    """Show model, plan, memory predicted and measured, requests and past reloads."""
    from kvserve.cli.control import show_status  # noqa: PLC0415

    show_status(port, state_dir, as_json=as_json)


@app.command()
@explained
def reload(
    *,
    ctx: Annotated[str, typer.Option("--ctx", "-c", metavar="N|max", help="The new context.")],
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    as_json: flags.Json = False,
) -> None:
    """Plan for another context and change the worker where the plan differs."""
    from kvserve.cli.control import reload  # noqa: PLC0415

    reload(ctx, port, state_dir, as_json=as_json)


@app.command()
@explained
def stop(*, port: flags.Port = None, state_dir: flags.StateDir = None) -> None:
    """End the daemon and its worker."""
    from kvserve.cli.control import stop  # noqa: PLC0415

    stop(port, state_dir)


@app.command()
@explained
def logs(
    *,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    worker: Annotated[bool, typer.Option("--worker", help="llama.cpp's own messages.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
) -> None:
    """Print the end of the log."""
    from kvserve.cli.control import show_logs  # noqa: PLC0415

    show_logs(port, state_dir, worker=worker, follow=follow)


@app.command()
@explained
@flags.takes_settings(*flags.SHARED, "host", "port")
def doctor(
    *,
    config: flags.Config = None,
    probe: Annotated[
        bool, typer.Option("--probe-kernels", help="Load the model with each KV pair and time it.")
    ] = False,
    as_json: flags.Json = False,
    **given: object,
) -> None:
    """Look for what stands in the way, and say what to do; with --model, for that model too."""
    from kvserve.cli.doctoring import doctor  # noqa: PLC0415

    doctor(given, config, probe=probe, as_json=as_json)


@app.command()
@explained
def bench(
    *,
    url: Annotated[
        str | None, typer.Option("--url", help="A running OpenAI-compatible server, with /v1.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Start servers on this GGUF instead.")
    ] = None,
    versus: Annotated[
        list[str] | None,
        typer.Option("--versus", help="llama-server=PATH and its flags; may be repeated."),
    ] = None,
    streams: Annotated[str, typer.Option("--streams", help="Loads, by commas.")] = "1,4,8",
    requests: Annotated[int, typer.Option("--requests", help="Requests of each stream.")] = 2,
    prompt_words: Annotated[int, typer.Option("--prompt-words")] = 112,
    shared_words: Annotated[int, typer.Option("--shared-words", help="Common prefix.")] = 0,
    arriving_words: Annotated[
        int,
        typer.Option("--arriving-words", help="Gaps of the streams while such a prompt arrives."),
    ] = 0,
    max_tokens: Annotated[int, typer.Option("--max-tokens")] = 128,
    cache_type: Annotated[str, typer.Option("--cache-type", help="For all servers.")] = "f16",
    threads: Annotated[int | None, typer.Option("--threads")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Without the GPU.")] = False,
    svg: Annotated[Path | None, typer.Option("--svg", help="Write a plot here.")] = None,
    kv: Annotated[
        bool, typer.Option("--kv", help="Time each K-V pair instead, for `plan` and `start`.")
    ] = False,
    pairs: Annotated[str | None, typer.Option("--pairs", help="With --kv, by commas.")] = None,
    depths: Annotated[
        str | None, typer.Option("--depths", help="With --kv, tokens in the cache.")
    ] = None,
    as_json: flags.Json = False,
) -> None:
    """Measure throughput and latency under load, beside llama-server where asked."""
    if kv:
        from kvserve.cli.timing import KvBenchOptions, bench_kv  # noqa: PLC0415

        bench_kv(KvBenchOptions(model, pairs, depths, threads, cpu, as_json))
        return
    from kvserve.cli.benching import BenchOptions, bench, parse_streams  # noqa: PLC0415

    bench(
        BenchOptions(
            url=url,
            model=model,
            versus=tuple(versus or ()),
            streams=parse_streams(streams),
            requests=requests,
            prompt_words=prompt_words,
            shared_words=shared_words,
            max_tokens=max_tokens,
            cache_type=cache_type,
            threads=threads,
            cpu=cpu,
            svg=svg,
            as_json=as_json,
            arriving_words=arriving_words,
        )
    )


service = typer.Typer(help="Start with the machine, by systemd.", no_args_is_help=True)
app.add_typer(service, name="service")
User = Annotated[bool, typer.Option("--user", help="For your own session, without root.")]


@service.command()
@explained
def install(
    *,
    config: flags.Config = None,
    user: User = False,
    show: Annotated[bool, typer.Option("--show", help="Print the unit, write nothing.")] = False,
) -> None:
    """Write a unit that starts the daemon with the settings of --config."""
    from kvserve.cli.services import install  # noqa: PLC0415

    install(config, user=user, show=show)


@service.command()
@explained
def uninstall(*, user: User = False) -> None:
    """End the service and take its unit away."""
    from kvserve.cli.services import uninstall  # noqa: PLC0415

    uninstall(user=user)


@app.command(name="eval")
@explained
@flags.takes_settings(*flags.MEASURING)
def evaluate(
    *,
    config: flags.Config = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes on two cores.")] = False,
    full: Annotated[bool, typer.Option("--full", help="8K and 32K, all pairs, hours.")] = False,
    pairs: Annotated[
        str | None, typer.Option("--pairs", help="`all`, or K:V pairs by commas.")
    ] = None,
    ctx: Annotated[str | None, typer.Option("--ctx", "-c", help="Depths by commas.")] = None,
    chunks: Annotated[int | None, typer.Option("--chunks", help="Pieces of text.")] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="`all`, `none`, or names by commas.")
    ] = None,
    form: Annotated[
        str, typer.Option("--form", help="Of the tasks: auto, completion or chat.")
    ] = "auto",
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="UTF-8 text to read; a novel otherwise.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report here.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the pieces and the tasks.")] = 0,
    as_json: flags.Json = False,
    **given: object,
) -> None:
    """Measure what each K-V pair costs this model, and keep it for `plan` and `start`."""
    from kvserve.cli.evaluating import EvalOptions, evaluate  # noqa: PLC0415

    options = EvalOptions(
        quick=quick,
        full=full,
        pairs=pairs,
        ctx=ctx,
        chunks=chunks,
        tasks=tasks,
        form=form,
        corpus=corpus,
        html=html,
        seed=seed,
        as_json=as_json,
    )
    evaluate(given, config, options)


def main() -> None:
    """The console script."""
    app()
