"""Every collective of pickled objects, and what bounds it: none may grow unseen with the ranks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[3] / "hpdist"
HOME = "distributed.collectives"
"""The only module that calls torch's own."""
FUNCTIONS = ("gathered", "gathered_on_main", "reports", "run_on_main")

# Every rank has each value: ranks x ranks in all.
EVERYWHERE = {
    "distributed.fragments.Layout.__init__": "names and places of the rank's own fragments, once, "
    "where weights are put together",
    "engines.overflow.find_overflow_source": "a finding for each term of the loss, after an "
    "overflow",
    "engines.zero_reach._check_first.compared": "names of parameters, before an error only",
    "evaluate.measure._result": "five numbers, after an evaluation by itself",
    "train.algorithm_state.whole_state": "the rank's part of a table that a user asks for whole",
    "train.bad_rows.BadRows.add": "three rows' names, before an error only",
    "train.shared_index._once_a_host": "a path, of the first rank of each host",
}
# Rank 0 has each value.
ON_MAIN = {
    "tracking.environment.hosts_and_devices": "the names of a host and a device",
    "train.row_examples.gather_outcomes": "at most 120 rows of five numbers",
}
# One number of each rank; if it is not 0, each rank's value everywhere.
IF_ANY = {
    "checkpoint.reader.open_newest": "an error",
    "checkpoint.writer.CheckpointWriter._settle": "a sentence",
    "checkpoint.writer.CheckpointWriter.finish": "a sentence",
    "distributed.collectives.raise_together": "an error",
    "evaluate.scoring.together": "an error",
    "train.first_look._everyones": "the names of ten rows",
    "train.guard.RunGuard.stop_error": "the name of a signal",
}
# From rank 0 to each: it does not grow with the ranks.
FROM_MAIN = {
    "checkpoint.reader.open_newest": "names of checkpoints, of which few are kept",
    "checkpoint.writer.CheckpointWriter.__init__": "eight characters",
    "cli.evaluate.run": "nothing",
    "evaluate.predict.run.predict_to": "the numbers of the parts that are missing, or nothing",
    "train.claim.Claim.begin": "a line",
    "train.claim.Claim.log_done": "changed settings",
    "train.claim.Claim.open": "nothing",
    "train.claim.Claim.summary": "a run's summary",
    "train.claim.own_folder": "a flag, a number, or a sentence",
    "train.engine_check.check_engine": "the versions and settings of a checked engine",
    "train.fitting.fitted_views": "what was measured of the training rows, such as a scale",
    "train.labeled_inputs.open_labeled_inputs": "facts of the labelled rows' inputs",
    "train.loop.RunLoop._catch_up": "a record",
    "train.loop.RunLoop._finish": "a number",
    "train.model_saving.ModelSaving._write": "nothing",
    "train.model_saving.ModelSaving.finish": "a number",
    "train.other_sets.open_stored_set": "a digest",
    "train.recovery.Rollback.go_back": "nothing",
    "train.run_name.with_fresh_name": "a name",
    "train.sets._settle": "facts of the inputs",
    "train.shared_index.share_index": "the set's files, but nothing of their row groups",
    "train.sets.open_sets": "facts of the inputs; which rows are repeated",
    "train.step_state._save": "nothing",
    "train.step_state.join_save_state.check": "how a state was saved",
}
TABLES = dict(zip(FUNCTIONS, (EVERYWHERE, ON_MAIN, IF_ANY, FROM_MAIN), strict=True))


def calls(tree: ast.AST, inside: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """The names of what is called, each with that of the function which calls it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from calls(node, (*inside, node.name))
            continue
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            yield name, ".".join(inside)
        yield from calls(node, inside)


def uses(source: str, module: str) -> dict[str, set[str]]:
    """Where a module calls each of the functions, if it has them from their home."""
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == f"hpdist.{HOME}"
        for alias in node.names
    }
    whole = "hpdist.distributed import collectives" in source or f"import hpdist.{HOME}" in source
    if module == HOME or whole:
        imported = {name: name for name in FUNCTIONS}
    found: dict[str, set[str]] = {name: set() for name in FUNCTIONS}
    for name, where in calls(tree):
        if imported.get(name) in found and where not in FUNCTIONS:
            found[imported[name]].add(f"{module}.{where}")
    return found


def modules(text: str) -> Iterator[tuple[str, str]]:
    """The modules that have a text in them: to parse all of them takes seconds."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        source = path.read_text(encoding="utf-8")
        if text in source:
            yield ".".join(parts), source


def test_every_use_is_listed_with_its_bound() -> None:
    found: dict[str, set[str]] = {name: set() for name in FUNCTIONS}
    for module, source in modules("collectives"):
        for name, where in uses(source, module).items():
            found[name] |= where
    for name, table in TABLES.items():
        assert found[name] == table.keys(), name
        assert all(table.values())


def test_torch_s_own_are_called_in_one_place() -> None:
    for module, source in modules("_object"):
        own = {name for name, _ in calls(ast.parse(source)) if "_object" in name}
        own = {
            name for name in own if name.startswith(("all_gather", "gather", "broad", "scatter"))
        }
        assert module == HOME or own == set(), (module, own)


def test_a_new_use_is_found() -> None:
    source = (
        "from hpdist.distributed.collectives import gathered as all_of\n"
        "class A:\n    def f(self): return [lambda: all_of(1)]\n"
    )
    assert uses(source, "train.new")["gathered"] == {"train.new.A.f"}
    source = "from hpdist.distributed import collectives\ncollectives.reports(1)\n"
    assert uses(source, "train.new")["reports"] == {"train.new."}
    assert uses("from x import gathered\ngathered(1)\n", "train.new")["gathered"] == set()
