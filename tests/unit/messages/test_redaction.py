"""What is written, logged or shown has no password, token or signature."""

import builtins
import logging
import pickle
import subprocess
import sys
import time
import traceback

import pytest
import yaml

from hpdist.config.section import shown
from hpdist.errors import ConfigError, DataError
from hpdist.messages.redaction import (
    RedactingFilter,
    redact_error,
    redacted,
    redacted_errors,
    redacted_parts,
    redacted_settings,
    redacted_text,
)
from hpdist.train import config as configuration

SECRET = "S3cr3tS3cr3tS3cr3t"  # in every one of them

URLS = [
    f"https://me:{SECRET}@host.org/a.parquet",
    f"https://{SECRET}@host.org/a.parquet",
    f"https://me:pa'ss{SECRET}@host.org/a.parquet",
    f"https://me:{SECRET}/with+slash@host.org/a.parquet",
    f"https://me:half/{SECRET}@host.org/a.parquet",
    f"https://me:p@ss@{SECRET}@host.org/a.parquet",
    f"HTTPS://me:{SECRET}@[::1]:8080/a.parquet",
    f"https://host.org/a.parquet?X-Amz-Signature={SECRET}&X-Amz-Date=1",
    f"https://host.org/a.parquet?X-Goog-Signature={SECRET}",
    f"https://account.blob.core.windows.net/c/a.parquet?sv=1&sig={SECRET}&se=2",
    f"https://host.org/a.parquet?AWSAccessKeyId=x&Signature={SECRET}",
    f"https://host.org/a.parquet?whatever={SECRET}#{SECRET}",
    f"s3://AKIA:{SECRET}@bucket/a.parquet",
    f"s3://AKIA:{SECRET[:4]}/{SECRET}/+=@bucket/key/a.parquet",
    f"zip://a.parquet::https://me:{SECRET}@host.org/x.zip?t={SECRET}",
    f"simplecache::s3://key:{SECRET}@bucket/a.parquet",
    f"zip://in.parquet::simplecache::https://host.org/x.zip?token={SECRET}",
    f"https://user:{SECRET}",  # a message has cut it off
]
TEXTS = [
    *(f"cannot read {url}: HTTP 403" for url in URLS),
    *(f"ClientResponseError(URL('{url}'), status=401)" for url in URLS if "'" not in url),
    *(f'["{url}", "{url}"]' for url in URLS),
    f"Authorization: Basic {SECRET}",
    f"headers={{'Authorization': 'Bearer {SECRET}'}}",
    f"<CIMultiDict('authorization': 'Basic {SECRET}=')>",
    f"storage_options={{'key': 'x', 'secret': '{SECRET}', 'password': \"{SECRET}\"}}",
    f'{{"aws_secret_access_key": "{SECRET}", "account_key":"{SECRET}"}}',
    f"DefaultEndpointsProtocol=https;AccountName=x;AccountKey={SECRET}==;EndpointSuffix=y",
    f"token={SECRET} HF_TOKEN={SECRET} client-secret: {SECRET}",
    f"the token hf_{SECRET} is invalid, and so is AKIA{SECRET[:0]}ABCDEFGHIJKLMNOP",
    f"HTTP/1.1 Bearer {SECRET}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_keeps_no_secret(text):
    found = redacted_text(text)
    assert SECRET not in found
    assert "REDACTED" in found
    assert redacted_text(found) == found


@pytest.mark.parametrize("url", URLS)
def test_a_url_keeps_its_host_and_path(url):
    found = redacted(url)
    assert SECRET not in found
    if "host.org" in url:
        assert "host.org/" in found
    if "a.parquet" in url:
        assert "a.parquet" in found
    assert redacted(found) == found


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/user/name@refs%2Fpr%2F1/data/train-0.parquet",
        "https://host.org:8080/a/b@2x.png, row group 3",
        "s3://bucket/key@version/part-0.parquet",
        "file:///data/what?.parquet",
        "/data/what?.parquet and user@host",
        "it asks for a login or a token",
        "views.tokenizer: name the folder; pad_token: [PAD], max_tokens=4, key=3",
        "data.unlabeled.split: Unknown split",
        "pip install hf_transfer; basic transformers",
        "zip://a.parquet::/data/x.zip",
        "gradients overflow (attempts 1 to 3; last loss scales 4, 2, 1)",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redacted_text(text) == text


def test_settings_lose_secrets_by_value_and_by_name_and_say_where():
    settings = {
        "data": {"data_files": {"train": [URLS[0], "/plain.parquet"]}, "path": "parquet"},
        "args": {"storage_options": {"key": "a", "secret": SECRET, "token": None}, "token_dim": 3},
        "steps": 3,
    }
    found = redacted_settings(settings)
    assert SECRET not in str(found)
    assert found["steps"] == 3
    assert found["data"]["data_files"]["train"][1] == "/plain.parquet"
    assert found["args"]["token_dim"] == 3
    assert found["args"]["storage_options"]["token"] is None
    assert redacted_parts(found) == ["data.data_files.train", "args.storage_options.secret"]
    assert redacted_parts(settings) == []


def test_every_error_is_without_secrets_whatever_it_was_made_of():
    error = DataError(f"cannot be loaded: {URLS[0]}", 3)
    assert SECRET not in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.args) == (DataError, error.args)
    assert SECRET not in shown(f"https://{'m' * 30}:{SECRET * 5}@host.org")
    assert SECRET[:4] not in shown(f"https://{'m' * 40}{SECRET * 5}@host.org")


class AnswerError(Exception):
    """Worded of what is no argument, as aiohttp's errors are."""

    def __init__(self, request):
        super().__init__(request, ())
        self.request = request

    def __str__(self):
        return f"401, url={self.request['url']!r}"


def inner_errors():
    """Errors of Python's own and of libraries, each with a secret where its kind has one."""
    noted = ValueError("plain")
    noted.__notes__ = [f"while reading {URLS[0]}"]
    kind = getattr(builtins, "ExceptionGroup", None)  # from Python 3.11 on
    group = [kind("several", [OSError(URLS[0])])] if kind is not None else []
    return [
        ValueError(f"no such file: {URLS[0]}"),
        KeyError(URLS[0]),
        FileNotFoundError(2, "No such file", URLS[0]),
        OSError({"url": URLS[0]}),
        ImportError("cannot", name="x", path=URLS[0]),
        SyntaxError("bad", (URLS[0], 1, 1, f"open('{URLS[0]}')")),
        AnswerError({"url": URLS[0]}),
        noted,
        *group,
    ]


@pytest.mark.parametrize("inner", inner_errors(), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("how", ["from", "context", "from None", "twice"])
def test_no_error_is_raised_from_one_with_a_secret(inner, how):
    kind = type(inner)
    with pytest.raises(DataError) as caught:
        raise_from(inner, how)
    told = "".join(traceback.format_exception(caught.value))
    assert SECRET not in told + repr(inner)
    assert isinstance(inner, kind)
    if how != "from None":
        assert kind.__name__ in told
        assert "REDACTED" in told or kind is ImportError  # whose path no traceback shows
    pickle.loads(pickle.dumps(inner))


def raise_from(inner, how):
    try:
        if how == "twice":
            try:
                raise inner
            except type(inner) as error:
                raise RuntimeError("outer") from error
        raise inner
    except BaseException as error:
        if how in ("from", "twice"):
            raise DataError("cannot be loaded") from error
        if how == "from None":
            raise DataError("cannot be loaded") from None
        raise DataError("cannot be loaded")  # noqa: B904


def test_an_error_without_a_secret_stays_as_it_is():
    error = AnswerError({"url": "https://host.org/a.parquet"})
    error.__cause__ = OSError(2, "No such file", "/data/what?.parquet")
    redact_error(error)
    assert type(error) is AnswerError
    assert error.args == ({"url": "https://host.org/a.parquet"}, ())
    assert error.__cause__.filename == "/data/what?.parquet"


def test_errors_of_others_leave_without_secrets_too():
    with pytest.raises(AnswerError) as caught, redacted_errors():
        raise AnswerError({"url": URLS[0]})
    assert str(caught.value) == "401, url='https://REDACTED@host.org/a.parquet'"
    assert type(caught.value).__name__ == "AnswerError"


def test_a_log_line_comes_with_an_error_without_its_secret():
    """As asyncio logs what nobody has waited for."""
    try:
        raise AnswerError({"url": URLS[0]})
    except AnswerError:
        record = logging.LogRecord("x", 40, "x.py", 1, "lost", (), sys.exc_info())
    RedactingFilter().filter(record)
    told = logging.Formatter().format(record)
    assert "AnswerError: 401" in told
    assert SECRET not in told
    assert SECRET not in logging.Formatter().formatException(record.exc_info)


def values(files):
    return {
        "model": {"name": "mlp"},
        "algorithm": {"name": "supervised"},
        "data": {"labeled": {"path": "parquet", "data_files": files}},
        "steps": 1,
    }


def test_a_written_config_says_what_was_left_out_and_is_refused(tmp_path):
    text = configuration.parse(values(["a.parquet", URLS[0]])).to_yaml()
    assert SECRET not in text
    assert text.startswith("# Left out of data.labeled.data_files: what is marked REDACTED.\n")
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"data\.labeled\.data_files: a password or signature"):
        configuration.load(file)
    given = ["--data.labeled.data_files", f"[{URLS[0]}]"]
    assert configuration.load(file, given).data.labeled.data_files == [URLS[0]]


def test_a_config_without_secrets_is_written_as_it_is():
    text = configuration.parse(values(["hf://datasets/a/b@main/x.parquet"])).to_yaml()
    assert not text.startswith("#")
    assert "REDACTED" not in text
    files = yaml.safe_load(text)["data"]["labeled"]["data_files"]
    assert files == ["hf://datasets/a/b@main/x.parquet"]


def test_the_command_line_words_no_log_line_warning_or_traceback_with_a_secret(tmp_path):
    """Of libraries too, in threads too; in a process of its own, which has no other hooks."""
    program = tmp_path / "program.py"
    program.write_text(
        "import logging, threading, warnings\n"
        "from hpdist import cli\n"
        "cli.main(['algorithms'])\n"
        f"url = {URLS[0]!r}\n"
        "logging.getLogger('some.library').warning('%s of %s', 'get', url)\n"
        "warnings.warn(f'slow: {url}')\n"
        "def fail(): raise OSError(f'thread {url}')\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join()\n"
        "class Left:\n"
        "    def __del__(self): raise OSError(f'left {url}')\n"
        "left = Left(); del left\n"
        "try: fail()\n"
        "except OSError: logging.getLogger('asyncio').exception('never waited for')\n"
        "raise ValueError(f'main {url}')\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    wanted = ["get of https", "slow: https", "OSError: thread https", "ValueError: main https"]
    for said in [*wanted, "OSError: left https", "never waited for"]:
        assert any(said in line for line in lines), said
    assert sum("OSError: thread https" in line for line in lines) == 2
    assert SECRET not in done.stderr


def test_our_own_log_lines_are_without_secrets_in_any_program(caplog):
    import hpdist.data.files.transport  # noqa: F401  (the loggers of whoever reads)

    names = [
        "hpdist.data",
        "httpx",
        "huggingface_hub.file_download",
        "datasets.load",
        "fsspec.http",
    ]
    for name in names:
        with caplog.at_level(logging.WARNING, name):
            logging.getLogger(name).warning("reading %s", URLS[0])
    assert len(caplog.records) == len(names)
    assert SECRET not in caplog.text


@pytest.mark.parametrize("part", ["x", "token_", "s3-", "a.b:", "u:", "https://", "::a://", "'="])
def test_no_rule_goes_over_a_long_text_again_and_again(part):
    def spent(times):
        text = "https://h.org/a " + part * times + " https://" + part * times
        start = time.process_time()
        redacted_text(text)
        return time.process_time() - start

    short = max(min(spent(2_000) for _ in range(3)), 1e-4)
    assert spent(40_000) < 200 * short  # in proportion it is 20 times, squared 400
