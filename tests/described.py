"""Requests that our own OpenAPI document allows, or forbids."""
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode


def statuses(description, path: str, method: str, mode: GenerationMode, examples: int) -> set[int] | None:
    """Of the answers to so many requests, of which none may be an error of the server's; None: nothing can be wrong with a request that
    takes nothing."""
    found = set()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(description[path][method].as_strategy(generation_mode=mode))
    def try_it(case):
        answer = case.call()
        found.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        assert answer.status_code < 400 or answer.json()["error"]["message"]
    try:
        try_it()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE
        return None
    return found
