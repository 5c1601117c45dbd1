import struct
import warnings
from pathlib import Path

from helpers.odd_images import chunk
from helpers.pictures import numbered

from qnas.commands.cli import _warnings_in_a_line
from qnas.data.loading import load_data


def test_what_pillow_warns_of_is_listed_by_us_alone(tmp_path: Path) -> None:
    root = numbered(tmp_path, {"ant": 10, "bee": 10})
    head = struct.pack(">IIBBBBB", 9_999, 9_999, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
    (root / "ant" / "999.png").write_bytes(content)
    with warnings.catch_warnings(record=True) as told, _warnings_in_a_line():
        warnings.simplefilter("always")
        data = load_data(f"imagefolder:{root}", resolution_px=8, max_broken=0.1, quiet=True)
        warnings.warn("of another package", UserWarning, stacklevel=1)
    assert [each.problem for each in data.broken] == ["9999 x 9999 pixels, expected at most 67,108,864"]
    assert [str(each.message) for each in told] == ["of another package"]
