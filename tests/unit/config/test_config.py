import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hpdist.algorithms import AlgorithmConfig
from hpdist.config.component import ByName, ComponentOf, component_names
from hpdist.config.overrides import BY_NAME
from hpdist.data.config import Bytes
from hpdist.errors import ConfigError
from hpdist.train.config import RunConfig, json_schema, load, parse

CONFIG = """
model: {name: cnn, width: 16}
data:
  labeled: {path: parquet, data_files: train.parquet}
  unlabeled: {path: parquet, data_files: train.parquet}
algorithm: {name: fixmatch, threshold: 0.8}
steps: 100
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "digits.yaml"
    path.write_text(CONFIG)
    return path


def refusal(config: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(config, overrides)
    return str(caught.value).removeprefix(f"{config}: ")


def test_the_command_line_wins_over_the_file(config):
    result = load(config, ["--steps", "7", "--optim.lr=1e-3", "--algorithm.threshold", "0.5"])
    assert (result.steps, result.optim.lr, result.algorithm.threshold) == (7, 0.001, 0.5)
    assert result.model.width == 16
    assert result.run.name == "digits"


def test_override_values_are_yaml(config):
    text = "--views.mean [0.1,-0.2] --batch.micro=null --run.name 007 --views.weak.flip no"
    text += " --data.unlabeled.shuffle_window 1.5MiB --optim.weight_decay 5E-4"
    result = load(config, [*text.split(), "--data.labeled.revision", "2024-01-01"])
    assert result.views.mean == [0.1, -0.2]
    assert result.batch.micro is None
    assert result.run.name == "007"
    assert result.data.unlabeled.shuffle_window == 1.5 * 2**20
    assert result.views.weak.flip is False
    assert result.optim.weight_decay == 5e-4
    assert result.data.labeled.revision == "2024-01-01"


def test_a_negative_number_is_a_value_not_an_option(config):
    assert refusal(config, "--optim.lr", "-1") == "--optim.lr: must be greater than 0, not -1"


def test_exponents_without_a_point_are_numbers_in_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(CONFIG + "optim: {lr: 1e-3, weight_decay: 5e-04}\n")
    assert load(path).optim.lr == 0.001
    assert load(
        path, ["--model.name", "python:torch:nn.Linear", "--model.args.x", "2e1"]
    ).model.args == {"x": 20.0}


@pytest.mark.parametrize("reverse", [False, True])
def test_another_component_drops_the_old_options_and_keeps_the_overrides(config, reverse):
    arguments = ["--algorithm.name=freematch", "--algorithm.momentum=0.9", "--model.width=4"]
    result = load(config, arguments[::-1] if reverse else arguments)
    assert result.algorithm.name == "freematch"
    assert result.algorithm.momentum == 0.9
    assert result.model.width == 4


def test_the_same_component_keeps_the_options_of_the_file(config):
    assert load(config, ["--algorithm.name", "fixmatch"]).algorithm.threshold == 0.8
    views = load(config, ["--views.weak.shift", "0.5", "--views.name", "image"]).views
    assert views.weak.shift == 0.5
    config.write_text(CONFIG + "views: {weak: {shift: 0.25}}\n")
    assert load(config, ["--views.name", "image"]).views.weak.shift == 0.25
    assert load(config, ["--views.name", "identity"]).views.name == "identity"


@pytest.mark.parametrize("group", BY_NAME)
def test_a_group_may_be_given_by_its_name_alone(config, group):
    name = {"model": "mlp", "algorithm": "freematch", "views": "table", "task": "regression"}
    name |= {"optim": "adamw", "schedule": "linear", "tracker": "none"}
    by_word = load(config, [f"--{group}", name[group]])
    assert getattr(by_word, group).name == name[group]
    assert by_word == load(config, [f"--{group}.name", name[group]])
    text = [line for line in CONFIG.splitlines() if not line.startswith(f"{group}:")]
    config.write_text("\n".join([*text, f"{group}: {name[group]}"]))
    assert load(config) == by_word
    assert yaml.safe_load(by_word.to_yaml())[group]["name"] == name[group]  # the full form
    values = yaml.safe_load(config.read_text())
    assert getattr(parse(values), group) == getattr(by_word, group)


def test_every_group_with_a_name_may_be_given_by_it():
    named = {
        name
        for name, field in RunConfig.model_fields.items()
        if {ByName, ComponentOf} & {type(part) for part in field.metadata}
    }
    assert set(BY_NAME) == named


def test_options_go_with_a_name_alone(config):
    arguments = ["--algorithm.threshold", "0.9", "--algorithm", "fixmatch"]
    assert load(config, arguments).algorithm.threshold == 0.9
    assert load(config, ["--algorithm", "fixmatch"]).algorithm.threshold == 0.8
    config.write_text(CONFIG.replace("{name: fixmatch, threshold: 0.8}", "flexmatch"))
    assert load(config, ["--algorithm.threshold", "0.7"]).algorithm.threshold == 0.7
    assert load(config, ["--addons", "[debiaspl]"]).addons[0].name == "debiaspl"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("{size: 32}", "image"),
        ("{weak: {flip: false}}", "image"),
        ("{missing: mean}", "table"),
        ("{max_length: 32}", "text"),
        ("{seconds: 1}", "audio"),
        ("{weak: {shift: 0.25}}", "auto"),  # of images and of sound
        ("{}", "auto"),
        ("null", "auto"),
        ("auto", "auto"),
    ],
)
def test_views_without_a_name_are_those_that_have_the_options(config, options, name):
    config.write_text(f"{CONFIG}views: {options}\n")
    views = load(config).views
    assert views.name == name
    again = config.with_name("again.yaml")
    again.write_text(load(config).to_yaml())
    assert load(again).views == views


def test_options_without_a_name_stay_with_views_that_have_them(config):
    config.write_text(f"{CONFIG}views: {{missing: mean}}\n")
    assert load(config, ["--views.name", "table"]).views.missing == "mean"
    assert load(config, ["--views", "image"]).views.name == "image"


def test_a_group_comes_before_what_is_in_it(config):
    arguments = ["--batch.labeled=8", "--batch={unlabeled: 16, labeled: 4}"]
    batch = load(config, arguments).batch
    assert (batch.labeled, batch.unlabeled) == (8, 16)


def test_an_override_of_an_anchor_stays_where_it_is(tmp_path):
    path = tmp_path / "a.yaml"
    lines = CONFIG.splitlines()
    lines[3:5] = ["  labeled: &rows {path: parquet, split: a}", "  unlabeled: *rows"]
    path.write_text("\n".join(lines))
    data = load(path, ["--data.labeled.split", "b"]).data
    assert (data.labeled.split, data.unlabeled.split) == ("b", "a")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--optimm.lr=1", "--optimm: unknown setting, did you mean 'optim'?"),
        ("--stepss=1", "--stepss: unknown setting, did you mean 'steps'?"),
        ("--optim.lrr=1", "--optim.lrr: unknown setting, did you mean 'lr'?"),
        ("--data.labeled.lable=y", "--data.labeled.lable: unknown setting, did you mean 'label'?"),
        ("--views.weak.shfit=1", "--views.weak.shfit: unknown setting, did you mean 'shift'?"),
        (
            "--algorithm.treshold=1",
            "--algorithm.treshold: unknown setting, did you mean 'threshold'?",
        ),
        (
            "--model.qqq=1",
            "--model.qqq: unknown setting; known here: name, num_classes, features, save, width, "
            "norm",
        ),
        (
            "--model.name=cnnn",
            "--model.name: no model is called 'cnnn', did you mean 'cnn'?; known: ",
        ),
        (
            "--model=cn",
            "--model.name: no model is called 'cn', did you mean 'cnn'?; known: center_net, cnn, ",
        ),
        (
            "--model=5",
            "--model: must be a name or a group of settings, not 5; known: center_net, cnn, ladder",
        ),
        ("--tracker=wandbb", "--tracker.name: must be 'wandb', 'tensorboard', 'mlflow' or 'none'"),
        ("--views=imag", "--views.name: no views is called 'imag', did you mean 'image'?"),
        ("--views={sise: 32}", "--views.sise: unknown setting, did you mean 'size'?"),
        ("--views={max_lenght: 3}", "--views.max_lenght: unknown setting, did you mean 'max_l"),
        (
            "--algorithm={}",
            "--algorithm.name: missing; known: " + ", ".join(component_names("algorithm")),
        ),
        ("--optim.momentum=1", "--optim.momentum: must be at least 0 and less than 1, not 1"),
        ("--zero.stage=4", "--zero.stage: must be at least 0 and at most 3, not 4"),
        ("--optim.name=sgdw", "--optim.name: must be 'sgd', 'adam', 'adamw' or 'muon', not 'sgdw'"),
        ("--optim.betas=[0.9]", "--optim.betas.1: missing, in [0.9]"),
        ("--optim.betas=[0.9, 2]", "--optim.betas.1: must be less than 1, not 2"),
        ("--optim.lr=fast", "--optim.lr: must be a number greater than 0, not 'fast'"),
        ("--optim.lr=.inf", "--optim.lr: must be a finite number, not Infinity"),
        ("--optim=5", "--optim: must be a group of settings (name, lr, momentum"),
        ("--steps=true", "--steps: must be a whole number greater than 0, not true"),
        ("--steps=1.5", "--steps: must be a whole number greater than 0, not 1.5"),
        ("--steps=null", "--steps: must be a whole number greater than 0, not null"),
        ("--views.weak.flip=7", "--views.weak.flip: must be true or false, "),
        ("--model.width=0", "--model.width: must be greater than 0, not 0"),
        ("--data.labeled.indices=[]", "--data.labeled.indices: must have at least 1 item, not 0"),
        (
            "--data.labeled.data_files=true",
            "--data.labeled.data_files: must be text or a list or a ",
        ),
        (
            "--data.unlabeled.shuffle_window=5x",
            "--data.unlabeled.shuffle_window: must be a number of bytes such as 512MiB,",
        ),
        ("--run.name=a/b", "--run.name: must match pattern"),
        ("--steps.x=1", "--steps.x: 'steps' holds 100, no group of settings"),
        ("--steps=[1", "--steps: '[1' is not valid YAML: line 1, column 3: "),
        ("--steps", "--steps needs a value"),
        ("steps=1", "unexpected argument 'steps=1'"),
    ],
)
def test_a_refusal_names_setting_value_and_what_is_allowed(config, override, message):
    text = refusal(config, override)
    assert text.startswith(message)
    assert "\n" not in text


def test_an_option_of_another_component_is_refused(config):
    text = refusal(config, "--algorithm.name", "freematch", "--algorithm.threshold", "0.9")
    assert text == "--algorithm.threshold: unknown setting, did you mean 'max_threshold'?"
    assert refusal(config, "--model.name=wide_resnet", "--model.depth=27") == (
        "--model.depth: must be 6 n + 4, such as 10, 16, 28 or 40, not 27"
    )


def test_several_findings_come_at_once(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {name: cnnn}\nalgorithm: {name: fixmatch, threshold: 2}\nstep: 3\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    first, *rest = str(caught.value).splitlines()
    assert first == f"{path}:"
    assert [line.split(": ")[0].strip() for line in rest] == [
        "model.name",
        "data",
        "algorithm.threshold",
        "steps",
        "step",
    ]


def test_choices_that_exclude_each_other():
    labeled = {"path": "x", "rows": 5, "labels_per_class": 1}
    values = {"model": {"name": "cnn"}, "data": {"labeled": labeled}, "steps": 1}
    with pytest.raises(ConfigError, match="labels_per_class and rows exclude each other"):
        parse(values | {"algorithm": {"name": "supervised"}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold settings such as `steps: 1000`; it is empty"),
        (b"- 1\n", "must hold settings such as `steps: 1000`; not [1]"),
        (b"a: [1\nb: 2", "is not valid YAML: line 2, column 2: expected ',' or ']'"),
        (b"a: 1\na: 2", "is not valid YAML: line 2, column 1: 'a' occurs twice"),
        (b"a: !!python/object:os.system 1", "is not valid YAML: line 1, column 4: could not"),
        (b"caf\xe9: 1", "it is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, message):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_resolved_yaml_gives_the_same_config(config, tmp_path):
    text = "--optim.eps=1e-8 --run.name 1e5 --optim.betas=[0.5,0.6] --data.labeled.indices=[3,1]"
    files = "--data.labeled.data_files={train: [a, 'ü: x']}"
    result = load(config, [*text.split(), files, "--run.dir", "my runs"])
    path = tmp_path / "resolved.yaml"
    path.write_text(result.to_yaml(), encoding="utf-8")
    again = load(path)
    assert again == result
    assert again.to_yaml() == result.to_yaml()


def test_text_that_looks_like_a_number_stays_text(config, tmp_path):
    result = load(config, ["--run.name='1e5'", "--data.labeled.label='7'", "--run.dir='null'"])
    assert (result.run.name, result.data.labeled.label, result.run.dir) == ("1e5", "7", "null")
    path = tmp_path / "resolved.yaml"
    path.write_text(result.to_yaml())
    assert load(path) == result


def test_the_run_is_called_after_the_file(tmp_path):
    path = tmp_path / "my run (2).yaml"
    path.write_text(CONFIG)
    assert load(path).run.name == "my-run-2-"


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MiB", 2**26), ("1 KB", 1000), ("2K", 2000), ("3kib", 3072), ("512B", 512), (77, 77)],
)
def test_bytes(text, size):
    from pydantic import TypeAdapter

    assert TypeAdapter(Bytes).validate_python(text) == size


MODULE = """
from hpdist.algorithms import AlgorithmConfig, FixMatch

class Mine(FixMatch):
    class Config(AlgorithmConfig):
        strength: float = 1.0
        def build(self, num_classes, device="cpu"):
            return Mine(unsupervised_weight=self.strength)

number = 3
"""


def test_python_components(config, tmp_path, monkeypatch):
    (tmp_path / "own_algorithms.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("\nimport not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = "python:own_algorithms:Mine"
    algorithm = load(config, ["--algorithm.strength", "2", "--algorithm.name", name]).algorithm
    assert isinstance(algorithm, AlgorithmConfig)
    assert algorithm.build(3).unsupervised_weight == 2.0
    assert load(config, [f"--algorithm.name={name}.Config"]).algorithm.strength == 1.0
    text = refusal(config, f"--algorithm.name={name}", "--algorithm.strenght=1")
    assert text == "--algorithm.strenght: unknown setting, did you mean 'strength'?"
    text = refusal(config, "--algorithm.name=python:own_algorithms:number")
    assert "python:own_algorithms:number is not a config class of algorithm options" in text
    text = refusal(config, "--algorithm.name=python:own_algorithms:Mien")
    assert "module 'own_algorithms' has no 'Mien', did you mean 'Mine'?" in text
    text = refusal(config, "--algorithm.name=python:own_broken:x")
    assert "No module named 'not_there'" in text
    assert "own_broken.py, line 2" in text
    text = refusal(config, f"--model.name={name}")
    assert text == f"--model.name: {name} holds options of algorithm"
    text = refusal(config, "--algorithm.name=python:own_algorithms")
    assert "must read python:package.module:attribute" in text


def test_the_schema_has_every_component_with_its_options():
    schema = json.loads(json_schema())
    assert schema["additionalProperties"] is False
    assert {"model", "data", "algorithm", "steps"} == set(schema["required"])
    for kind in ("model", "algorithm", "views"):
        *options, alone = schema["properties"][kind]["oneOf"]
        assert alone["type"] == "string"
        options = [_resolve(schema, option) for option in options]
        names = [option["properties"]["name"] for option in options]
        assert [n["const"] for n in names if "const" in n] == component_names(kind)
        patterns = ["^hf:.", "^timm:.", "^python:"] if kind == "model" else []
        assert [n["pattern"] for n in names if "pattern" in n] == patterns
        # Without a name an object may fit one option only.
        unnamed = [o for o in options if "name" not in o.get("required", [])]
        assert len(unnamed) == (kind == "views")
        assert all(option["additionalProperties"] is (option in unnamed) for option in options)
        assert all(option["description"] for option in options)
    place = component_names("algorithm").index("fixmatch")
    fixmatch = _resolve(schema, schema["properties"]["algorithm"]["oneOf"][place])
    assert fixmatch["properties"]["threshold"]["maximum"] == 1
    assert "Confidence" in fixmatch["properties"]["threshold"]["description"]


def test_every_reference_of_the_schema_resolves():
    text = json_schema()
    schema = json.loads(text)
    for line in text.splitlines():
        if '"$ref"' in line:
            assert _resolve(schema, json.loads("{" + line.strip().rstrip(",") + "}"))


def _resolve(schema, option):
    if "$ref" not in option:
        return option
    return schema["$defs"][option["$ref"].removeprefix("#/$defs/")]


def test_a_config_can_be_made_in_python():
    values = {"model": {"name": "mlp"}, "data": {"labeled": {"path": "x"}}, "steps": 1}
    config = RunConfig.model_validate(values | {"algorithm": {"name": "supervised"}})
    assert config.views.name == "auto"
    assert config.model.hidden == [500]
    with pytest.raises(ConfigError, match=r"^config: eval\.every: must be greater than 0, not 0$"):
        parse(values | {"algorithm": {"name": "supervised"}, "eval": {"every": 0}})


def test_import_hpdist_is_light():
    heavy = ("transformers", "wandb", "deepspeed", "kornia", "datasets", "accelerate", "torch")
    code = f"""
import sys
import hpdist
assert not [m for m in {heavy} if m in sys.modules], 'import hpdist'
import hpdist.train.config
assert not [m for m in {heavy[:5]} if m in sys.modules], 'the components'
missing = [name for name in hpdist.__all__ if getattr(hpdist, name, None) is None]
assert not missing and set(hpdist.__all__) <= set(dir(hpdist)), missing
try:
    hpdist.Trianer
except AttributeError as error:
    assert "'Trianer'" in str(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_run_of_a_sweep_has_a_folder_of_its_own(tmp_path, monkeypatch):
    path = tmp_path / "digits.yaml"
    path.write_text(
        "{model: {name: mlp}, data: {labeled: {path: x}}, algorithm: {name: supervised}, steps: 1}"
    )
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    assert load(path).run.name == "digits"  # one run that W&B was told to go on with
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert load(path).run.name == "digits-r1"
    assert load(path, ["--run.name=own"]).run.name == "own"
