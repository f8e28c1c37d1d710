from typing import ClassVar

import torch

from hpdist import algorithms, cli
from hpdist.algorithms import Algorithm, AlgorithmConfig, Views, catalogue
from hpdist.config import components

SOME = {
    "fixmatch": ["Sohn et al. 2020, arXiv:2001.07685", "1 weak, 1 strong", "none", "0"],
    "freematch": [
        "Wang et al. 2023, arXiv:2205.07246",
        "1 weak, 1 strong",
        "threshold [], probability [C], histogram [C]",
        "2C + 1, then 2C",
    ],
    "ict": [
        "Verma et al. 2019, arXiv:1903.03825",
        "1 weak, targets by the teacher, mixed",
        "step []",
        "0",
    ],
    "mean_teacher": [
        "Tarvainen and Valpola 2017, arXiv:1703.01780",
        "1 weak, 1 weak for the student, targets by the teacher",
        "step []",
        "0",
    ],
    "supervised": ["-", "none", "none", "0"],
    "temporal_ensembling": [
        "Laine and Aila 2017, arXiv:1610.02242",
        "1 weak, 1 weak for the student",
        "step [], averages [N x C], counts [N]",
        "BC + 2B",
    ],
}


def test_the_table_is_read_off_the_algorithms():
    table = catalogue()[: catalogue().index("")]
    header, *rows = [line.split("  ") for line in table]
    cells = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert [cell.strip() for cell in header if cell.strip()] == [
        "name",
        "paper",
        "views",
        "state",
        "reduced per step",
    ]
    assert cells.keys() == components("algorithm").keys()
    assert {name: cells[name] for name in SOME} == SOME


def test_columns_are_aligned():
    lines = catalogue()[:4]
    starts = [lines[0].index(title) for title in ("paper", "views", "state", "reduced per step")]
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
        return {"a": bank, "b": bank, "pairs": pairs, "rows": weak.logits.sum(), "c": bank[:, :2]}


class _TableConfig(AlgorithmConfig):
    name: str

    def build(self, num_classes, device="cpu"):
        return _Table(num_classes)


def test_shapes_in_terms_of_c():
    row = algorithms._row("table", _TableConfig)
    assert row[2:] == ("1 weak, 2 strong", "queue [3 x C], pairs [C x C]", "C^2 + 6C + 7")


def test_the_command_prints_the_table(capsys):
    assert cli.main(["algorithms"]) == 0
    assert capsys.readouterr().out.splitlines() == catalogue()
