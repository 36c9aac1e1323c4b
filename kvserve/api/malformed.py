"""What is no HTTP gets the JSON form of an error too, where uvicorn answers it in plain text."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol


class JsonErrorProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol with kvserve's answer to a request that cannot be read."""

    transport: asyncio.Transport

    def send_400_response(self, msg: str) -> None:
        """Answer and hang up; `msg` is uvicorn's."""
        body = json.dumps(_error(msg), separators=(",", ":")).encode("ascii")
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()


def _error(problem: str) -> dict[str, Any]:
    message = f"this is not HTTP that the server can read: {problem}"
    fields = {"type": "invalid_request_error", "param": None, "code": "invalid_request"}
    return {"error": {"message": message, **fields}}
