"""Memory and its limits, the port, the state directory, the kernel."""

from collections.abc import Iterator

from kvserve.doctor.facts import Facts
from kvserve.doctor.findings import Finding, note, ok, problem
from kvserve.units import format_bytes

_LEAST_FILES = 512


def memory(facts: Facts) -> Iterator[Finding]:
    """The host's memory within its control groups."""
    host = facts.host
    what = (
        f"{format_bytes(host.free_bytes)} free of {format_bytes(host.total_bytes)}, "
        f"{host.n_cores} cores"
    )
    if host.limited_by_cgroup:
        yield note(
            "memory",
            f"{what}: a control group limits {format_bytes(facts.n_host_bytes)} to that",
            "the kernel ends the worker that goes over it; kvserve plans within it",
            "raise the limit (docker run --memory, MemoryMax= of a unit) if the model needs more",
        )
    else:
        yield ok("memory", what)
    cpus = facts.limits.cpus
    if cpus is not None:
        yield note(
            "processors",
            f"a control group allows {cpus:g} CPUs",
            "more threads than that are throttled all together; `threads = auto` stays within it",
            "raise the quota (docker run --cpus, CPUQuota= of a unit) for more speed on the CPU",
        )


def port(facts: Facts) -> Iterator[Finding]:
    """Whether the port can be had."""
    place = f"port {facts.port.number} on {facts.port.host}"
    if facts.port.error is None:
        yield ok("port", f"{place} is free")
    elif facts.port.owner is not None:
        yield note(
            "port",
            f"{place} is taken by a kvserve that serves {facts.port.owner}",
            "a second one needs a port of its own",
            f"`kvserve stop --port {facts.port.number}`, or another --port",
        )
    else:
        yield problem(
            "port",
            f"{place} cannot be had: {facts.port.error}",
            "`kvserve start` would end at once",
            "--port with another number, or end the program that has it",
        )


def kernel(facts: Facts) -> Iterator[Finding]:
    """Memory files and open files."""
    if facts.kernel.memfd_error is not None:
        yield problem(
            "memory files",
            f"memfd_create fails: {facts.kernel.memfd_error}",
            "running requests cannot be carried over a reload, and are computed again",
            "allow memfd_create in the container's seccomp profile",
        )
    else:
        yield ok("memory files", "memfd_create works; they count as this control group's memory")
    if facts.kernel.n_open_files < _LEAST_FILES:
        yield note(
            "open files",
            f"at most {facts.kernel.n_open_files} open files",
            "each client and each carried sequence takes one",
            "ulimit -n 4096, or LimitNOFILE= of a unit",
        )


def settings(facts: Facts) -> Iterator[Finding]:
    """The state directory, the address, variables that mean nothing."""
    if facts.state_dir_error is not None:
        yield problem(
            "state directory",
            facts.state_dir_error,
            "the log, and what `kvserve status` needs, lie there",
            "--state-dir or KVSERVE_STATE_DIR with a directory of your own",
        )
    if facts.exposure_error is not None:
        yield problem(
            "address",
            facts.exposure_error,
            "anybody on the network could use the model",
            "set KVSERVE_API_KEY",
        )
    for text in facts.unknown_variables:
        yield note("settings", text, "it has no effect", "correct the name, or unset it")
