"""edgeattn tune: what runs a model fastest on this machine, measured once and used from then on."""
import argparse

from edgeattn.apps import options

HELP = "measure which threads, prompt chunks and instructions are fastest here; later runs use what beats the defaults"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="FOLDER", help="an exported folder, a checkpoint or a GGUF file; the bundled nano by "
                        "default. Models of its shape get what is found")
    parser.add_argument("--precision", choices=options.PRECISIONS, help="for a checkpoint: what to export it to")
    parser.add_argument("--reset", action="store_true", help="forget everything that was measured on this machine")


def main(args: argparse.Namespace) -> int:
    from edgeattn import device_profile
    from edgeattn.kernels_cpu import PROFILE
    if args.reset:
        there = PROFILE.is_file()
        PROFILE.unlink(missing_ok=True)
        print(f"{PROFILE}: {'removed' if there else 'there was none'}; the defaults hold")
        return 0
    from edgeattn.apps import models
    from edgeattn.apps.progress import Progress
    from edgeattn.tuning import Worker, candidates, entry, tune
    folder = models.exported(args.model, args.precision)
    default, cores, config = default_setting(folder)
    from edgeattn.kernels_cpu import available_levels
    tries = list(candidates(default, cores, available_levels(), config["model"]["ctx_size"]))
    with Progress("timing settings, each beside the best so far", patience=0) as progress:
        best, duels = tune(default, tries, lambda setting: Worker(folder, setting), progress)
    shape = device_profile.shape(config)
    profile = device_profile.read(PROFILE)
    profile["models"] = device_profile.part(PROFILE, "models") | {shape: _beaten(best, default)}
    profile["tuned"] = device_profile.part(PROFILE, "tuned") | {shape: entry(best, default, duels)}
    profile["level"] = level_of(profile["tuned"])
    profile["crossovers"] = {}  # measured with other settings, perhaps on a busier machine
    device_profile.write(PROFILE, profile)
    print("\n".join(_lines(shape, best, default, duels)), flush=True)
    print("\n".join(_with_level(profile["level"] or default.level, _crossovers, folder)))
    return 0


def default_setting(folder):
    """What a model runs with here without a profile; threads that this machine allows; the export's config."""
    import numba
    import psutil
    from edgeattn.kernels_cpu import available_levels
    from edgeattn.runtime import read_config
    from edgeattn.tuning import Setting
    config = read_config(folder)
    defaults, most = config["defaults"], numba.config.NUMBA_NUM_THREADS
    threads = min(defaults["threads"] or psutil.cpu_count(logical=False) or most, most)
    return Setting(threads, min(defaults["ubatch"], config["model"]["ctx_size"]), available_levels()[0]), most, config


def _with_level(level, call, *given):
    """What a call says in a process whose kernels have these instructions; this one, if it has them: they are chosen once a process."""
    from edgeattn.kernels_cpu import LEVEL
    if level == LEVEL:
        return call(*given)
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from edgeattn.tuning import at_level
    with at_level(level), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *given).result()


def _crossovers(folder):
    """From where on sparse attention pays: loading a model measures that, and remembers it in the profile."""
    from edgeattn.apps.progress import Progress
    from edgeattn.runtime import Model
    from edgeattn.scheduler import NEVER
    with Progress("timing sparse attention") as progress:
        model = Model.load(folder, progress=progress)
    lines = []
    for what, scheduler, why in (("decode", model.scheduler, model.dense_because), ("prefill", model.prefill, model.whole_because)):
        begins = scheduler.min_len if scheduler else NEVER
        because = f" ({why})" if why else ""
        lines.append(f"  sparse {what}: " + (f"from {begins:,} tokens in the context on" if begins < NEVER else f"never{because}"))
    return lines


def level_of(tuned: dict) -> str | None:
    """The instructions that all models that were timed ran fastest with; None for the machine's best. They hold for a process, so that a
    model for which others were faster would pay for it."""
    levels = {about["setting"]["level"] for about in tuned.values()}
    return levels.pop() if len(levels) == 1 and levels != {about["default"]["level"] for about in tuned.values()} else None


def _beaten(best, default):
    """What differs from the defaults, as Model takes it."""
    return {name: getattr(best, name) for name in ("threads", "ubatch") if getattr(best, name) != getattr(default, name)}


def _lines(shape, best, default, duels):
    yield f"{shape}: time as a part of the other's, median and its interval; who cannot win is dropped after 3 rounds"
    for duel in duels:
        changed = ", ".join(f"{name} {value} for {getattr(duel.against, name)}" for name, value in vars(duel.candidate).items()
                            if value != getattr(duel.against, name))
        times = "; ".join(f"{name} {middle:.3f} ({low:.3f} to {high:.3f})" for name, (low, middle, high) in duel.ratios.items())
        yield f"  {changed:<26} {times}: {'taken' if duel.taken else 'not taken'}"
    if best == default:
        yield "nothing beats the defaults beyond noise: they hold"
    else:
        yield f"from now on: {best.threads} threads, -ub {best.ubatch}, {best.level}; edgeattn tune --reset goes back to the defaults"
