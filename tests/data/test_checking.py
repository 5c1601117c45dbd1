import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pictures import numbered, photo, save, write_tar
from PIL import Image
from torch.utils.data import TensorDataset

import qnas
from qnas.common.errors import DataError, UsageError
from qnas.data.checking import DataReport, check_images, image_name
from qnas.data.decoding import pixel_digest
from qnas.data.sources import open_dataset


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of two classes for training and one fifth as many as `val`, all different."""
    root = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 20), ("val", 5)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                save(root / part / name / f"{i:02}.png", photo(1000 * label + i + 500 * (part == "val"), 32))
    return root


@pytest.fixture
def own(photos: Path, tmp_path: Path) -> Path:
    """A copy of the photographs to change."""
    for path in photos.rglob("*.png"):
        target = tmp_path / "own" / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path / "own"


def check(root: Path, kind: str = "imagefolder", **options: Any) -> DataReport:
    return qnas.check_data(f"{kind}:{root}", **options)


def test_nothing_is_wrong_with_different_photographs(photos: Path) -> None:
    report = check(photos)
    assert (report.problems, report.warnings) == ((), ())
    assert report.images == 50
    assert report.splits == {"train": 40, "val": 10}
    assert report.used == {"train": 32, "heldout": 8, "val": 10}
    assert report.classes == {"ant": {"train": 20, "val": 5}, "bee": {"train": 20, "val": 5}}
    assert (report.imbalance, report.largest_share) == (1, 0.5)
    assert report.modes == {"RGB": 50}
    assert vars(report.width_px) == {"least": 32, "median": 32, "most": 32}
    assert report.exact.images == report.near.images == report.plain == report.turned == 0
    assert {name: picture.shape for name, picture in report.pictures.items()} == {
        "ant": (3, 32, 32),
        "bee": (3, 32, 32),
    }


def test_what_leaks_from_training_to_test_is_a_problem(own: Path) -> None:
    (own / "val" / "ant" / "00.png").write_bytes((own / "train" / "ant" / "07.png").read_bytes())
    Image.open(own / "train" / "bee" / "03.png").save(own / "val" / "bee" / "01.jpg", quality=80)
    report = check(own)
    leaked = sum(count for where, count in report.exact.across.items() if where.startswith("val in "))
    assert leaked == 1
    assert report.exact.examples == (("train/ant/07.png", "val/ant/00.png"),)
    assert report.problems == ("1 of 11 val images are also images for training, pixel for pixel",)
    assert report.near.examples == (("train/bee/03.png", "val/bee/01.jpg"),)
    assert any(text.startswith("images that are nearly in two splits: 1 val in") for text in report.warnings)


def test_one_image_in_two_classes_is_a_problem(own: Path) -> None:
    (own / "train" / "ant" / "00.png").write_bytes((own / "train" / "bee" / "00.png").read_bytes())
    report = check(own)
    assert report.exact.of_another_class == 2
    assert report.problems == ("2 of 50 images are also in another class, pixel for pixel",)


def test_a_twin_of_the_same_split_and_class_is_no_problem(own: Path) -> None:
    (own / "val" / "ant" / "00.png").write_bytes((own / "val" / "ant" / "01.png").read_bytes())
    report = check(own)
    assert report.exact.images == 2
    assert report.exact.across == {}
    assert report.problems == ()


def test_broken_and_left_out_files_are_counted(own: Path) -> None:
    (own / "train" / "ant" / "00.png").write_bytes(b"no image")
    (own / "train" / "ant" / "notes.txt").write_text("x")
    report = check(own, max_broken=0.1)
    assert [Path(each["file"]).name for each in report.broken] == ["00.png"]
    assert report.classes["ant"]["train"] == 19
    assert report.problems == ()
    assert report.warnings[:2] == (
        "1 broken image will be left out",
        "1 file left out: .txt files: 1 (first train/ant/notes.txt)",
    )
    assert check(own, max_broken=0).problems[0].startswith("1 of 50 images are broken, more than")
    for path in own.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of its images can be decoded: "):
        check(own)


def test_sizes_modes_and_turns_are_those_of_the_files(tmp_path: Path) -> None:
    root = numbered(tmp_path, {"a": 3, "b": 3})
    turned = Image.Exif()
    turned[0x112] = 6
    photo(0, 40).resize((40, 20)).save(root / "a" / "turned.jpg", exif=turned)
    photo(1, 30).convert("P").save(root / "b" / "palette.png")
    photo(2, 30).convert("CMYK").save(root / "b" / "cmyk.jpg")
    photo(3, 30).convert("RGBA").save(root / "b" / "alpha.png")
    report = check(root)
    assert report.modes == {"RGB": 7, "P": 1, "CMYK": 1, "RGBA": 1}
    assert report.turned == 1
    assert (report.width_px.least, report.width_px.median) == (16, 16)
    assert {report.width_px.most, report.height_px.most} <= {30, 40}


def test_too_few_images_are_a_problem(tmp_path: Path) -> None:
    report = check(numbered(tmp_path, {"a": 9, "b": 2}))
    assert any("class 'b' has 2 training images, expected at least 3" in text for text in report.problems)
    assert report.splits == {"all": 11}


def test_an_imbalance_is_a_warning(tmp_path: Path) -> None:
    for i in range(40):
        save(tmp_path / ("b" if i >= 36 else "a") / f"{i}.png", photo(i, 32))
    report = check(tmp_path)
    assert report.imbalance == 9
    for i in range(4):
        save(tmp_path / "a" / f"more{i}.png", photo(50 + i, 32))
    assert "the largest class has 10 times the images of the smallest" in check(tmp_path).warnings


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Cat", "cat"], "classes whose names look alike: 'Cat', 'cat'"),
        (["caf\u00e9", "cafe\u0301"], "classes whose names look alike: caf"),
        (["a\u200b", "a"], "classes whose names look alike: "),
        ([" a", "b"], "names of classes with characters that are not seen: ' a'"),
        (["a\u202eb", "b"], r"names of classes with characters that are not seen: 'a\u202eb'"),
        (["a\u2028", "b"], r"not seen: 'a\u2028'"),
        (["bus", "train"], "classes that are named as splits: train"),
    ],
)
def test_names_that_mislead_are_warnings(names: list[str], message: str, tmp_path: Path) -> None:
    for place, name in enumerate(names):
        for i in range(3):
            save(tmp_path / name / f"{i}.png", photo(10 * place + i, 32))
    report = check(tmp_path)
    (found,) = (text for text in report.warnings if "name" in text and message.split(":")[0] in text)
    assert message in found
    assert found.isprintable()


def test_the_document_is_json_and_says_the_same(own: Path) -> None:
    (own / "train" / "ant" / "00.png").write_bytes(b"no image")
    (own / "train" / "ant" / "notes.txt").write_text("x")
    report = check(own, max_broken=0.1)
    document = json.loads(json.dumps(report.document()))
    assert document["schema"] == "qnas.data-check/1"
    assert document["classes"][0] == {"name": "ant", "images": {"train": 19, "val": 5}}
    assert document["broken"]["images"] == 1
    assert document["left_out"] == [
        {"reason": ".txt files", "files": 1, "first": ["train/ant/notes.txt"]},
    ]
    assert document["warnings"] == list(report.warnings)


def test_digests_are_those_of_the_decoded_pixels(photos: Path, tmp_path: Path) -> None:
    lines: dict[str, str] = {}
    check(photos, on_digest=lambda digest, name: lines.setdefault(name, digest))
    source = open_dataset(f"imagefolder:{photos}")
    assert list(lines) == [image_name(source, number) for number in range(len(source))]
    assert next(iter(lines)) == "train/ant/00.png"
    assert list(lines.values()) == [pixel_digest(source[number][0]) for number in range(len(source))]
    # the same pixels in another format
    for path in photos.rglob("*.png"):
        target = tmp_path / path.relative_to(photos).with_suffix(".bmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(target)
    others: dict[str, str] = {}
    check(tmp_path, on_digest=lambda digest, name: others.setdefault(name, digest))
    assert list(others.values()) == list(lines.values())


def test_every_kind_of_data_is_checked(photos: Path, tmp_path: Path) -> None:
    assert qnas.check_data("digits").modes == {"L": 1797}
    members = []
    for i, path in enumerate(sorted((photos / "train").rglob("*.png"))):
        members += [(f"{i}.png", path.read_bytes()), (f"{i}.cls", path.parent.name.encode())]
    write_tar(tmp_path / "0.tar", members)
    assert check(tmp_path, "shards").splits == {"all": 40}
    images = torch.from_numpy(np.stack([np.array(photo(i, 16)).transpose(2, 0, 1) for i in range(20)]))
    dataset = TensorDataset(images, torch.arange(20) % 2)
    report = qnas.check_data(qnas.Datasets(dataset, validation=dataset, classes=("a", "b")))
    assert report.splits == {"train": 20, "validation": 20}
    assert report.problems[0] == "20 of 20 validation images are also images for training, pixel for pixel"


def test_a_share_outside_0_to_1_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a share of the images, 0 to 1"):
        qnas.check_data("digits", max_broken=2)


def test_no_image_is_decoded_twice_but_those_that_are_shown(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_dataset(f"imagefolder:{photos}")
    seen: list[int] = []
    read = type(source).__getitem__

    def count(self: Any, number: int) -> Any:
        seen.append(number)
        return read(self, number)

    monkeypatch.setattr(type(source), "__getitem__", count)
    check_images(source, quiet=True)
    assert len(seen) == len(source) + 2
