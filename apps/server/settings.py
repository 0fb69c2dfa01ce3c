"""What the server allows, and what it does where a request leaves something open."""
from dataclasses import dataclass, field

from edgeattn.generation import SamplerOptions


@dataclass(frozen=True)
class Settings:
    """
    api_key        what clients must show, or None
    cors_origins   web pages that may call the server from another origin ("*": all)
    allowed_hosts  names in the Host header besides localhost and IP addresses ("*": all)
    local          whether only this machine can reach the server
    max_body       bytes of a request
    max_tokens     most tokens of an answer that a client may ask for; -1: what the context holds
    max_choices    answers of one request: n times prompts
    time_limit     seconds of a request, waiting included
    write_limit    seconds that a client may leave what it was sent unread, or not send what it announced
    wait_limit     seconds that a request may wait until it is read and tokenized
    sampling, stop  defaults of requests
    """
    api_key: str | None = field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    local: bool = True
    max_body: int = 8 << 20
    max_tokens: int = -1
    max_choices: int = 64
    time_limit: float = 600.0
    write_limit: float = 30.0
    wait_limit: float = 30.0
    sampling: SamplerOptions = SamplerOptions()
    stop: tuple[str, ...] = ()
