"""The results tab: the reader of run folders against genkit-eval's own, what it refuses, and the events over the API."""

import json
import os
import re
import shutil
from pathlib import Path

import gradio as gr
import pytest
from genkit_apps import app, tables
from genkit_apps.models import Models
from genkit_apps.results_reader import Folder, Unreadable, picture
from genkit_apps.tabs import results
from genkit_eval import pareto
from genkit_eval.runs import read_run
from genkit_eval.table import metric_order
from gradio_client.exceptions import AppError
from PIL import Image

from tests.apps.pages import errors, served

SWEEP = Path(__file__).parents[2] / "docs" / "runs" / "sweep.json"


@pytest.fixture
def runs(tmp_path):
    """A folder with a run that is finished, one that has begun, and files that are neither."""
    found = json.loads(SWEEP.read_text())
    found["guidances"] = found["guidances"][:5]
    finished = tmp_path / "runs" / "sweeps" / "one"
    for entry in found["guidances"]:
        (finished / entry["slug"] / "blocks").mkdir(parents=True)
        (finished / entry["slug"] / "blocks" / "00000.safetensors").touch()
        Image.new("RGB", (8, 8), "red").save(finished / entry["slug"] / "grid.png")
        entry["grid"] = f"{entry['slug']}/grid.png"
    (finished / "results.json").write_text(json.dumps(found))
    begun = tmp_path / "runs" / "begun"
    (begun / "cfg-1" / "blocks").mkdir(parents=True)
    (begun / "run.json").write_text(json.dumps({"model": "builtin/cifar10", "sampler": "heun", "steps": 8}))
    (tmp_path / "runs" / "notes.json").write_text("{}")
    (tmp_path / "outside").mkdir()
    shutil.copy(SWEEP, tmp_path / "outside" / "results.json")
    return tmp_path / "runs"


def test_runs_are_found(runs):
    shutil.copy(SWEEP, runs / "sweep.json")
    assert sorted(Folder(runs).names()) == ["begun", "sweep.json", "sweeps/one"]


def test_numbers_and_front_are_those_of_genkit_eval(runs):
    shutil.copy(SWEEP, runs / "sweep.json")
    theirs, ours = read_run(SWEEP), Folder(runs).read("sweep.json")
    assert ours.metrics == tuple(metric_order({name for entry in theirs.entries for name in entry["metrics"]}))
    for names in (("frechet", "recall", "nfe"), ("nfe", "frechet"), ("recall", "kid")):
        assert ours.front(names) == pareto.front(theirs.entries, names)
        assert any(ours.front(names))
    for mine, entry in zip(ours.entries, theirs.entries, strict=True):
        assert (mine.label, mine.n, mine.nfe) == (entry["label"], entry["n"], entry["cost"]["nfe_mean"])
        for name, metric in mine.metrics.items():
            known = entry["metrics"][name]
            interval = known["interval"] and tuple(known["interval"])
            assert (metric.value, metric.interval, metric.variant) == (known["value"], interval, known["variant"])


def test_a_run_is_watched_from_its_beginning(runs):
    folder = Folder(runs)
    assert folder.read("begun").status == "begun"
    before = folder.stamp("begun")
    assert folder.stamp("begun") == before
    (runs / "begun" / "cfg-1" / "blocks" / "00000.safetensors").touch()
    assert folder.stamp("begun") != before
    assert folder.read("begun").blocks == 1
    found = json.loads((runs / "sweeps" / "one" / "results.json").read_text())
    (runs / "begun" / "results.json").write_text(json.dumps({**found, "status": "partial"}))
    assert (folder.read("begun").status, len(folder.read("begun").entries)) == ("partial", 5)


def test_what_cannot_be_listed_is_left_out(runs):
    (runs / "gone").mkdir()
    os.symlink(runs / "nowhere", runs / "gone" / "results.json")
    strange = os.fsencode(runs) + b"/\xff"
    os.mkdir(strange)
    shutil.copy(SWEEP, strange + b"/results.json")
    assert sorted(Folder(runs).names()) == ["begun", "sweeps/one"]


@pytest.mark.parametrize(
    "name",
    [
        "\ud800",
        "a" * 400,
        "..",
        "../outside",
        "../outside/results.json",
        "/etc/passwd",
        "sweeps/../../outside",
        "link",
        "a\0b",
        "",
    ],
)
def test_nothing_outside_the_folder_is_opened(runs, name):
    os.symlink(runs.parent / "outside", runs / "link")
    folder = Folder(runs)
    for ask in (folder.read, folder.stamp):
        with pytest.raises(Unreadable):
            ask(name)
    assert "link" not in folder.names()


def test_links_out_of_the_folder_are_not_followed(runs):
    one, outside = runs / "sweeps" / "one", runs.parent / "outside"
    Image.new("RGB", (8, 8)).save(outside / "secret.png")
    slug = json.loads((one / "results.json").read_text())["guidances"][0]["slug"]
    (one / slug / "grid.png").unlink()
    os.symlink(outside / "secret.png", one / slug / "grid.png")
    assert [entry.grid is None for entry in Folder(runs).read("sweeps/one").entries] == [True, *[False] * 4]
    (one / "results.json").unlink()
    os.symlink(outside / "results.json", one / "results.json")
    with pytest.raises(Unreadable, match="link out"):
        Folder(runs).read("sweeps/one")


def _without(found, *path):
    part = found
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    return json.dumps(found)


DAMAGE = {
    "half": lambda found: json.dumps(found)[:5000],
    "empty": lambda found: "",
    "list": lambda found: "[]",
    "deep": lambda found: "[" * 100_000,
    "schema": lambda found: json.dumps({**found, "schema": "genkit-eval/99"}),
    "entries": lambda found: json.dumps({**found, "guidances": 3}),
    "entry": lambda found: json.dumps({**found, "guidances": ["x"]}),
    "label": lambda found: _without(found, "guidances", 0, "label"),
    "value": lambda found: _without(found, "guidances", 0, "metrics", "frechet", "value"),
    "infinite": lambda found: json.dumps(found).replace('"nfe_mean": 8.0', '"nfe_mean": Infinity'),
    "word": lambda found: json.dumps(found).replace('"nfe_mean": 8.0', '"nfe_mean": "many"'),
    "binary": lambda found: "\0\1\2",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_told(runs, kind):
    file = runs / "sweeps" / "one" / "results.json"
    text = DAMAGE[kind](json.loads(file.read_text()))
    assert text != file.read_text()
    file.write_text(text)
    with pytest.raises(Unreadable):
        Folder(runs).read("sweeps/one")


def test_damaged_pictures_are_told(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("<svg/>")
    assert picture(tmp_path / "whole.png").size == (64, 64)
    for name in ("half.png", "text.png", "none.png"):
        with pytest.raises(Unreadable):
            picture(tmp_path / name)


def test_the_table_keeps_numbers_and_escapes_text():
    heads = [tables.Heading("<b>"), tables.Heading("name", "below", text=True)]
    made = tables.table(
        "c<", heads, [[tables.Cell(12345.678), tables.Cell("<script>alert(1)</script>", "1 to 2")], [tables.Cell(None)] * 2]
    )
    assert "<script" not in made
    assert "<b>" not in made
    assert re.findall(r'data-sort="([^"]*)"', made) == ["12345.678", "&lt;script&gt;alert(1)&lt;/script&gt;", "", ""]
    assert "<small>1 to 2</small>" in made


@pytest.fixture
def client(runs):
    with served("results", Models(), runs) as found:
        yield found


def test_watching_reads_only_what_is_new(runs):
    with gr.Blocks():
        tab = results._Tab(app.Context(Models(), runs=runs), Folder(runs))
        tab.draw()
    folder, place = runs / "sweeps" / "one", 8  # of the state among the outputs
    seen = tab.read("sweeps/one")[place]

    def changed():
        return [k for k, v in enumerate(tab.again("sweeps/one", seen, "nfe", "recall")) if v != gr.skip()]

    assert changed() == []
    next(folder.glob("*/blocks")).joinpath("00001.safetensors").touch()
    assert changed() == [0, place]  # the status says how many blocks there are
    found = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**found, "guidances": found["guidances"][:2]}))
    again = tab.again("sweeps/one", seen, "nfe", "recall")
    assert again[1].count("<tr>") == 3
    assert "Recall (higher is better) over NFE" in again[2]  # the axes stay as they were chosen


def test_the_tab_over_the_api(client, runs):
    assert client.predict(api_name="/results_runs")[0] in ("begun", "sweeps/one")
    run = client.predict("sweeps/one", api_name="/results")
    theirs = json.loads((runs / "sweeps" / "one" / "results.json").read_text())["guidances"]
    assert [entry["metrics"]["frechet"]["value"] for entry in run["guidances"]] == [
        e["metrics"]["frechet"]["value"] for e in theirs
    ]
    status, table, plot, _, *rest = client.predict("sweeps/one", api_name="/results_open")
    assert "5 guidances" in status
    assert table.count("<tr>") == 6
    assert "fd/cifar10" in table
    assert 'alt="FD-CIFAR10' in plot
    assert not errors(rest)
    plot, *rest = client.predict("sweeps/one", "recall", "frechet", api_name="/results_plot")
    assert "over Recall" in plot
    assert not errors(rest)
    with pytest.raises(AppError, match="outside the folder"):
        client.predict("../outside", api_name="/results")
    for name in ("../outside", "/etc/passwd", "notes.json"):
        assert len(errors(client.predict(name, api_name="/results_open"))) == 1
    status, *_ = client.predict("begun", api_name="/results_open")
    assert "no guidance is finished yet" in status
    (runs / "sweeps" / "one" / "results.json").write_text("{")
    assert "damaged" in errors(client.predict("sweeps/one", api_name="/results_open"))[0]
