"""Tars are read in place: nested, in threads and processes, within bounds; what is damaged or forged is one sentence."""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from pipelines.datasets.archives import index_tar, is_gzip, stream_tar
from pipelines.types import DatasetError, Split
from tests.pipelines.datasets.published import jpeg, member, until_error, write_files_tar, write_tar

FILES = {f"n{number % 3}/{number}.JPEG": jpeg(number) for number in range(12)}


def _nested(path: Path, files: dict[str, bytes] = FILES) -> Path:
    """A tar of class tars, as ImageNet's train archive is."""
    members = []
    for name in sorted({name.split("/")[0] for name in files}):
        inner = {file.split("/")[1]: content for file, content in files.items() if file.startswith(f"{name}/")}
        members.append(member(f"{name}.tar", write_files_tar(path.parent / "inner.tar", inner).read_bytes()))
    return write_tar(path, members)


def _split(archive: Path, wanted: list[str]) -> Split:
    found = index_tar(archive, wanted)
    assert (found.offsets_N >= 0).all()
    return found.split(np.arange(len(wanted)), np.arange(len(wanted)))


@pytest.mark.parametrize("write", [_nested, lambda path: write_files_tar(path, FILES)])
def test_members_are_read_in_place_in_any_order(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    archive = write(tmp_path / "a.tar")
    wanted = sorted(FILES, reverse=True)
    split = _split(archive, wanted)
    assert [split.read(row).encoded for row in range(len(wanted))] == [FILES[name] for name in wanted]
    name, place = split.sources[0].removesuffix(")").split(" (at byte ")
    assert name == f"{archive}!{wanted[0]}"
    assert archive.read_bytes()[int(place) :].startswith(FILES[wanted[0]])
    assert split.read(3).extension == "jpg"
    assert split.labels_N.dtype == np.int64


def _digest(split: Split) -> list[bytes]:
    return [split.read(row % len(split.labels_N)).encoded for row in range(200)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_reads_from_threads_and_forked_processes_do_not_disturb_each_other(tmp_path: Path) -> None:
    split = _split(_nested(tmp_path / "a.tar"), list(FILES))
    alone = _digest(split)
    with ThreadPoolExecutor(8) as pool:
        assert all(found == alone for found in pool.map(lambda _: _digest(split), range(16)))
    context = get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=lambda: queue.put(_digest(split))) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=30) for _ in workers] == [alone] * 3
    for worker in workers:
        worker.join()


def test_names_may_begin_with_a_dot_and_the_first_of_two_members_counts(tmp_path: Path) -> None:
    members = [member("./n0/0.JPEG", b"first"), member("n0/0.JPEG", b"second"), member("n0", kind=tarfile.DIRTYPE)]
    assert _split(write_tar(tmp_path / "a.tar", members), ["n0/0.JPEG"]).read(0).encoded == b"first"
    compressed = write_tar(tmp_path / "a.tar.gz", members, "w:gz")
    assert list(stream_tar(compressed, ["n0/0.JPEG"])) == [(0, b"first")]


def test_long_names_are_found(tmp_path: Path) -> None:
    name = "/".join(["n" * 90] * 3) + ".JPEG"
    assert _split(write_files_tar(tmp_path / "a.tar", {name: b"x"}), [name]).read(0).encoded == b"x"


def test_names_that_are_not_utf8_are_read_and_can_be_printed(tmp_path: Path) -> None:
    name = os.fsdecode(b"n0/caf\xe9.JPEG")
    header, content = member(name, b"x")
    with tarfile.open(tmp_path / "a.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        tar.addfile(header, io.BytesIO(content))
    split = _split(tmp_path / "a.tar", [name])
    assert split.read(0).encoded == b"x"
    split.sources[0].encode("utf-8")
    assert r"n0/caf\udce9.JPEG (at byte" in split.sources[0]


def test_what_is_not_there_has_no_offset(tmp_path: Path) -> None:
    found = index_tar(_nested(tmp_path / "a.tar"), ["n0/0.JPEG", "n0/none.JPEG", "n9/0.JPEG"])
    assert (found.offsets_N < 0).tolist() == [False, True, True]


FORGED = {
    "symbolic link": (member("n0/0.JPEG", kind=tarfile.SYMTYPE, link="/etc/passwd"), "as a link or device"),
    "hard link": (member("n0/0.JPEG", kind=tarfile.LNKTYPE, link="n0/1.JPEG"), "as a link or device"),
    "device": (member("n0/0.JPEG", kind=tarfile.CHRTYPE), "as a link or device"),
    "absolute": (member("/n0/0.JPEG", b"x"), "'/n0/0.JPEG', a name that leaves the archive"),
    "upwards": (member("n0/../../n0/0.JPEG", b"x"), "'n0/../../n0/0.JPEG', a name that leaves the archive"),
    "backslash": (member("n0\\0.JPEG", b"x"), r"a name that leaves the archive"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_forged_members_are_refused_where_they_are_asked_for(tmp_path: Path, forgery: str) -> None:
    forged, sentence = FORGED[forgery]
    plain = write_tar(tmp_path / "a.tar", [member("n0/1.JPEG", b"y"), forged])
    compressed = write_tar(tmp_path / "a.tar.gz", [member("n0/1.JPEG", b"y"), forged], "w:gz")
    with pytest.raises(DatasetError) as error:
        index_tar(plain, ["n0/0.JPEG"])
    assert str(error.value).startswith(f"{plain} holds ")
    assert sentence in str(error.value)
    with pytest.raises(DatasetError) as error:
        list(stream_tar(compressed, ["n0/0.JPEG"]))
    assert sentence in str(error.value)
    assert _split(plain, ["n0/1.JPEG"]).read(0).encoded == b"y"
    assert list(stream_tar(compressed, ["n0/1.JPEG"])) == [(0, b"y")]


@pytest.mark.parametrize("forged", [member("../n0.tar", b"x" * 512), member("n0.tar", kind=tarfile.SYMTYPE, link="/etc/passwd")])
def test_a_forged_class_tar_is_refused(tmp_path: Path, forged: tuple[tarfile.TarInfo, bytes]) -> None:
    archive = write_tar(tmp_path / "a.tar", [forged])
    with pytest.raises(DatasetError, match=r"leaves the archive|as a link or device"):
        index_tar(archive, ["n0/0.JPEG"])


def test_a_size_below_zero_does_not_read_for_ever(tmp_path: Path) -> None:
    header = tarfile.TarInfo("n0/0.JPEG")
    header.size = -1536
    block = header.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(block * 4 + bytes(1024))
    with pytest.raises(DatasetError, match="is cut short or damaged after byte 0 of 3,072"):
        index_tar(tmp_path / "a.tar", ["n0/1.JPEG"])


def _last_header(archive: Path) -> int:
    with tarfile.open(archive) as tar:
        return tar.getmembers()[-1].offset


CUTS: dict[str, Callable[[Path], int]] = {
    "in an image": lambda archive: _last_header(archive) + 600,
    "in a header": lambda archive: _last_header(archive) + 100,
    "between members": _last_header,
    "before the first": lambda archive: 0,
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("write", [_nested, lambda path: write_files_tar(path, FILES)])
def test_a_tar_cut_anywhere_is_named_with_how_far_it_goes(tmp_path: Path, cut: str, write: Callable[[Path], Path]) -> None:
    archive = write(tmp_path / "a.tar")
    size = CUTS[cut](archive)
    os.truncate(archive, size)
    with pytest.raises(DatasetError, match=rf"a\.tar is cut short or damaged after byte [\d,]+ of {size:,} \(.*\): fetch it again"):
        index_tar(archive, list(FILES))


def test_a_class_tar_cut_before_it_was_packed_is_found(tmp_path: Path) -> None:
    inner = write_files_tar(tmp_path / "inner.tar", {"0.JPEG": b"x" * 600, "1.JPEG": b"y" * 600}).read_bytes()
    for size in (1000, 1536, 1600):
        archive = write_tar(tmp_path / "a.tar", [member("n0.tar", inner[:size]), member("n1.tar", inner)])
        with pytest.raises(DatasetError, match="is cut short or damaged"):
            index_tar(archive, ["n0/0.JPEG", "n1/0.JPEG"])


def test_damage_in_a_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    archive = write_files_tar(tmp_path / "a.tar", FILES)
    content = bytearray(archive.read_bytes())
    content[_last_header(archive) + 150] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(DatasetError, match="is cut short or damaged"):
        index_tar(archive, list(FILES))


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, bytes(range(256)) * 8])
def test_what_is_no_tar_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DatasetError, match="cut short or damaged after byte 0"):
        index_tar(tmp_path / "a.tar", ["x"])


def test_an_archive_that_shrank_or_went_away_is_named(tmp_path: Path) -> None:
    archive = write_files_tar(tmp_path / "a.tar", FILES)
    split = _split(archive, list(FILES))
    os.truncate(archive, 700)
    with pytest.raises(DatasetError, match=r"cannot read .*a\.tar!n2/11\.JPEG \(at byte \d+\) \(the archive has become shorter\)"):
        split.read(11)
    archive.unlink()
    with pytest.raises(DatasetError, match=r"cannot read .*a\.tar!n0/0\.JPEG \(at byte 512\) \(No such file"):
        split.read(0)
    with pytest.raises(DatasetError, match=r"cannot read .*a\.tar \(No such file"):
        index_tar(archive, list(FILES))
    assert "a.tar (No such file" in until_error(stream_tar(archive, list(FILES)))[1]


def test_a_stream_gives_members_in_the_archives_order(tmp_path: Path) -> None:
    archive = write_files_tar(tmp_path / "a.tar.gz", FILES, "w:gz")
    assert is_gzip(archive)
    wanted = sorted(FILES, reverse=True)[:9]
    found = list(stream_tar(archive, wanted))
    assert [wanted[row] for row, _ in found] == [name for name in FILES if name in wanted]
    assert all(content == FILES[wanted[row]] for row, content in found)


def test_a_cut_or_damaged_stream_gives_what_came_before_and_says_how_far_it_got(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 50_000), np.uint8)
    files = {f"{number}.JPEG": noise[number].tobytes() for number in range(20)}
    archive = write_files_tar(tmp_path / "a.tar.gz", files, "w:gz")
    whole = archive.read_bytes()
    sentence = r"a\.tar\.gz is cut short or damaged after ([\d]+) of 20 images \(.+\): fetch it again; the images already converted stay"
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 2000] = bytes(2000)
    wrong_sum = whole[:-8] + bytes(4) + whole[-4:]
    for content, at_least in ((whole[: len(whole) // 2], 5), (bytes(damaged), 5), (wrong_sum, 18), (whole[:-6], 18), (whole[:3], 0)):
        archive.write_bytes(content)
        came, error = until_error(stream_tar(archive, list(files)))
        assert re.search(sentence, error)
        assert f"after {len(came)} of" in error
        assert len(came) >= at_least


def test_a_tar_cut_before_it_was_compressed_lacks_images(tmp_path: Path) -> None:
    whole = write_files_tar(tmp_path / "a.tar", FILES)
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(gzip.compress(whole.read_bytes()[: _last_header(whole)]))
    with pytest.raises(DatasetError, match=r"ends after 11 members without 1 of 12 listed images, the first is n2/11\.JPEG"):
        list(stream_tar(archive, list(FILES)))


def test_indexing_keeps_only_what_is_asked_for(tmp_path: Path) -> None:
    """20,000 members of two class tars, of which 4 are wanted: `tarfile` alone would keep megabytes of records."""
    header = bytearray(tarfile.TarInfo("0000000.JPEG").tobuf(tarfile.USTAR_FORMAT))
    blocks = []
    for number in range(10_000):
        header[0:12] = b"%07d.JPEG" % number
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        blocks.append(bytes(header))
    inner = b"".join(blocks) + bytes(1024)
    archive = tmp_path / "a.tar"
    with archive.open("wb") as file:
        for number in range(2):
            outer = tarfile.TarInfo(f"n{number}.tar")
            outer.size = len(inner)
            file.write(outer.tobuf(tarfile.USTAR_FORMAT) + inner)
        file.write(bytes(1024))
    wanted = [f"n{label}/{number:07d}.JPEG" for label in range(2) for number in (0, 9_999)]
    tracemalloc.start()
    found = index_tar(archive, wanted)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found.offsets_N > 0).all()
    assert peak_bytes < 1 << 20
