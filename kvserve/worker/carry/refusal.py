"""Why a sequence cannot be carried. The answer to each is the same: prefill it again."""

from enum import StrEnum


class Reason(StrEnum):
    """A label for status and metrics."""

    MEMORY_CLASS = "memory_class"
    """llama.cpp keeps this model's memory in a form that is not known here."""
    EMPTY = "empty"
    """The sequence holds no tokens."""
    EXPORT = "export"
    """llama.cpp did not write the state."""
    MALFORMED = "malformed"
    """The bytes are not a state of the layout that was announced."""
    LAYOUT = "layout"
    """The state and the cache that should take it differ in more than the types."""
    IDENTITY = "identity"
    """The state was written by another model, another build, or for other positions."""
    IMPORT = "import"
    """llama.cpp did not take the state: no free cells, or other sizes than its own."""
    CANARY = "canary"
    """The model says something else after the import."""


class CannotCarry(Exception):
    """A sequence must be prefilled again; `message` is one line."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
