import math
import random

import pytest

from qnas.common.errors import UsageError
from qnas.common.units import (
    format_count,
    format_mj,
    format_ms,
    format_per_image,
    is_rate,
    parse_count,
    parse_energy,
    parse_latency,
)


@pytest.mark.parametrize(
    ("text", "latency_ms"),
    [
        ("30ms", 30.0),
        ("800us", 0.8),
        ("0.03s", 30.0),
        (" 3 ms ", 3.0),
        (".5ms", 0.5),
        ("1e2us", 0.1),
        ("5µs", 0.005),  # the micro sign
        ("5μs", 0.005),  # the Greek letter
    ],
)
def test_a_latency_is_read_in_milliseconds(text: str, latency_ms: float) -> None:
    assert parse_latency(text) == pytest.approx(latency_ms, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("30", "budget '30' has no unit: write 30ms, 30us or 30s"),
        ("30m", "budget '30m': unknown unit 'm', expected us, ms or s, or img/s of a throughput device"),
        ("30MS", "budget '30MS': unknown unit 'MS', expected us, ms or s, or img/s of a throughput device"),
        ("fast", "budget 'fast': expected a number with a unit, such as 30ms, 800us or 0.03s"),
        ("", "budget '': expected a number with a unit, such as 30ms, 800us or 0.03s"),
        ("1 2ms", "budget '1 2ms': expected a number with a unit, such as 30ms, 800us or 0.03s"),
        ("nanms", "budget 'nanms': expected a number with a unit, such as 30ms, 800us or 0.03s"),
        ("0ms", "budget '0ms': expected a latency above zero"),
        ("-3ms", "budget '-3ms': expected a latency above zero"),
        ("1e999ms", "budget '1e999ms': expected a latency above zero"),
    ],
)
def test_what_is_no_latency_is_refused_with_the_fix(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_latency(text)
    assert str(error.value) == message


def _some_latencies() -> list[float]:
    rng = random.Random(0)
    exact = [0.8, 30.0, 30.000000000000004, 9.9999, 9999.6, 12345.6, 1e-5]
    drawn = [10 ** rng.uniform(-4, 5) for _ in range(2000)]
    return exact + drawn + [round(x, rng.randrange(1, 6)) or 0.1 for x in drawn]


def test_a_written_latency_has_four_digits_and_reads_back() -> None:
    for latency_ms in _some_latencies():
        text = format_ms(latency_ms)
        assert parse_latency(text) == pytest.approx(latency_ms, rel=5.1e-4)
        if latency_ms >= 1:
            assert 4 <= len(text.removesuffix(" ms").replace(".", "").lstrip("0")) <= 6


def test_a_latency_rounded_up_is_a_budget_that_the_network_meets() -> None:
    for latency_ms in _some_latencies():
        budget_ms = parse_latency(format_ms(latency_ms, round_up=True))
        assert latency_ms <= budget_ms <= latency_ms * (1 + 1.1e-3)


def test_zero_and_infinity_can_be_written() -> None:
    assert format_ms(0.0) == "0 ms"
    assert format_ms(math.inf) == "inf ms"


@pytest.mark.parametrize(
    ("text", "count"),
    [("2.5M", 2.5e6), ("300m", 3e8), ("1.2G", 1.2e9), ("5k", 5e3), ("123", 123.0), ("2B", 2e9)],
)
def test_a_count_is_read_with_its_suffix(text: str, count: float) -> None:
    assert parse_count(text, "`max_macs`") == pytest.approx(count, rel=1e-15)
    assert parse_count(format_count(count), "`max_macs`") == pytest.approx(count, rel=5e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2.5T", "`max_params` '2.5T': expected a number, such as 2.5M, 300M or 1.2G"),
        ("many", "`max_params` 'many': expected a number, such as 2.5M, 300M or 1.2G"),
        ("30ms", "`max_params` '30ms': expected a number, such as 2.5M, 300M or 1.2G"),
        ("-1M", "`max_params` '-1M': expected a count above zero"),
        ("1e999", "`max_params` '1e999': expected a count above zero"),
    ],
)
def test_what_is_no_count_is_refused_with_the_fix(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_count(text, "`max_params`")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "latency_ms"), [("5000img/s", 0.2), ("0.5 images/s", 2000.0), ("1e3img/s", 1.0)]
)
def test_a_rate_is_the_time_of_an_image(text: str, latency_ms: float) -> None:
    assert is_rate(text)
    assert parse_latency(text) == pytest.approx(latency_ms)
    assert not is_rate(format_ms(latency_ms))


@pytest.mark.parametrize("text", ["0img/s", "-5img/s", "1e999img/s", "5img", "5img/h", "img/s", "5/s"])
def test_a_rate_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^budget "):
        parse_latency(text)


@pytest.mark.parametrize(
    ("text", "energy_mj"), [("30mJ", 30.0), ("0.03 J", 30.0), ("800uJ", 0.8), ("8µJ", 0.008)]
)
def test_an_energy_is_read_in_its_unit(text: str, energy_mj: float) -> None:
    assert parse_energy(text) == pytest.approx(energy_mj)
    assert parse_energy(format_mj(energy_mj, round_up=True)) >= energy_mj


@pytest.mark.parametrize("text", ["30", "30ms", "30mj", "0mJ", "-1mJ", "1e999J", "mJ", "30mJ/s"])
def test_an_energy_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^`max_energy` "):
        parse_energy(text)


def test_a_rate_is_written_beside_its_time() -> None:
    assert format_per_image(0.08) == "0.08000 ms an image (12,500 img/s)"
    assert format_per_image(30.0, round_up=True) == "30.00 ms an image (33.33 img/s)"
