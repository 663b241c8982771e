"""Secrets in URLs: no output and no file of a run has them, and a run goes on with the same or renewed ones."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
import torch
import zarr

import dtrain
from tests.cli.helpers import Outcome, Project, blobs, kept, last
from tests.data.servers import FileServer, _Handler

SECRETS = ("hushuser", "hushsig", "hushnew", "hushword", "hushfrag", "hushopt")


class _QueryHandler(_Handler):
    """Serves ``/get?dataset=NAME&sig=SIGNATURE/KEY``, as a service does that takes the key from the end of the URL."""

    def do_GET(self) -> None:
        place, _, query = self.path.partition("?")
        if query:
            given, _, key = query.partition("/")
            signed = parse_qs(given).get("sig", [""])[0].startswith("hush")
            self.path = f"/{parse_qs(given)['dataset'][0]}/{key}" if signed and place == "/get" else "/none"
        super().do_GET()

    do_HEAD = do_GET


class QueryServer(FileServer):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._server.RequestHandlerClass = type("Handler", (_QueryHandler,), {"files": self})

    def get(self, dataset: str = "a", signature: str = "hushsig", user: str = "hushuser@") -> str:
        return f"{self.url.replace('://', f'://{user}')}/get?dataset={dataset}&sig={signature}"


@pytest.fixture
def server(tmp_path: Path, write_store: Callable[..., Path]) -> Iterator[QueryServer]:
    """A server of two data sets of one kind: b has other values, and c has more rows."""
    one = blobs()
    write_store(tmp_path / "served/a", one)
    other = {**one, "x": {**one["x"], "values": one["x"]["values"] + 1}}
    write_store(tmp_path / "served/b", other)
    write_store(tmp_path / "served/c", blobs(80))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such metadata are not in the specification of Zarr v3
        for name in "abc":
            zarr.consolidate_metadata(tmp_path / "served" / name)
    server = QueryServer(tmp_path / "served")
    yield server
    server.stop()


@pytest.fixture
def at(project: Callable[..., Project], server: QueryServer) -> Project:
    return project({"data": {"path": server.get(), "storage_options": {"headers": {"X-Token": "hushopt"}}}})


def secrets_in(text: str) -> list[str]:
    return [secret for secret in SECRETS if secret in text]


def clean(outcome: Outcome, code: int = 0) -> Outcome:
    assert outcome.code == code, outcome.err
    assert secrets_in(outcome.out + outcome.err) == []
    return outcome


def files_of(run: Path) -> str:
    return "\n".join(path.read_bytes().decode(errors="replace") for path in run.rglob("*") if path.is_file())


# What is written and printed ----------------------------------------------------------------------------------------


def test_no_file_and_no_output_of_a_run_has_them(cli, at):
    assert "the first bytes are, behind a URL" in " ".join(cli("plan", at.config).out.split())
    for arguments in (["plan", "--json"], ["train", "-v"], ["train", "--json"]):
        clean(cli(*arguments, at.config))
    assert secrets_in(files_of(at.run)) == []
    assert "/get?***" in (at.run / "config.toml").read_text()
    for arguments in (["status"], ["status", "--json"], ["config", "show"], ["config", "show", "--json"]):
        clean(cli(*arguments, at.run))
    shown = clean(cli("config", "show", at.config)).out
    assert "/get?***" in shown
    clean(cli("config", "diff", at.config, at.run))


def test_several_stores_and_one_of_validation(cli, project, server):
    both = project({"data": {"path": [server.get("a"), server.get("c")], "val_path": server.get("b")}})
    clean(cli("plan", "--json", both.config))
    clean(cli("train", both.config))
    assert secrets_in(files_of(both.run)) == []
    assert "b" not in json.loads((both.run / "plan.json").read_text()).get("contents")  # digests alone


def test_federated_stores(cli, project, server):
    stores = [{"path": server.get("a")}, {"path": server.get("c")}]
    both = project({"data": {"path": stores}})
    outcome = clean(cli("plan", "--json", both.config))
    assert [store["path"].endswith("/get?***") for store in last(outcome)["stores"]] == [True, True]
    clean(cli("train", both.config))
    assert secrets_in(files_of(both.run)) == []


def test_chunks_that_are_filled_are_noted_without_them(cli, project, server, tmp_path):
    next((tmp_path / "served/a/label/c").iterdir()).unlink()
    job = project({"data": {"path": server.get(), "missing": "fill"}})
    clean(cli("train", job.config))
    job.config.write_text(job.config.read_text().replace('missing = "fill"', 'missing = "auto"'))
    clean(cli("train", job.config, "--run", "second"))
    assert "/get?***" in (job.dir / "runs/second/events.jsonl").read_text()
    assert secrets_in(files_of(job.dir / "runs")) == []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("http://hushuser:hushword@127.0.0.1:1/a.zarr", 3),
        ("http://hushuser:hush/word@127.0.0.1:1/a.zarr", 3),
        ("zip://::http://hushuser:hushword@127.0.0.1:1/a.zip", 3),
        ("nothing://hushuser@127.0.0.1:1/a.zarr?sig=hushsig#hushfrag", 3),
        ("memory://a.zarr?sig=hushsig", 5),
        ("memory://a.zarr#hushfrag", 5),
    ],
)
@pytest.mark.parametrize("command", [["plan"], ["train"], ["train", "--json"], ["plan", "--debug"]])
def test_errors_say_what_is_wrong_without_them(cli, project, command, path, code):
    job = project({"data": {"path": path}})
    outcome = clean(cli(*command, job.config), code)
    assert outcome.err.count("\n") <= 4 or "--debug" in command


def test_a_server_that_refuses_is_named_without_them(cli, at, server):
    server.fail("x/", 403)
    outcome = clean(cli("train", at.config), 5)
    assert "/get?***: access to x/" in outcome.err


def test_a_value_of_the_wrong_kind_is_shown_without_them(cli, project):
    long = "https://hushuser:hushword" + "x" * 60 + "@host/a.zarr?sig=hushsig"
    clean(cli("plan", project({"train": {"rounds": long}}).config), 3)
    (Path("job") / "a.yaml").write_text(f"data:\n  path: {long}\n  x: : : {long}\n")
    outcome = clean(cli("plan", "job/a.yaml"), 3)
    assert "line 3" in outcome.err


def test_a_retry_is_told_without_them(cli, at, server, monkeypatch, caplog):
    monkeypatch.setattr("dtrain.data.read.retry.WARN_SECONDS", 0.0)
    monkeypatch.setattr("dtrain.data.read.retry.BACKOFF_SECONDS", 0.01)
    server.fail("x/", 503, times=2)
    clean(cli("train", at.config))
    assert "/get?***: x/" in caplog.text
    assert secrets_in(caplog.text) == []


def test_a_url_in_the_place_of_a_config_file(cli):
    clean(cli("train", "https://hushuser:hushword@host/dtrain.toml?sig=hushsig"), 2)


def test_doctor_reads_behind_such_a_url(cli, server, tmp_path):
    clean(cli("doctor", "--scheduler", "serial", "--data", server.get()))
    clean(cli("doctor", "--scheduler", "serial", "--data", server.get("none")), 5)
    clean(cli("doctor", "--scheduler", "tcp://hushuser:hushword@127.0.0.1:1"), 6)


@pytest.mark.parametrize(
    "where", ["tcp://hushuser:hushword@127.0.0.1:8786", "hushuser:hushword@127.0.0.1:8786", "tcp://127.0.0.1:1?hushsig"]
)
def test_the_address_of_a_scheduler(cli, project, where):
    outcome = cli("train", project().config, "--scheduler", where)
    assert outcome.code in (3, 6)
    assert secrets_in(outcome.out + outcome.err) == []


# Going on -----------------------------------------------------------------------------------------------------------


def _with_path(job: Project, before: str, after: str) -> None:
    text = job.config.read_text()
    assert before in text
    job.config.write_text(text.replace(before, after))


def test_a_run_goes_on_with_the_same_secret_and_with_a_renewed_one(cli, at, server):
    clean(cli("train", at.config))
    clean(cli("train", at.config, "--set", "train.rounds=3"))
    _with_path(at, server.get(), server.get(signature="hushnew", user="hushword@"))
    clean(cli("train", at.config, "--set", "train.rounds=4"))
    assert kept(at.run)[-1] == 4


def test_a_run_does_not_go_on_with_other_data_behind_another_query(cli, at, server):
    clean(cli("train", at.config))
    _with_path(at, server.get("a"), server.get("b"))
    outcome = clean(cli("train", at.config, "--set", "train.rounds=3"), 5)
    assert "x have been modified" in outcome.err
    assert kept(at.run)[-1] == 2


def test_references_whose_signatures_are_renewed(cli, project, server, tmp_path):
    """Their files may be renewed too, and other ones are noticed."""

    def refer(url: str) -> None:
        root = tmp_path / "served/a"
        files = [path for path in root.rglob("*") if path.is_file()]
        refs: dict[str, Any] = {
            str(path.relative_to(root)): path.read_text()
            if path.name == "zarr.json"
            else [f"{url}/{path.relative_to(root)}"]
            for path in files
        }
        Path("refs.json").write_text(json.dumps({"version": 1, "refs": refs}))

    refer(server.get(user=""))
    job = project({"data": {"path": str(Path("refs.json").absolute())}})
    clean(cli("plan", job.config))
    clean(cli("train", job.config))
    assert secrets_in(files_of(job.run)) == []
    refer(server.get(user="", signature="hushnew"))
    clean(cli("train", job.config, "--set", "train.rounds=3"))
    refer(server.get("b", user=""))
    clean(cli("train", job.config, "--set", "train.rounds=4"), 5)
    refer(server.get("gone", user="", signature="hushnew"))
    clean(cli("train", job.config, "--set", "train.rounds=4"), 5)
    refer(server.get())
    clean(cli("plan", job.config), 3)


def test_a_run_does_not_go_on_at_another_host_or_path(cli, at, server):
    clean(cli("train", at.config))
    _with_path(at, server.get("a"), server.get("a").replace("/get?", "/got?"))
    assert clean(cli("train", at.config), 5)


# Evaluating ---------------------------------------------------------------------------------------------------------


def test_an_evaluation_says_that_the_run_has_not_kept_them_and_how_to_give_them(cli, at, server):
    clean(cli("train", at.config))
    for command in (["eval"], ["predict", "--out", "new.zarr"], ["export", "--to", "safetensors", "--out", "new"]):
        outcome = clean(cli(*command, at.run), 3)
        assert "/get?***: a run keeps no user, query or fragment of a URL" in outcome.err
        assert "--data URL or --set data.path=URL" in outcome.err
    given = clean(cli("--json", "eval", at.run, "--set", f"data.path={server.get(signature='hushnew')}"))
    named = clean(cli("--json", "eval", at.run, "--data", server.get(), "--split", "test"))
    assert last(given)["loss"] == last(named)["loss"]
    clean(cli("predict", at.run, "--data", server.get(), "--out", "new.zarr"))
    assert secrets_in(files_of(Path("new.zarr"))) == []
    clean(cli("export", at.run, "--set", f"data.path={server.get()}", "--to", "safetensors", "--out", "new.st"))
    (card,) = Path().glob("new.st*.md")
    assert "/get?***" in card.read_text()
    assert secrets_in(card.read_text()) == []


def test_predictions_go_on_with_a_renewed_secret(cli, at, server):
    clean(cli("train", at.config))
    predict = ("predict", at.run, "--out", "new.zarr")
    clean(cli(*predict, "--data", server.get()))
    next(Path("new.zarr/label/c").iterdir()).unlink()
    clean(cli(*predict, "--continue", "--data", server.get(signature="hushnew")))
    refused = clean(cli(*predict, "--continue", "--data", server.get("b")), 4)
    assert "begun with other settings" in refused.err


def test_a_configuration_that_is_written_for_such_a_url_is_said_to_hold_it(cli, server):
    outcome = clean(cli("init", "new", "--data", server.get()))
    assert "holds the whole URL" in " ".join(outcome.err.split())
    assert server.get() in Path("new/dtrain.toml").read_text()


@pytest.mark.alone
def test_workers_of_a_local_cluster_say_nothing_of_them(script, at, server):
    clean(script("train", at.config, "--scheduler", "local", "--set", "cluster.workers=2", timeout=200))
    server.fail("x/c/1", 403)
    failed = script("train", at.config, "--scheduler", "local", "--run", "second", timeout=200)
    assert "/get?***: access to x/c/1" in clean(failed, 5).err


def test_other_data_behind_another_query_is_evaluated_as_such(cli, at, server):
    clean(cli("train", at.config))
    other = clean(cli("--json", "eval", at.run, "--data", server.get("c"), "--split", "test"))
    assert last(other)["samples"] == 8  # a tenth of its own rows
    refused = clean(cli("eval", at.run, "--set", f"data.path={server.url}/other?sig=hushsig"), 3)
    assert "not what the run has" in refused.err


def test_an_argument_of_the_model(cli, project, server):
    model = "from torch import nn\n\n\ndef build(url):\n    assert 'hush' in url\n    return nn.Linear(3, 4)\n"
    job = project({"model_args": {"url": "https://host/w?sig=hushsig"}}, model=model)
    clean(cli("train", job.config))
    assert secrets_in(files_of(job.run)) == []
    refused = clean(cli("eval", job.run), 3)
    assert "model_args" in refused.err
    clean(cli("eval", job.run, "--set", "model_args.url=https://host/w?sig=hushnew"))


# Python -------------------------------------------------------------------------------------------------------------


def test_what_python_prints(server):
    samples = dtrain.open_samples(server.get(), inputs=["x"], targets=["label"])
    tables: dict[str, Any] = {"train": {"loss": "cross_entropy", "rounds": 1}, "cluster": "serial", "run_dir": "py"}

    def build() -> torch.nn.Module:
        return torch.nn.Linear(3, 4)

    plan = dtrain.plan(build, samples, train=tables["train"], cluster="serial")
    run = dtrain.train(build, samples, progress=False, **tables)
    texts = [f"{one!r} {one}" for one in (samples, samples.config, plan, run, run.config, run.config.data)]
    texts += [one._repr_html_() for one in (samples, plan, run)]
    assert [secrets_in(text) for text in texts] == [[]] * len(texts)
    assert np.isfinite(run.evaluate(split="test")["loss"])  # this process still knows them
    assert secrets_in(f"{run.partitions} {run.partitions.to_pandas().to_csv()}") == []
    opened = dtrain.load_run(run.directory, model=build)
    with pytest.raises(dtrain.errors.InvalidConfig, match="a run keeps no user, query or fragment"):
        opened.evaluate(split="test")
    assert opened.evaluate(samples, split="test") == run.evaluate(split="test")
