"""edgeattn serve: OpenAI's API on this machine."""
import argparse
import os
import re
import sys

from edgeattn.apps import options

HELP = "serve a model over HTTP, with OpenAI's API"
CHANGEABLE = ("cache_type_k", "cache_type_v", "kv_bits", "kv_storage", "kv_budget", "kv_eviction", "sparse_attention", "sparse_budget",
              "sparse_prefill", "sparse_min_len", "ctx_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; beyond this machine (0.0.0.0) a key "
                       "is needed (127.0.0.1)")
    group.add_argument("--port", type=options.whole(0), default=8080, metavar="N", help="port; 0 takes a free one (8080)")
    group.add_argument("--api-key", metavar="KEY", help="what clients must send as Authorization: Bearer KEY; better in EDGEATTN_API_KEY, "
                       "where other users of this machine cannot see it")
    group.add_argument("--allowed-host", action="append", default=[], metavar="NAME", help="a name by which clients call the server, "
                       "besides localhost and addresses; may be repeated")
    group.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN", help="a web page's origin, such as "
                       "https://example.com, that may call the server; may be repeated")
    group.add_argument("-np", "--parallel", type=options.whole(1), default=4, metavar="N", help="answers that are computed together (4)")
    group.add_argument("--max-waiting", type=options.whole(0), default=256, metavar="N", help="requests that may wait; more "
                       "are refused with 503 (256)")
    group.add_argument("--timeout", type=options.whole(1), default=600, metavar="S", help="seconds of a request, waiting included (600)")
    group.add_argument("--max-body", type=options.size, default=8 << 20, metavar="N", help="most bytes of a request (8M)")
    group.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="keep the page's conversations on disk (they "
                       "are)")
    options.add_model(parser)
    options.add_sampling(parser, predict=-1)


def main(args: argparse.Namespace) -> int:
    import socket
    settings = _settings(args)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:  # before the model is read
        listening = socket.create_server((args.host, args.port), family=family, backlog=1024)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno > 0 else error.strerror.split(" (")[0]
        raise ValueError(f"cannot listen on {args.host} port {args.port}: {why}; choose another --port (0: a free one) or --host") from None
    with listening:
        return _serve(args, settings, listening)


def _settings(args):
    """ValueError: not safe."""
    from edgeattn.apps.server.settings import Settings
    key, local = args.api_key, _is_local(args.host)
    if key is None:
        key = os.environ.get("EDGEATTN_API_KEY") or None
    if key is not None and not re.fullmatch("[!-~]+", key):  # an empty one, of a variable that is not set, must not open the server
        raise ValueError("the key must be of visible ASCII characters without spaces, and not empty")
    if not local and not key:
        raise ValueError(f"--host {args.host} is open to other machines: give a key, --api-key KEY or EDGEATTN_API_KEY")
    return Settings(key, tuple(args.cors_origin), tuple(name.lower() for name in args.allowed_host), local, args.max_body, args.predict,
                    time_limit=args.timeout, sampling=options.sampler_options(args), stop=tuple(args.stop))


def _is_local(host):
    import ipaddress
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _serve(args, settings, listening):
    import uvicorn

    from edgeattn.apps import models
    from edgeattn.apps.server import connection
    from edgeattn.apps.server.app import make_app
    from edgeattn.apps.server.engine import Engine

    def load(changes):
        if unknown := set(changes) - set(CHANGEABLE):
            raise ValueError(f"cannot be changed while the server runs: {', '.join(sorted(unknown))}")
        return models.load(argparse.Namespace(**{**vars(args), **changes}), chat=False)
    engine = Engine(*load({}), load=load, parallel=args.parallel, most_waiting=args.max_waiting).start()

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame):
            engine.stop()  # or streams would keep the server waiting
            super().handle_exit(sig, frame)
    app = make_app(engine, settings, (_page(engine, settings, args),))
    host, port = listening.getsockname()[:2]
    print(f"{engine.name} at http://{f'[{host}]' if ':' in host else host}:{port} (chat page; OpenAI's API: /v1); Ctrl-C ends it",
          file=sys.stderr, flush=True)
    try:
        Server(connection.config(app, args.parallel + args.max_waiting + 256)).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        engine.close()
    models.explain(args, engine.model)
    return 0


def _page(engine, settings, args):
    """The chat page's routes; where its conversations cannot be kept, it says why and works without."""
    from edgeattn.apps.cli import one_line
    from edgeattn.apps.store import Store
    from edgeattn.apps.web.memory import Asked
    from edgeattn.apps.web.routes import make_router
    store, unkept = None, "not kept: the server was started with --no-save"
    if args.save:
        try:
            store, unkept = Store(), ""
        except (ValueError, OSError) as error:
            print(f"conversations are not kept: {one_line(error)}", file=sys.stderr)
            unkept = f"not kept: {one_line(error)}"
    asked = Asked(options.cache_options(args), options.sparse_options(args), args.ctx_size or None, args.ubatch_size)
    return make_router(engine, store, settings, unkept, asked)
