"""Verification names what is wrong with a shard folder, down to the sample, and says nothing of a good one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.format import open_shards
from pipelines.format.index import read_manifest
from pipelines.format.tar import member_header
from pipelines.format.verify import verified_bytes, verify_shards
from pipelines.types import ShardError
from tests.pipelines.format.folders import edit_index, forge_checksums, patch, read_json, write_folder, write_json


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("good") / "shards")


@pytest.fixture
def root(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(good, tmp_path / "shards"))


def place(root: Path, sample_id: int, split: str = "train") -> tuple[Path, int, int]:
    """The tar of a sample, and offset and size of its image there."""
    record = np.load(root / f"{split}.index.npy")[sample_id]
    return root / read_json(root)["splits"][split]["shards"][record["shard"]]["file"], int(record["offset"]), int(record["size"])


def found(root: Path, **options: bool) -> list[str]:
    """What is wrong, without the path of the folder."""
    return [str(problem).replace(f"{root}/", "") for problem in verify_shards(root, num_threads=2, **options)]


class TestGoodFolders:
    @pytest.mark.parametrize("decode", [True, False])
    def test_a_good_folder_has_no_problems(self, good: Path, decode: bool) -> None:
        assert read_json(good)["num_skipped"] == 1  # so the keys have a gap
        assert found(good, decode=decode) == []

    def test_betons_are_checked_by_their_checksum(self, root: Path) -> None:
        manifest = read_json(root)
        for split in ("train", "test"):
            (root / f"{split}.beton").write_bytes(b"beton" * 100)
            num_samples = manifest["splits"][split]["num_samples"]
            manifest["splits"][split]["beton"] = {
                "file": f"{split}.beton",
                "num_samples": num_samples,
                "beton_bytes": 0,
                "sha256": "0" * 64,
            }
        write_json(root, manifest)
        forge_checksums(root)
        assert found(root) == []
        assert verified_bytes(read_manifest(root)[0]) == 1000 + sum(path.stat().st_size for path in root.glob("*.tar"))
        patch(root / "train.beton", 3, b"!")
        (root / "test.beton").unlink()
        assert sorted(found(root), reverse=True) == [
            "train.beton has not the checksum that the manifest says: it is damaged or was replaced",
            "test.beton cannot be read: No such file or directory",
        ]

    def test_progress_adds_up_to_all_bytes_of_the_tars(self, good: Path) -> None:
        counted: list[int] = []
        verify_shards(good, on_bytes=counted.append)
        assert sum(counted) == verified_bytes(read_manifest(good)[0]) == sum(path.stat().st_size for path in good.glob("*.tar"))

    def test_whoever_counts_bytes_can_stop_it(self, good: Path) -> None:
        def interrupt(num_bytes: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            verify_shards(good, on_bytes=interrupt)


class TestDamagedBytes:
    def test_one_damaged_image_names_its_sample_and_its_shard(self, root: Path) -> None:
        path, offset, size = place(root, 7)
        patch(path, offset + size // 2, b"\xff\xff\xff")
        undecodable, checksum = found(root)
        assert undecodable.startswith(f"sample 00000007 of {path.name} is not a readable image: ")
        assert checksum == f"{path.name} has not the checksum that the manifest says: it is damaged; copy it again or make the shards again"

    def test_every_flipped_bit_of_a_tar_is_found(self, root: Path) -> None:
        path, offset, size = place(root, 2)
        whole = path.read_bytes()
        for position in (0, offset - 400, offset + 5, offset + size - 1, offset + size, len(whole) - 1):
            patch(path, position, bytes([whole[position] ^ 1]))
            assert any("checksum" in problem for problem in found(root, decode=False)), position
            patch(path, position, whole[position : position + 1])
        assert found(root) == []

    def test_a_damaged_header_ends_the_search_in_its_shard_alone(self, root: Path) -> None:
        path, offset, _ = place(root, 5)
        patch(path, offset - 512, b"garbage")
        damaged, checksum = found(root)
        assert damaged.startswith(f"sample 00000005 of {path.name} is damaged at byte {offset - 512}: no tar header (bad checksum)")
        assert "checksum that the manifest says" in checksum

    def test_a_header_that_promises_gigabytes_reads_none(self, root: Path) -> None:
        path, offset, _ = place(root, 5)
        patch(path, offset - 512, member_header("00000006.jpg", 7 << 30))
        assert found(root)[0].startswith(
            f"sample 00000005 of {path.name} has at byte {offset - 512} a member '00000006.jpg' that is no image"
        )
        patch(path, offset - 512, member_header("00000006.jpg", 1 << 30))
        assert found(root)[0] == f"sample 00000005 of {path.name} ends within the member '00000006.jpg'"

    def test_truncated_and_missing_tars(self, root: Path) -> None:
        path, offset, _ = place(root, 3)
        num_bytes = path.stat().st_size
        path.write_bytes(path.read_bytes()[: offset + 10])
        missing = place(root, 0, "test")[0]
        missing.unlink()
        assert found(root) == [
            f"sample 00000003 of {path.name} ends within the member '00000003.png'",
            f"{path.name} has {offset + 10} bytes, the manifest says {num_bytes}; copy it again",
            f"{missing.name} cannot be read: No such file or directory; copy it again or make the shards again",
        ]

    def test_a_tar_without_its_end_mark_is_truncated(self, root: Path) -> None:
        path, offset, size = place(root, 3)  # the last of its shard
        end = offset + size + -size % 512 + 1024
        path.write_bytes(path.read_bytes()[:end])
        assert found(root)[0].startswith(f"sample 00000004 of {path.name} is damaged at byte {end}: no tar header (empty header)")


class TestForgedContents:
    """Checksums fit; only the contents contradict one another."""

    def test_a_label_that_the_index_does_not_have(self, root: Path) -> None:
        path, offset, size = place(root, 6)
        patch(path, offset + size + -size % 512 + 512, b"1")
        forge_checksums(root)
        assert found(root) == [f"sample 00000006 of {path.name} has the label 1 in the tar, 2 in the index"]

    @pytest.mark.parametrize("label", [b"9", b"x", b"-"])
    def test_a_label_that_is_no_class(self, root: Path, label: bytes) -> None:
        path, offset, size = place(root, 6)
        patch(path, offset + size + -size % 512 + 512, label)
        forge_checksums(root)
        assert found(root)[0] == f"sample 00000006 of {path.name} has the label {label!r}, which is no class of 0…2"

    def test_swapped_labels_in_the_index(self, root: Path) -> None:
        index = np.load(root / "train.index.npy")
        assert index["label"][[2, 3]].tolist() == [0, 1]
        edit_index(root, "label", slice(2, 4), [1, 0])
        forge_checksums(root)
        path = place(root, 2)[0]
        assert found(root) == [
            f"sample 00000002 of {path.name} has the label 0 in the tar, 1 in the index",
            f"sample 00000003 of {path.name} has the label 1 in the tar, 0 in the index",
        ]

    @pytest.mark.parametrize("decode", [True, False])
    def test_sizes_that_are_not_the_images(self, root: Path, decode: bool) -> None:
        path = place(root, 8)[0]
        edit_index(root, "height", 8, 99)
        forge_checksums(root)
        problem = f"sample 00000008 of {path.name} has 39×44 pixels (height×width), the index says 99×44"
        assert found(root, decode=decode) == [problem]

    def test_an_offset_that_is_not_the_images(self, root: Path) -> None:
        path, offset, size = place(root, 8)
        edit_index(root, "offset", 8, offset + 512)
        forge_checksums(root)
        assert found(root) == [f"sample 00000008 of {path.name} has {size} bytes at {offset}, the index says {size} at {offset + 512}"]

    def test_a_tar_of_another_split(self, root: Path) -> None:
        shutil.copy(root / "train-000001.tar", root / "train-000000.tar")
        forge_checksums(root)
        problems = found(root)
        assert "train-000000.tar holds 5 samples, the manifest says 4" in problems
        assert "train-000000.tar holds 5 samples, the index lists 4" in problems

    def test_an_image_named_after_the_other_format(self, root: Path) -> None:
        path, offset, size = place(root, 3)
        assert path.read_bytes()[offset - 512 :].startswith(b"00000003.png")
        patch(path, offset - 512, member_header("00000003.jpg", size))
        forge_checksums(root)
        assert found(root) == [f"sample 00000003 of {path.name} is named .jpg, which its bytes are not"]

    def test_members_that_do_not_pair(self, root: Path) -> None:
        path, offset, size = place(root, 3)
        patch(path, offset - 512, member_header("README", size))
        forge_checksums(root)
        assert found(root)[0] == f"sample 00000003 of {path.name} has a member 'README' where an image should be; what follows was not read"

    def test_an_index_out_of_order(self, root: Path) -> None:
        index = np.load(root / "train.index.npy")
        np.save(root / "train.index.npy", index[::-1])
        forge_checksums(root)
        assert "train.index.npy is not in the order of the shards" in found(root)

    def test_a_progressive_jpeg_is_only_warned_of(self, root: Path) -> None:
        """It is not what the writer stores, but all decoders read it."""
        from tests.pipelines.format.images import image_bytes, smooth

        path, offset, size = place(root, 0)
        progressive = image_bytes(pixels=smooth(30, 44), progressive=True, quality=30)
        assert len(progressive) < size
        patch(path, offset, progressive + bytes(size - len(progressive)))
        forge_checksums(root)
        (problem,) = verify_shards(root)
        assert problem.warning
        assert "no plain JPEG or PNG" in str(problem)


class TestManifest:
    def test_a_manifest_of_other_counts(self, root: Path) -> None:
        manifest = read_json(root)
        manifest["splits"]["train"]["class_counts"] = [8, 7, 3]
        write_json(root, manifest)
        assert found(root) == ["train.index.npy holds other class counts than the manifest"]
        manifest["splits"]["train"]["class_counts"] = [8, 6, 3]
        write_json(root, manifest)
        assert "manifest.json has 18 num_samples of 'train', but 17 in its class_counts and 18 in its shards" in found(root)

    def test_an_unusable_manifest_is_listed_and_ends_it(self, root: Path) -> None:
        manifest = read_json(root)
        del manifest["splits"]["val"]["index"]
        manifest["splits"]["train"]["num_samples"] = "18"
        write_json(root, manifest)
        assert found(root) == [
            "manifest.json lacks splits.val.index.file, splits.val.index.sha256",
            "manifest.json has a splits.train.num_samples that is not a whole number from 0 on",
        ]

    def test_names_must_differ(self, root: Path) -> None:
        manifest = read_json(root)
        virtual, stored = manifest["resampled"]
        manifest["splits"]["val"]["index"] = manifest["splits"]["test"]["index"]
        virtual["name"] = stored["name"]
        write_json(root, manifest)
        assert {"manifest.json names the file test.index.npy twice", "manifest.json names the resampled stream 'square-root' twice"} <= set(
            found(root)
        )
        with pytest.raises(ShardError, match=r"names the file test\.index\.npy twice"):
            open_shards(root)

    def test_without_a_manifest_there_is_nothing_to_check(self, root: Path) -> None:
        (root / "manifest.json").unlink()
        with pytest.raises(ShardError, match=r"holds no manifest\.json"):
            verify_shards(root)

    def test_strangers_are_warned_of(self, root: Path) -> None:
        (root / "train-000099.tar").write_bytes(b"old")
        (root / "notes").mkdir()
        problems = verify_shards(root)
        assert [problem.path.name for problem in problems if problem.warning] == ["notes", "train-000099.tar"]
        assert len(problems) == 2


class TestIndexAndStreams:
    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda path: path.unlink(), "cannot be read: No such file"),
            (lambda path: path.write_bytes(b""), "is not a numpy file of format 1.0"),
            (lambda path: path.write_bytes(path.read_bytes()[:-24]), "does not fit the manifest"),
            (lambda path: patch(path, 200, b"\x07"), "has not the checksum"),
        ],
        ids=["missing", "empty", "truncated", "flipped"],
    )
    @pytest.mark.parametrize("file", ["train.index.npy", "train-square-root.index.npy", "train.class-balanced.order.npy"])
    def test_a_damaged_file_is_named(self, root: Path, file: str, damage: Callable[[Path], None], sentence: str) -> None:
        damage(root / file)
        problems = found(root)
        assert any(problem.startswith(f"{file} {sentence}") for problem in problems), problems
        assert all(problem.startswith((file, "sample ")) for problem in problems)

    def test_an_order_must_name_samples(self, root: Path) -> None:
        order = np.load(root / "train.class-balanced.order.npy")
        order[5] = 18
        np.save(root / "train.class-balanced.order.npy", order)
        forge_checksums(root)
        assert found(root) == ["train.class-balanced.order.npy names sample 18, but the training split has 18"]

    def test_an_order_draws_the_class_counts_of_the_manifest(self, root: Path) -> None:
        order = np.load(root / "train.class-balanced.order.npy")
        labels = np.load(root / "train.index.npy")["label"]
        order[0] = np.flatnonzero(labels != labels[order[0]])[0]
        np.save(root / "train.class-balanced.order.npy", order)
        forge_checksums(root)
        assert found(root) == ["train.class-balanced.order.npy draws other class counts than the manifest says"]

    def test_dali_index_files_are_covered_by_their_listing(self, root: Path) -> None:
        idx = sorted((root / "train.class-balanced.dali").iterdir())
        patch(idx[0], 0, b"v9")
        idx[1].unlink()
        assert found(root) == [
            "train.class-balanced.dali/000000.idx has not the checksum that the manifest says: it is damaged or was replaced",
            "train.class-balanced.dali/000001.idx cannot be read: No such file or directory",
        ]

    def test_a_listing_cannot_name_files_elsewhere(self, root: Path) -> None:
        path = root / "train.class-balanced.dali.json"
        listing = json.loads(path.read_text())
        listing["index_paths"][0] = "../secret.idx"
        path.write_text(json.dumps(listing))
        forge_checksums(root)
        assert found(root) == ["train.class-balanced.dali.json does not fit the manifest"]

    def test_materialised_streams_open_as_splits(self, good: Path) -> None:
        from pipelines.format.manifest import streams
        from pipelines.format.reader import ShardSplit

        entry = streams(open_shards(good).manifest)["train-square-root"]
        assert len(ShardSplit(good, "train-square-root", entry)) == entry["epoch_size"] == 18
