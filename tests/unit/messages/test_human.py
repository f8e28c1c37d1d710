import pytest

from hpdist.messages.human import counted, duration, percent, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.42, "0.4 s"),
        (9.94, "9.9 s"),
        (9.97, "10 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (7380, "2 h 03 min"),
        (86_399, "1 d 0 h"),
        (5 * 86_400 + 7200, "5 d 2 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_shares_and_counts() -> None:
    assert [size(n) for n in (0, 1023, 1024, 5 * 2**30 // 4, 2**60)] == [
        *("0 B", "1023 B", "1.00 KiB", "1.25 GiB", "1024.00 PiB")
    ]
    assert percent(0.97222) == "97.22 %"
    assert [counted(n, "rank") for n in (0, 1, 1024)] == ["0 ranks", "1 rank", "1,024 ranks"]
