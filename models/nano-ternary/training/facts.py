"""Rows of sampled text, and look-up chats: facts planted in text, then questions about them (as models/nano was taught)."""
import numpy as np

NOUNS = ("harbor garden museum library station bridge castle market tower school forest river island temple valley farm mill chapel "
         "lighthouse theatre bakery archive stable orchard quarry ferry palace tavern cellar workshop").split()
ADJECTIVES = ("old blue silent northern golden broken hidden western little frozen red upper lower quiet distant royal wooden green "
              "iron crooked eastern narrow bright ancient white hollow southern grand misty stone").split()
WORDS = ("apple copper violet thunder marble saffron willow ember raven cobalt maple falcon amber cedar coral dagger ivory jasmine "
         "kettle lantern magnet nectar onyx pepper quartz ribbon silver topaz umber velvet walnut zephyr").split()
STYLES = [(" The secret code of the", " is", "What is the secret code of the", "?", "The secret code of the", " is", "."),
          (" Remember: the key for the", " is", "Which key belongs to the", "?", "The key for the", " is", "."),
          ("\n[note] the", " :", "What does the note say about the", "?", "the", " :", ""),
          (" It was written that the password of the", " was", "Tell me the password of the", ".", "The password of the", " was", ".")]
ANSWER, TEXT = 4.0, 0.3  # weights of a look-up chat's tokens


class Facts:
    def __init__(self, tokenizer, stream, seed=0):
        self.rng, self.stream = np.random.default_rng(seed), stream
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.start, self.end, self.pad = (tokenizer.token_to_id(f"<|{name}|>") for name in ("im_start", "im_end", "endoftext"))
        self.subjects = [self.encode(f" {a} {n}") for a in ADJECTIVES for n in NOUNS]
        self.values = sorted({i for word in WORDS for i in self.encode(f" {word}")} | {self.encode(str(d))[0] for d in range(10)})
        self.digits = [self.encode(str(d))[0] for d in range(10)]
        self.styles = [[self.encode(part) for part in style] for style in STYLES]
        self.user, self.assistant, self.line, self.stop = (self.encode(text) for text in ("user\n", "assistant\n", "\n", "."))

    def batch(self, rows, length, share):
        """ids [rows, length] int64 and the weight of predicting each token's successor [rows, length] float32."""
        made = [self.chat(length) if self.rng.random() < share else self.text(length) for _ in range(rows)]
        return np.stack([m[0] for m in made]), np.stack([m[1] for m in made])

    def text(self, length):
        at = int(self.rng.integers(0, len(self.stream) - length))
        return self.stream[at:at + length].astype(np.int64), np.ones(length, np.float32)

    def value(self):
        draw = self.rng.random()
        if draw < 0.4:
            return [int(i) for i in self.rng.choice(self.digits, size=int(self.rng.integers(3, 7)))]
        if draw < 0.8:
            return [int(i) for i in self.rng.choice(self.values, size=int(self.rng.integers(2, 6)))]
        return self.subjects[int(self.rng.integers(len(self.subjects)))]

    def chat(self, length):
        rng = self.rng
        count = int(rng.integers(4, 40)) if length > 1500 else int(rng.integers(1, 10))
        pre, mid, ask, ask_end, reply, reply_mid, reply_end = self.styles[int(rng.integers(len(self.styles)))]
        facts, turns = [], []
        for n in rng.permutation(len(self.subjects))[:count]:
            value, subject = self.value(), self.subjects[n]
            facts.append(pre + subject + mid + value + self.stop)
            turns.append((ask + subject + ask_end, reply + subject + reply_mid + value + reply_end))
        tail, tail_weights = [], []
        for j, k in enumerate(rng.permutation(count)[:int(rng.integers(1, 17))]):
            question, answer = turns[k]
            part = ([] if j == 0 else [self.start, *self.user]) + question + [self.end, *self.line, self.start, *self.assistant]
            tail += part + answer + [self.end, *self.line]
            tail_weights += [0.0] * len(part) + [ANSWER] * (len(answer) + 1) + [0.0] * len(self.line)
        room = length + 1 - len(tail) - sum(map(len, facts)) - 8
        if room < 32:
            return self.text(length)
        text = self.text(room - 1)[0]
        body, begin = [], 0
        for cut, fact in zip(np.sort(rng.integers(0, len(text), count)), facts):
            body += [*text[begin:cut].tolist(), *fact]
            begin = cut
        body += [*text[begin:].tolist(), *self.line]
        ids = ([self.start, *self.user] + body + tail)[:length]
        weights = ([0.0] * (1 + len(self.user)) + [TEXT] * len(body) + tail_weights)[1:length + 1]
        return (np.array(ids + [self.pad] * (length - len(ids)), np.int64),
                np.array(weights + [0.0] * (length - len(weights)), np.float32))
