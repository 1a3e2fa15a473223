"""A row of the examination: what was looked at, what was found, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

OK, ADVICE, MISSING = "ok", "advice", "missing"
SECTIONS = {"software": "software", "gpu": "GPU", "extras": "optional extras", "machine": "machine"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finding.

    Args:
        section: a key of `SECTIONS`.
        name: what was looked at.
        status: "ok"; "advice": it works, and could be better; "missing": it is not there, or does not work.
        value: what was found, for people.
        remedy: what to do: a line to paste where there is one.
        needed: whether training needs it.
        figures: the same for programs; units are in the names.
    """

    section: str
    name: str
    status: str
    value: str
    remedy: str = ""
    needed: bool = False
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.section in SECTIONS
        assert self.status in (OK, ADVICE, MISSING)

    @property
    def blocks(self) -> bool:
        """Whether nothing can be trained because of it."""
        return self.needed and self.status == MISSING

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
