"""What the docs say of the code is what the code says."""

from pathlib import Path

from kvserve.core.lifecycle import diagram

DOCS = Path(__file__).parent.parent / "docs"


def test_the_diagram_is_drawn_from_the_table() -> None:
    assert f"```mermaid\n{diagram()}\n```" in (DOCS / "architecture.md").read_text()
