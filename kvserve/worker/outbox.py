"""What the engine sends. A step's answers go out while the GPU computes the next step."""

from kvserve.ipc.channel import WorkerChannel
from kvserve.ipc.messages import FromWorker, Step


class Outbox:
    """Sends over `channel`, in order; where the device computes asynchronously (`holds`), a step
    stays here until the next `flush`."""

    def __init__(self, channel: WorkerChannel, *, holds: bool) -> None:
        self._channel = channel
        self._holds = holds
        self._held: Step | None = None

    def send(self, message: FromWorker) -> None:
        """Send a message at once, after what is held."""
        self.flush()
        self._channel.send(message)

    def send_step(self, step: Step) -> None:
        """Send a step's answers, at once or with the next `flush`."""
        self.flush()
        self._held = step
        if not self._holds:
            self.flush()

    def flush(self) -> None:
        """Send what is held."""
        if self._held is not None:
            step, self._held = self._held, None
            self._channel.send(step)
