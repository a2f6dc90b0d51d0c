"""What a person sees of a run, on a terminal and elsewhere."""

import os
import pty
import re
import subprocess
import sys

import pytest

from wmtp_ds.progress import Display

METRICS = {
    "train/loss": 2.34567,
    "optim/grad_norm": 1.23456,
    "optim/lr": 1e-5,
    "perf/tokens_per_s": 12345.6,
    "perf/step_time": 2.0,
}


def test_plain_lines_where_there_is_no_terminal(capsys):
    display = Display(True, total_steps=40)
    display.step(1, METRICS, log=True)
    display.step(2, METRICS, log=False)
    display.say("a word")
    display.close()
    display.close()  # twice does no harm
    out, err = capsys.readouterr()
    assert out == "", "standard output belongs to programs"
    first, second = err.splitlines()
    assert first == ("step      1/40    2.5%  loss 2.3457  norm 1.23  lr 1.00e-05  12,346 tok/s  ETA 0:01:18")
    assert second == "a word"


def test_eta_is_the_pace_so_far(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("wmtp_ds.progress.time.monotonic", lambda: now[0])
    display = Display(True, total_steps=110)
    for step in (11, 12, 13):  # a resumed run
        display.step(step, METRICS, log=True)
        now[0] += 10.0
    found = re.findall(r"ETA (\S+)", capsys.readouterr().err)
    assert found == ["0:03:18", "0:16:20", "0:16:10"]


def test_other_ranks_say_nothing(capsys):
    display = Display(False, total_steps=40)
    display.step(1, METRICS, log=True)
    display.say("a word")
    display.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "text",
    [
        "data/train.jsonl:100: not JSON",  # :100: is the name of a picture
        "stage_configs/x.toml:12 :warning: [bold]not bold[/bold] [0.0, 0.5]",
        "a very long line " * 20,
        "[/] {braces} \\ 100%",
    ],
)
def test_text_is_shown_as_it_is(capsys, text):
    Display(True, total_steps=1).say(text)
    assert capsys.readouterr().err == f"{text}\n"


def test_a_diverged_loss_is_shown(capsys):
    Display(True, total_steps=40).step(1, METRICS | {"train/loss": float("nan"), "optim/grad_norm": float("inf")}, True)
    assert "loss nan  norm inf" in capsys.readouterr().err


ON_A_TERMINAL = """
from wmtp_ds.progress import Display
import time
metrics = dict({!r})
display = Display(True, 4)
for step in range(1, 5):
    display.step(step, metrics, log=step == 2)
    time.sleep(0.15)
display.say("a word")
display.close()
"""


def test_a_bar_on_a_terminal():
    reader, writer = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL.format(METRICS)], stderr=writer, env=environment)
    os.close(writer)
    seen = b""
    try:
        while chunk := os.read(reader, 65536):
            seen += chunk
    except OSError:  # the other end is closed
        pass
    os.close(reader)
    assert process.wait(20) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert "training" in text
    assert "4/4" in text
    assert "loss 2.3457" in text
    assert "ETA" in text
    assert "step      2/4   50.0%" in text
    assert "a word" in text
