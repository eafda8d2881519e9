"""``genkit-demo``: one line for input that does not work; others than this machine need a flag and a password."""

import os
import subprocess
import sys

import pytest
from genkit_apps import cli
from genkit_apps.cli import InputError, check_access, login


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--public"),
        (["--host", "0.0.0.0", "--password", "long enough"], "--public"),
        (["--host", "example.org"], "--public"),
        (["--host", "::"], "--public"),
        (["--host", "0.0.0.0", "--public"], "--password"),
        (["--share"], "--password"),
        (["--share", "--password", "short"], "8 or more"),
        (["--password", ""], "8 or more"),
        (["--runs", "/no/such/folder"], "no such folder"),
        (["--port", "70000"], "--port"),
        (["--port", "x"], "--port"),
        (["--max-queue", "0"], "--max-queue"),
        (["--nope"], "--nope"),
        (["extra"], "extra"),
        (["--model", "/no/such/file.safetensors"], "not a file"),
        (["--device", "warp"], "device"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, words, capsys, monkeypatch):
    monkeypatch.delenv("GENKIT_DEMO_PASSWORD", raising=False)
    assert cli.invoke(arguments) == 2
    said = capsys.readouterr().err.replace("loading ...\n", "")
    assert words in said
    assert said.count("\n") == 1
    assert "Traceback" not in said


def test_a_model_that_cannot_be_loaded_is_one_line_whatever_its_library_raises(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("_class_name")

    monkeypatch.setattr("genkit_apps.models.load", broken)
    assert cli.invoke(["--model", "owner/name"]) == 2
    said = capsys.readouterr().err.replace("loading ...\n", "")
    assert "owner/name" in said
    assert "KeyError" in said
    assert said.count("\n") == 1


def test_it_takes_its_folder_along_when_it_is_ended(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "genkit_apps", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True) as running:
        assert "127.0.0.1" in running.stdout.readline()
        assert list(tmp_path.glob("genkit-demo-*"))
        running.terminate()
        running.communicate(timeout=60)
    assert not list(tmp_path.glob("genkit-demo-*"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.1"])
def test_this_machine_needs_no_password(host):
    check_access(host, False, False, None)


def test_with_flag_and_password_others_may_come_in():
    check_access("0.0.0.0", True, False, "long enough")
    check_access("127.0.0.1", False, True, "long enough")
    with pytest.raises(InputError):
        check_access("127.0.0.1", True, False, None)


def test_login_takes_any_name_and_only_the_password():
    check = login("pässword 1")
    assert check("any", "pässword 1")
    assert not check("any", "pässword 2")
    assert not check("pässword 1", "")


def test_help_loads_neither_torch_nor_gradio():
    code = (
        "import sys; from genkit_apps.cli import invoke; assert invoke(['--help']) == 0; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'gradio', 'numpy', 'genkit')))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--password" in done.stdout
