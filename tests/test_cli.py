"""The command line itself: verbs, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import onnx.parser
import pytest
from command_line import call

from edgekd import cli

MODEL = """
<ir_version: 10, opset_import: ["" : 18]>
agraph (float[batch, 4] x) => (float[batch, 4] logits) { logits = Relu(x) }
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_help_lists_the_verbs_in_the_order_of_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    told = capsys.readouterr().out
    verbs = ["init", "compress", "distill", "quantize", "bench", "report", "targets", "doctor", "view", "bundle"]
    places = [told.index(f"\n  {verb} ") for verb in verbs]
    assert places == sorted(places)


def test_an_unknown_verb_or_option_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("compres") == 2
    assert call("compress", "--taget", "host") == 2
    assert "--target" in capsys.readouterr().err


def test_an_interrupt_is_exit_130_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import edgekd.pipeline

    def interrupted(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edgekd.pipeline, "compress", interrupted)
    assert call("compress") == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_bug_of_ours_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import edgekd.pipeline

    def broken(*given: object, **options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edgekd.pipeline, "compress", broken)
    monkeypatch.setattr(sys, "argv", ["edgekd", "compress"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_json_is_one_document_on_stdout(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("bench", str(model), "--quick", "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["models"][0]["latency_ms"]["n"] >= 50


def test_bench_of_what_is_no_model_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    for name in ("missing.onnx", "broken.onnx"):
        assert call("bench", str(tmp_path / name), "--quick") == 2
        told = capsys.readouterr().err.strip()
        assert len(told.splitlines()) == 1
        assert name in told


def test_report_of_a_folder_without_one_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("report", str(tmp_path)) == 2
    assert "no such report" in capsys.readouterr().err


def test_view_serves_the_model_on_this_machine_only_until_it_is_interrupted(model: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from edgekd.cli import main; main()", "view", str(model), "--no-browse"]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )  # fmt: skip
    try:
        page = b""
        for _ in range(100):
            try:
                with urllib.request.urlopen(f"http://localhost:{port}/", timeout=1) as answer:
                    page = answer.read()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        assert b"Netron" in page
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) in {0, 130}
    finally:
        process.kill()
        process.communicate()
