"""Text that can leave this process."""

from kvserve.errors import InvalidRequest


def encodable(text: str, where: str) -> str:
    """The text itself. JSON can spell half a surrogate pair, which is no text.

    Raises InvalidRequest, about the field `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("the text is not valid Unicode", param=where) from None
    return text
