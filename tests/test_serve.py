"""edgeattn serve: what it refuses, and a server's life as a process."""
import os
import signal
import socket
import subprocess

import httpx
import openai
import pytest
from command import EDGEATTN


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7"])
def test_a_server_for_other_machines_needs_a_key(edgeattn, monkeypatch, host):
    monkeypatch.delenv("EDGEATTN_API_KEY", raising=False)
    assert "give a key" in edgeattn.fails("serve", "--host", host)


@pytest.mark.parametrize("key", ["", "two words", "schl\u00fcssel"])
def test_a_key_that_no_client_could_show_is_refused(edgeattn, key):
    """An empty one comes of a variable that is not set."""
    assert "visible ASCII characters" in edgeattn.fails("serve", "--api-key", key)


def test_a_taken_port_is_told_before_the_model_is_read(edgeattn):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in edgeattn.fails("serve", "-m", "no model", "--port", taken.getsockname()[1])


def test_a_server_answers_and_leaves_on_ctrl_c(nano_int4):
    command = [*EDGEATTN, "serve", "-m", nano_int4, "--port", "0", "-c", "512", "--host", "0.0.0.0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"EDGEATTN_API_KEY": "s3cret"}) as server:
        lines = []
        while not lines or "http://" not in lines[-1]:
            lines.append(server.stderr.readline())
            assert lines[-1], lines
        port = lines[-1].split(" at http://0.0.0.0:")[1].split()[0]
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="s3cret", max_retries=0) as client:
            messages = [{"role": "user", "content": "Hello"}]
            assert client.chat.completions.create(model="nano", messages=messages, max_tokens=3).usage.completion_tokens > 0
            stream = client.chat.completions.create(model="nano", messages=messages, stream=True, logit_bias={"0": -100, "2": -100})
            next(stream)
            assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
            server.send_signal(signal.SIGINT)  # while an answer is on its way
            out, err = server.communicate(timeout=60)
    assert server.returncode == 0 and out == "" and "Traceback" not in err and "s3cret" not in "".join(lines) + err
