from typing import ClassVar

import torch

from hpdist import cli
from hpdist.algorithms import Algorithm, AlgorithmConfig, Views, catalogue
from hpdist.config.component import component_names


def test_the_table_is_read_off_the_algorithms():
    header, *rows = catalogue.catalogue()[: catalogue.catalogue().index("")]
    cells = {row[0]: row[1:] for row in map(_cells, rows)}
    assert _cells(header) == ["name", "paper", "tasks", "views", "state", "reduced per step"]
    assert sorted(cells) == component_names("algorithm")
    expected = {
        "adamatch": [
            "Berthelot et al. 2022, arXiv:2106.04732",
            "c",
            "1 weak, 1 strong, targets of labelled rows too",
            "labeled_probability [C], recent_probability [128 x C], step []",
            "2C + 2",
        ],
        "defixmatch": [
            "Schmutz et al. 2023, arXiv:2203.07512",
            "c",
            "1 weak, 1 strong, 1 strong of a labelled row, targets of labelled rows too",
            "none",
            "0",
        ],
        "fixmatch": [
            "Sohn et al. 2020, arXiv:2001.07685",
            "c d m",
            "1 weak, 1 strong",
            "none",
            "0",
        ],
        "flexmatch": [
            "Zhang et al. 2021, arXiv:2110.08263",
            "c",
            "1 weak, 1 strong",
            "counts [C], seen [], labels [N / ranks]",
            "C + 1 + 3 per row",
        ],
        "freematch": [
            "Wang et al. 2023, arXiv:2205.07246",
            "c",
            "1 weak, 1 strong",
            "threshold [], probability [C], histogram [C]",
            "2C + 1, then 2C",
        ],
        "mean_teacher": [
            "Tarvainen and Valpola 2017, arXiv:1703.01780",
            "c m r",
            "1 weak, 1 weak for the student, targets by the teacher",
            "step []",
            "0",
        ],
        "supervised": ["-", "c d m r", "none", "none", "0"],
    }
    assert {name: cells[name] for name in expected} == expected


def test_add_ons_have_a_table_of_their_own():
    lines = catalogue.catalogue()
    start = lines.index("") + 1
    end = lines.index("", start)
    header, *rows = map(_cells, lines[start:end])
    assert header == ["add-on", "paper", "tasks", "heads", "state", "reduced per step"]
    assert sorted(row[0] for row in rows) == component_names("addon")
    cells = {row[0]: row[1:] for row in rows}
    expected = {
        "abc": [
            "Lee et al. 2021, arXiv:2110.10368",
            "c",
            "abc, which predicts",
            "abc.step []",
            "0",
        ],
        "darp": [
            "Kim et al. 2020, arXiv:2007.08844",
            "c",
            "none",
            "darp.step [], darp.predictions [N x C], darp.refined [N x C]",
            "C per row + 2 per row",
        ],
        "debiaspl": [
            "Wang et al. 2022, arXiv:2201.01490",
            "c",
            "none",
            "debiaspl.probability [C]",
            "C",
        ],
        "logit_adjustment": ["Menon et al. 2021, arXiv:2007.07314", "c", "none", "none", "0"],
    }
    assert {name: cells[name] for name in expected} == expected


def _cells(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_columns_are_aligned():
    lines = catalogue.catalogue()[:4]
    starts = [
        lines[0].index(title) for title in ("paper", "tasks", "views", "state", "reduced per step")
    ]
    for line in lines:
        assert all(line[start - 1] == " " and line[start] != " " for start in starts)


class _Table(Algorithm):
    """Keeps and reduces sizes that are no plain multiples of the number of classes."""

    views: ClassVar[Views] = Views(weak=1, strong=2)

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.state = {"queue": torch.zeros(3, classes), "pairs": torch.zeros(classes, classes)}

    def statistics(self, weak):
        bank = torch.zeros(3, weak.logits.shape[1])
        pairs = weak.logits.T @ weak.logits
        batch = torch.zeros(weak.positions.unlabeled_rows, 2)
        return {
            "batch": batch,
            "scores": weak.logits,
            "a": bank,
            "b": bank,
            "pairs": pairs,
            "rows": weak.logits.sum(),
            "c": bank[:, :2],
        }


class _TableConfig(AlgorithmConfig):
    name: str

    def build(self, num_classes, device="cpu"):
        return _Table(num_classes)


def test_shapes_in_terms_of_c():
    row = catalogue._row("table", _TableConfig)
    assert row[2:] == (
        "c",
        "1 weak, 2 strong",
        "queue [3 x C], pairs [C x C]",
        "C^2 + 6C + 7 + C per row + 2 per row",
    )


def test_the_command_prints_the_table(capsys):
    assert cli.main(["algorithms"]) == 0
    assert capsys.readouterr().out.splitlines() == catalogue.catalogue()
