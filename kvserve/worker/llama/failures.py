"""What llama.cpp can refuse."""


class LoadError(Exception):
    """llama.cpp refused the model or the context; `message` is one line."""

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.out_of_memory = out_of_memory


class CacheFull(Exception):
    """The KV cache has no room for a batch; it is as it was before the call."""


class DecodeError(Exception):
    """A decode failed; the sequences of its batch must be cleared."""
