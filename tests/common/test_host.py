"""Facts of a machine, from files as Linux writes them."""

from pathlib import Path

from qnas.common.host import cpu_clock, cpu_name, gpu_clock, load


def test_the_processor_is_read_from_the_system(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Board CPU @ 2 GHz\ncpu MHz\t\t: 1999.5\n")
    assert cpu_name(info) == "Board CPU @ 2 GHz"
    assert cpu_clock(info, tmp_path / "none") == "clock at 2.00 GHz"


def test_the_governor_and_the_highest_clock_are_said_where_known(tmp_path: Path) -> None:
    for name, text in (("governor", "powersave\n"), ("cur_freq", "1200000\n"), ("max_freq", "3400000\n")):
        (tmp_path / f"scaling_{name}").write_text(text)
    assert cpu_clock(tmp_path / "none", tmp_path) == "clock governed by 'powersave', at 1.20 of 3.40 GHz"


def test_what_cannot_be_read_is_said_so(tmp_path: Path) -> None:
    assert cpu_clock(tmp_path / "none", tmp_path) == "clock not readable"
    assert cpu_name(tmp_path / "none")
    assert gpu_clock().startswith("clock ")
    assert "cores" in load()
