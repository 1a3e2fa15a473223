"""One export from the trained network to its place on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bce3s.export.card import model_card
from bce3s.export.formats import Format, GraphOptions, Opened
from bce3s.export.parity import Parity, compare, parity_images
from bce3s.export.place import card_of, put_in_place, staged
from bce3s.export.plain import Export
from pipelines.types import UserError


@dataclass(frozen=True, kw_only=True)
class Written:
    """What became of an export.

    Args:
        out: its file or folder; as it was before where the parity does not hold.
        card: its model card.
        num_bytes: of all its files but the card.
        parity: None where it was not checked.
    """

    out: Path
    card: Path
    num_bytes: int
    parity: Parity | None

    @property
    def is_there(self) -> bool:
        """Whether it was put in place."""
        return self.parity is None or self.parity.holds


def write_checked(export: Export, chosen: Format, options: GraphOptions, out: Path, *, shards: str | None, check: bool) -> Written:
    """Writes an export, reads it back from disk, and puts it in place with its model card if it computes what it should.

    Args:
        export: what to write; its trained network must have the same weights while this runs.
        chosen: the format.
        options: of the graph.
        out: file or folder.
        shards: to check on; None is what the run was trained on.
        check: compare at all.

    Raises:
        ConfigError: the format cannot express the network.
        UserError: the disk is full, the folder cannot be written to, or `shards` are not those of the run.
    """
    files = chosen.encode(export, options)
    images = parity_images(export, shards) if check else None
    with staged(out, files) as path:
        parity = None
        if images is not None:
            parity = compare(export, _opened(path, export, chosen), images, takes_pixels=options.preprocess)
        card = card_of(out, chosen.suffix)
        written = Written(out=out, card=card, num_bytes=sum(map(len, files.values())), parity=parity)
        if written.is_there:
            put_in_place(path, out, model_card(export, options, chosen, out.name, parity), chosen.suffix)
    return written


def _opened(path: Path, export: Export, chosen: Format) -> Opened:
    try:
        return chosen.open(path, export)
    except UserError:
        raise
    except Exception as error:  # a runtime that is older than the operators it is given, say
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{path.name} cannot be read back and was not put in place ({type(error).__name__}: {reason})") from error
