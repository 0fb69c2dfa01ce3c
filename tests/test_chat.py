"""generate and chat as a user meets them: through pipes, in a terminal, interrupted."""
import os
import pty
import re
import select
import signal
import subprocess
import time

import pytest

from edgeattn.conversation import Conversation
from edgeattn.generation import SamplerOptions, generate
from edgeattn.kernels_cpu import CACHE_FOLDER
from edgeattn.runtime import Model
from edgeattn.tokenizer import Tokenizer

from command import EDGEATTN


def test_generate_is_seeded_and_prints_only_the_text(edgeattn, nano_int4):
    def run(seed):
        return edgeattn("generate", "-m", nano_int4, "-p", "The king said", "-n", 12, "-s", seed, "-c", 256)
    one, same, other = run(1), run(1), run(2)
    assert one.returncode == 0 and one.stdout == same.stdout != other.stdout and len(one.stdout) > 12
    assert re.search(r"12 tokens at [\d.]+ t/s .* seed 1$", one.stderr.strip().splitlines()[-1])


def test_generate_reads_files_and_pipes_and_stops(edgeattn, nano_int4, tmp_path):
    (tmp_path / "prompt.txt").write_text("One, two, three,\n")
    asked = ["-m", nano_int4, "--temp", 0, "-c", 256, "-n", 20]
    by_file, by_pipe = edgeattn("generate", "-f", tmp_path / "prompt.txt", *asked), edgeattn("generate", *asked, stdin="One, two, three,")
    assert by_file.stdout == by_pipe.stdout and len(by_file.stdout) > 5
    middle = by_file.stdout[4:7]
    stopped = edgeattn("generate", "-p", "One, two, three,", *asked, "--stop", middle)
    assert stopped.stdout == by_file.stdout[:by_file.stdout.index(middle)] + "\n"


def test_prompt_must_fit(edgeattn, nano_int4):
    assert "no room in a context of 8" in edgeattn.fails("generate", "-m", nano_int4, "-c", 8, "-p", "word " * 50)


def test_piped_chat_prints_only_answers(edgeattn, nano_int4):
    lines = "hi\n\n/stats\n/clear\nhi\n/help\n/nope\n/exit\nnever\n"
    done = edgeattn("chat", "-m", nano_int4, "--temp", 0, "-n", 12, "-c", 512, stdin=lines)
    first, second = done.stdout.splitlines()
    assert done.returncode == 0 and first == second != ""
    for text in ("context", "forgotten", "/clear", "no command /nope"):
        assert text in done.stderr
    assert ">" not in done.stdout and "Traceback" not in done.stderr


def test_piped_chat_ends_with_its_input(edgeattn, nano_int4):
    done = edgeattn("chat", "-m", nano_int4, "--temp", 0, "-n", 4, "-c", 256, stdin="hi")
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    done = edgeattn("chat", "-m", nano_int4, "-p", "hi", "--temp", 0, "-n", 4, "-c", 256)
    assert done.returncode == 0 and done.stdout.count("\n") == 1


def test_cached_conversation_answers_as_a_fresh_one_would(nano_fp32):
    model, tokenizer, greedy = Model.load(nano_fp32, ctx_size=512), Tokenizer(nano_fp32), SamplerOptions(temperature=0)
    chat = Conversation(model, tokenizer, greedy, system="Be brief.", max_tokens=20)
    for question in ("Who built the Eiffel Tower?", "When was that?", "And why?"):
        answer = chat.say(question)
        if question.startswith("When"):  # leave in the middle
            next(answer), answer.close()
        assert "".join(event.text for event in answer) or chat.messages[-1]["role"] == "assistant"
    ids = tokenizer.encode_chat(chat.messages[:-1])
    fresh = generate(model, tokenizer, model.new_sequence(), ids, greedy, max_tokens=20)
    assert [event.token for event in fresh if event.token is not None] == chat.last.tokens
    assert 0 < chat.last.timings.prompt_tokens < len(ids) / 2


def test_closed_pipe_is_no_error(nano_int4):
    command = " ".join(EDGEATTN) + f" generate -m {nano_int4} -p 'The king' -n 100 -c 256 | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_ctrl_c_ends_a_generation_in_order(nano_int4):
    child = subprocess.Popen([*EDGEATTN, "generate", "-m", str(nano_int4), "-p", "The king", "-n", "-1", "-s", "1"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.read(5)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "interrupted" in err and "Traceback" not in err


def test_warm_start_is_quick(edgeattn, nano_int4):
    edgeattn("generate", "-m", nano_int4, "-p", "x", "-n", 1)  # compiles what is not cached yet
    start = time.perf_counter()
    subprocess.run([*EDGEATTN, "generate", "-m", nano_int4, "-p", "x", "-n", "1"], check=True)
    assert time.perf_counter() - start < 10  # 2 s on an idle machine


# ---- in a terminal -------------------------------------------------------------------------------------------------
class Terminal:
    """The command on a pseudo-terminal: send(text), expect(text) -> all that was printed up to it."""

    def __init__(self, *arguments, home, term="dumb"):
        self._master, slave = pty.openpty()
        environment = os.environ | {"TERM": term, "XDG_CACHE_HOME": str(home), "XDG_DATA_HOME": str(home / "data"),
                                    "NUMBA_CACHE_DIR": str(CACHE_FOLDER.parent.parent)}
        self.process = subprocess.Popen([*EDGEATTN, *map(str, arguments)], stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self._seen = ""

    def send(self, text):
        os.write(self._master, text.encode())

    def expect(self, text, seconds=120):
        end = time.monotonic() + seconds
        while text not in self._seen:
            ready, _, _ = select.select([self._master], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {text!r} came; the terminal shows {self._seen!r}"
            self._seen += os.read(self._master, 4096).decode()
        before, _, self._seen = self._seen.partition(text)
        return before.replace("\r\n", "\n")

    def wait(self):
        try:
            while os.read(self._master, 4096):  # a full terminal would hold the process
                pass
        except OSError:  # its end
            pass
        return self.process.wait(60)


@pytest.fixture
def terminal(nano_int4, tmp_path):
    opened = []

    def open_(*arguments):
        opened.append(Terminal("chat", "-m", nano_int4, "-c", 2048, "-s", 1, *arguments, home=tmp_path))
        return opened[-1]
    yield open_
    for one in opened:
        one.process.kill()


def test_terminal_chat(terminal):
    screen = terminal("-n", 8, "--temp", 0)
    screen.expect("/help lists commands")
    screen.expect("> ")
    screen.send("hi\n")
    assert len(screen.expect("\n> ").strip().splitlines()) == 2  # the echo, the answer
    screen.send("/stats\n")
    assert re.search(r"context \d+ of 2048 tokens", screen.expect("\n> "))
    screen.send("\x04")
    assert screen.wait() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal):
    screen = terminal("-p", "Tell me about the history of the world.", "--temp", "2", "--top-k", "0", "--top-p", "1", "--min-p", "0")
    screen.expect("\n")
    time.sleep(0.5)
    screen.process.send_signal(signal.SIGINT)
    screen.expect("> ")
    screen.process.send_signal(signal.SIGINT)  # at the prompt: a fresh one
    screen.expect("> ")
    screen.send("/stats\n")
    assert "interrupted" in screen.expect("\n> ")
    screen.send("/exit\n")
    assert screen.wait() == 0
