"""Tokens and their log probabilities as OpenAI's answers show them."""
from itertools import accumulate


def token_text(engine, token: int) -> str:
    """A token as text; one that is no whole character in the form that OpenAI uses, bytes:\\xe2\\x80."""
    if token in engine.special_tokens:
        return engine.tokenizer.backend.id_to_token(token) or ""
    found = engine.constraints.bytes_of(token)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def _bytes(engine, token):
    if token in engine.special_tokens:
        return list(token_text(engine, token).encode())
    return list(engine.constraints.bytes_of(token))


def chat_score(engine, score) -> dict:
    """An entry of a chat's logprobs.content."""
    top = [{"token": token_text(engine, token), "logprob": value, "bytes": _bytes(engine, token)} for token, value in score.top]
    return {"token": token_text(engine, score.token), "logprob": score.logprob, "bytes": _bytes(engine, score.token), "top_logprobs": top}


def completion_scores(engine, scores, offset: int) -> dict:
    """The logprobs of a completion; the chosen token is always among the top ones. offset: characters before the first token."""
    texts = [token_text(engine, score.token) for score in scores]
    tops = [None if score.logprob is None else {token_text(engine, token): value for token, value in reversed(score.top)}
            | {text: score.logprob} for score, text in zip(scores, texts)]
    offsets = list(accumulate(map(len, texts), initial=offset))[:len(texts)]
    return {"tokens": texts, "token_logprobs": [score.logprob for score in scores], "top_logprobs": tops, "text_offset": offsets}
