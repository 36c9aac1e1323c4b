"""All rules in the order in which their findings are told."""

from collections.abc import Callable, Iterable

from kvserve.doctor import gpu_rules, kernel_rules, library_rules, model_rules, system_rules
from kvserve.doctor.facts import Facts
from kvserve.doctor.findings import Finding

RULES: tuple[Callable[[Facts], Iterable[Finding]], ...] = (
    gpu_rules.driver,
    gpu_rules.free_memory,
    library_rules.library,
    gpu_rules.cuda_build,
    gpu_rules.kv_pairs,
    library_rules.processor,
    model_rules.model,
    kernel_rules.kernels,
    system_rules.memory,
    system_rules.port,
    system_rules.kernel,
    system_rules.settings,
)


def diagnose(facts: Facts) -> tuple[Finding, ...]:
    """Everything there is to say about a machine. Raises nothing."""
    return tuple(finding for rule in RULES for finding in rule(facts))
