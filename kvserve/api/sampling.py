"""The fields of a request that say how tokens are drawn."""

from typing import Any

from kvserve.api.schemas import INT32_MAX, GenerationRequest
from kvserve.api.unicode import encodable
from kvserve.errors import InvalidRequest
from kvserve.ipc.messages import Sampling

_SAMPLING = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "presence_penalty",
    "frequency_penalty",
    "repeat_last_n",
    "xtc_probability",
    "xtc_threshold",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
)
_SHORTENING = ("top_k", "top_p", "min_p", "typical_p", "xtc_probability")
"""What Mirostat takes the place of."""


def read_sampling(body: GenerationRequest) -> Sampling:
    """What the worker is told; what is not given keeps its default. Raises InvalidRequest."""
    values: dict[str, Any] = {name: getattr(body, name) for name in _SAMPLING}
    values["repeat_penalty"] = (
        body.repetition_penalty if body.repeat_penalty is None else body.repeat_penalty
    )
    _check_mirostat(body)
    if body.dry_sequence_breakers is not None:
        values["dry_sequence_breakers"] = tuple(
            encodable(text, f"dry_sequence_breakers[{index}]")
            for index, text in enumerate(body.dry_sequence_breakers)
        )
    if body.top_k is not None:
        values["top_k"] = max(0, body.top_k)
    if body.seed is not None:
        # llama.cpp seeds with 32 bits; -1 becomes its LLAMA_DEFAULT_SEED, a random one.
        values["seed"] = body.seed % 2**32
    if body.logit_bias:
        values["logit_bias"] = {_token_id(k): v for k, v in body.logit_bias.items()}
    return Sampling(**{name: value for name, value in values.items() if value is not None})


def _check_mirostat(body: GenerationRequest) -> None:
    if not body.mirostat:
        return
    for name in _SHORTENING:
        if getattr(body, name) is not None:
            raise InvalidRequest(
                f"mirostat takes the place of {name}: leave one of the two out", param=name
            )
    if body.temperature == 0:
        raise InvalidRequest(
            "mirostat draws at random: set a temperature above 0, or leave mirostat out",
            param="mirostat",
        )


def _token_id(key: str) -> int:
    if key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) <= INT32_MAX:
        return int(key)
    raise InvalidRequest("the keys of logit_bias are token ids in decimal", param="logit_bias")
