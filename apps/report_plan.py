"""What `edgeattn report` measures: commands that a user could give, each of which keeps its results and does not measure them twice."""
from dataclasses import dataclass

BITS = "16,8,4"
BUDGETS = 0.3, 0.15, 0.075  # of what a question's text takes in 16 bits
SHORT = 1024                # tokens of a context, in which there is nothing to look up
LEAST = 300                 # tokens in 16 bits, without which a cache with eviction does not work
SPARSE = "sparse attention"
DENSE = ("--sparse-attention", "off", "--sparse-prefill", "off")


@dataclass(frozen=True)
class Step:
    """A command, and what it is for."""
    title: str
    arguments: list[str]


def steps(flags: list[str], config: dict, reach: int = 8192, quick: bool = False) -> list[Step]:
    """flags: of every command, to say which model. config: the export's edgeattn.json. reach: tokens of the deepest context, if the model
    has as many. quick: few samples, to see whether everything works."""
    about = config["model"]
    reach = min(reach, about["ctx_size"])
    room = 512 if reach > 1536 else reach // 4
    depths = ",".join(map(str, _depths(reach - room, quick)))
    repeat, samples, windows = ("1", "8", "1") if quick else ("5", "24", "4")
    length = min(4000 if not quick else 1024, reach - 512)
    token = 4 * about["num_layers"] * about["kv_heads"] * about["head_dim"]  # bytes in a cache of 16 bits
    most, sizes = 2 * reach, [length * share for share in BUDGETS if length * share >= LEAST]  # the first is none, to compare with
    budgets = ",".join(f"{round(token * tokens / 1024)}K" for tokens in (most, *sizes))
    kinds = {"cache types": ["--kv-bits", "16,8,4,3,2", *DENSE], "budgets with eviction": ["--kv-budget", budgets, *DENSE],
             SPARSE: ["--sparse-attention", "off,auto", "--sparse-prefill", "off"]}
    if reach < SHORT:
        kinds = {}
    elif about.get("window"):  # neither goes with layers that see a window only
        kinds = {"cache types": kinds["cache types"]}
    found = [Step("generation at depth", ["bench", *flags, "-p", "0", "-n", "16" if quick else "32", "-d", depths, "-r", repeat,
                                          "--kv-bits", BITS, "--sparse-attention", "off,auto"]),
             Step("prompts at depth", ["bench", *flags, "-p", str(room), "-n", "0", "-d", depths, "-r", repeat, "--kv-bits", BITS,
                                       "--sparse-prefill", "off,auto"])]
    for kind, axes in kinds.items():
        found.append(Step(f"look-ups, {kind}", ["eval", "recall", *flags, "--lengths", str(length), "--samples", samples, *axes]))
        window = length if kind == SPARSE else min(2048, length)  # in a short one everything is read
        found.append(Step(f"divergence, {kind}", ["eval", "kld", *flags, "--lengths", str(window), "--samples", windows, *axes]))
    return found


def _depths(most, quick):
    """From nothing to as deep as the context allows, in steps that grow."""
    return sorted({0, most} if quick else {0, most // 8 // 256 * 256, most // 2 // 256 * 256, most})
