"""The daemon's JSON documents as text for a terminal."""

import time
from typing import Any

from kvserve.units import format_bytes

Document = dict[str, Any]
_RELOADS_SHOWN = 5


def status_text(document: Document, url: str) -> str:
    """Model, plan, memory predicted and measured, state, requests and past reloads."""
    lines = [f"state    {document['phase']} at {url}, pid of the worker {document['worker_pid']}"]
    if document["error"]:
        lines.append(f"error    {document['error']}")
    plan = document["plan"]
    if plan:
        chosen = plan["chosen"]
        lines.append(f"model    {document['model_id']}, engine {document['engine']}")
        pair = f"{chosen['cache_type_k']}:{chosen['cache_type_v']}"
        layers = chosen["n_gpu_layers"]
        where = f"{layers} layers on the GPU" if layers else "on the CPU"
        lines.append(f"plan     KV cache {pair} at {chosen['n_ctx']} tokens, {where}")
        lines += _memory_lines(document["memory"])
    if document["chat_template"]:
        lines.append(f"template {document['chat_template']}")
    requests = document["requests"]
    lines.append("requests " + ", ".join(f"{n} {kind}" for kind, n in requests.items()))
    lines.append(f"cache    {document['kv_cells_used']} cells in use")
    speculation = document["speculation"]
    if speculation["method"]:
        lines.append(f"drafts   {_drafts(speculation)}")
    lines.append(
        f"up       {_duration(document['uptime_seconds'])}, "
        f"{document['worker_deaths']} worker deaths"
    )
    reloads = document["reloads"][-_RELOADS_SHOWN:]
    lines += [f"reload   {_reload_line(record)}" for record in reversed(reloads)]
    return "\n".join(lines)


def reload_text(document: Document) -> str:
    """The outcome of a change of context."""
    chosen = document["plan"]["chosen"]
    pair = f"{chosen['cache_type_k']}:{chosen['cache_type_v']}"
    if not document["changed"]:
        return f"unchanged: KV cache {pair} at {chosen['n_ctx']} tokens already"
    return (
        f"reloaded in {document['seconds']:.1f} s: KV cache {pair} at {chosen['n_ctx']} tokens, "
        f"{format_bytes(chosen['memory']['total_bytes'])}"
    )


def _drafts(speculation: Document) -> str:
    n_drafted = speculation["draft_tokens"]
    if not n_drafted:
        return str(speculation["method"])
    n_accepted = speculation["accepted_tokens"]
    share = 100 * n_accepted / n_drafted
    return f"{speculation['method']}, {n_accepted} of {n_drafted} accepted ({share:.0f} %)"


def _memory_lines(memory: Document | None) -> list[str]:
    if not memory:
        return []
    predicted = memory["device_bytes"]["predicted"]
    measured = memory["device_bytes"]["measured"]
    line = f"memory   predicted {format_bytes(predicted)}"
    if measured is not None:
        line += f", measured {format_bytes(measured)} ({100 * (measured / predicted - 1):+.1f} %)"
    return [line]


def _reload_line(record: Document) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(record["started_at"]))
    before = ""
    if record["from_cache_type"]:
        before = f"{record['from_cache_type']} at {record['from_n_ctx']} -> "
    detail = f" ({record['detail']})" if record["detail"] else ""
    if record["pause_seconds"] is not None:
        detail += f", paused {record['pause_seconds']:.2f} s"
        detail += " (both workers fitted)" if record["overlapped"] else ""
    carry = record["carry"]
    if carry and (carry["n_sequences"] or carry["refused"]):
        detail += f", {carry['n_sequences']} sequences of {carry['n_tokens']} tokens carried"
        detail += f", {len(carry['refused'])} to prefill again" if carry["refused"] else ""
    return (
        f"{when} {record['reason']}: {before}{record['to_cache_type']} at {record['to_n_ctx']}, "
        f"{record['outcome']} in {record['seconds']:.1f} s{detail}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}m {rest}s" if hours else f"{minutes}m {rest}s"
