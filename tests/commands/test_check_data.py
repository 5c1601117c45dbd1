import json
import os
import stat
from pathlib import Path

import pytest
from helpers.command_line import joined, qnas
from helpers.pictures import numbered, photo, save
from helpers.tiny import TINY_SPACE

from qnas.data.checking import image_name
from qnas.data.decoding import pixel_digest
from qnas.data.sources import open_dataset

ODD = "a\x1b[31m\u2028\u202eb|`<i>"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QNAS_HOME", str(tmp_path / "home"))


def photos(root: Path, names: tuple[str, ...] = ("ant", "bee"), count: int = 5) -> Path:
    for place, name in enumerate(names):
        for i in range(count):
            save(root / name / f"{i}.png", photo(100 * place + i, 32))
    return root


def test_the_report_is_short_and_its_page_shows_every_class(capsys: pytest.CaptureFixture[str]) -> None:
    photos(Path("photos"))
    assert qnas("check-data", "imagefolder:photos", "-q") == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines()[1:])
    for text in ("10: 10 all", "a search uses 6 train, 2 heldout, 2 test", "ant 5", "nothing wrong found"):
        assert text in joined(out) or text in out, text
    page = Path("data-check.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert "default-src 'none'" in page
    assert "<script" not in page


def test_json_is_one_document_and_no_page(capsys: pytest.CaptureFixture[str]) -> None:
    photos(Path("photos"))
    assert qnas("check-data", "imagefolder:photos", "--json", "-q") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "qnas.data-check/1"
    assert document["images"] == 10
    assert not Path("data-check.html").exists()
    assert qnas("check-data", "imagefolder:photos", "--json", "-q", "--out", "page.html") == 0
    assert Path("page.html").exists()


def test_digests_are_lines_of_the_decoded_pixels(capsys: pytest.CaptureFixture[str]) -> None:
    photos(Path("photos"), ("ant", "b\nee"))
    assert qnas("check-data", "imagefolder:photos", "--digests", "-q") == 0
    source = open_dataset("imagefolder:photos")
    lines = [f"{pixel_digest(source[n][0])}  {image_name(source, n)}" for n in range(10)]
    assert capsys.readouterr().out.splitlines() == lines
    assert lines[-1].endswith(r"  all/b\nee/4.png")


def test_a_problem_exits_with_1_after_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    root = photos(Path("photos"))
    (root / "ant" / "0.png").write_bytes((root / "bee" / "0.png").read_bytes())
    for form in ((), ("--json",), ("--digests",)):
        assert qnas("check-data", "imagefolder:photos", "-q", *form) == 1
        shown = capsys.readouterr()
        assert shown.err.startswith("qnas: error: imagefolder:photos: ")
        assert "2 of 10 images are also in another class, pixel for pixel" in shown.err
        assert shown.err.count("\n") == 1
        assert shown.out
        if form == ("--json",):
            assert len(json.loads(shown.out)["problems"]) >= 1


def test_data_that_cannot_be_read_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert qnas("check-data", "imagefolder:nowhere") == 1
    assert capsys.readouterr().err.endswith("nowhere: no such file or folder\n")


def test_a_path_cannot_change_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert qnas("check-data", "imagefolder:no\x1b[31m\u202ewhere") == 1
    err = capsys.readouterr().err
    assert r"no\x1b[31m\u202ewhere: no such file or folder" in err
    assert err.removesuffix("\n").isprintable()


def test_a_file_of_another_kind_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    photos(Path("photos"))
    Path("mine.html").write_text("mine")
    words = ("check-data", "imagefolder:photos", "-q", "--out", "mine.html")
    assert qnas(*words) == 1
    assert "mine.html: exists already: --force replaces it, or give another --out" in capsys.readouterr().err
    assert Path("mine.html").read_text() == "mine"
    assert qnas(*words, "--force") == 0
    assert qnas(*words) == 0, "a page of an earlier check is replaced"


def test_names_of_classes_are_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    photos(Path("photos"), (ODD, "b"))
    assert qnas("check-data", "imagefolder:photos", "-q") == 0
    out = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in out)
    assert r"a\x1b[31m\u2028\u202eb|`<i>" in out
    page = Path("data-check.html").read_text(encoding="utf-8")
    assert r"a\x1b[31m\u2028\u202eb|`&lt;i&gt;" in page
    assert not {"\x1b", "\u2028", "\u202e"} & set(page)


def test_many_classes_are_listed_by_the_largest_and_the_smallest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    numbered(Path("many"), {f"class{i:02}": 3 + i for i in range(30)})
    assert qnas("check-data", "imagefolder:many", "-q", "--json") in (0, 1)
    assert len(json.loads(capsys.readouterr().out)["classes"]) == 30
    qnas("check-data", "imagefolder:many", "-q")
    out = capsys.readouterr().out
    assert [
        name in out for name in ("class29 ", "class20 ", "class19 ", "class10 ", "class09 ", "class00 ")
    ] == [*(True, True, False, False, True, True)]
    assert "(10 more)" in out


@pytest.mark.slow
def test_a_run_lists_what_is_left_out_and_calls_val_val(capsys: pytest.CaptureFixture[str]) -> None:
    for part, count in (("train", 20), ("val", 6)):
        photos(Path("photos") / part, (ODD, "b"), count)
    (Path("photos") / "train" / "b" / "a\nb.txt").write_text("x")
    Path("tiny.yaml").write_text(TINY_SPACE)
    short = "--resolution 16 --warmup-epochs 0 --epochs 1 --random-networks 0 --effect-networks 0 --seed 0"
    words = (
        f"search --space tiny.yaml --device vpu --budget 3ms --data imagefolder:photos --out run {short} -q"
    )
    assert qnas(*words.split()) == 0
    said = capsys.readouterr()
    assert "12 test (your val)" in joined(said.out)
    assert "12 val images" in joined(said.out)
    assert "qnas: warning: photos: 1 file left out: .txt files: 1" in said.err
    assert Path("run/left-out.csv").read_text() == "file,reason\ntrain/b/a\\nb.txt,.txt files\n"
    found = json.loads(Path("run/search.json").read_text())
    assert found["left_out"] == {".txt files": 1}
    assert found["split_names"] == {"train": "train", "test": "val"}
    (Path("photos") / "more.txt").write_text("x")  # changes nothing for a run
    assert qnas(*["train-subnet", "run", "--resolution", "16", "--epochs", "1", "-q"]) == 0
    said = capsys.readouterr()
    assert "12 val images" in joined(said.out)
    assert "2 files: left-out.csv" in joined(said.out)
    assert qnas(*["export", "run", "--format", "standalone", "--images", "4"]) == 0
    shown = capsys.readouterr().out + said.out
    assert all(character.isprintable() or character == "\n" for character in shown)
    card = Path("run/export/model-card.md").read_text(encoding="utf-8")
    assert r"- Classes: a\\x1b[31m\\u2028\\u202eb\|\`\<i\>, b".replace("[", r"\[") in card
    for page in ("run/report.html", "run/export/model-card.md", "run/export/model.py"):
        assert not {"\x1b", "\u2028", "\u202e"} & set(Path(page).read_text(encoding="utf-8")), page


def test_a_pipe_among_the_images_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    photos(Path("photos"))
    os.mkfifo("photos/ant/pipe.png")
    assert stat.S_ISFIFO(Path("photos/ant/pipe.png").stat().st_mode)
    assert qnas("check-data", "imagefolder:photos", "-q") == 0
    assert "pipes and other files that are not regular: 1 (ant/pipe.png)" in joined(capsys.readouterr().out)
