"""Settings of results in as few words as tell them apart."""
import shlex
import statistics

from edgeattn.apps import axes


def flags(setting: str) -> dict[str, str]:
    """{flag: value} of a setting's text."""
    parts = shlex.split(setting)
    return dict(zip(parts[::2], parts[1::2]))


def labels(results: list[dict]) -> dict[tuple[str, str], str]:
    """{(model, setting): label}, in the order of their first results. Flags that all share are left out, a model too; where one setting
    names a flag, all say what they have."""
    found = dict.fromkeys((result["model"], result["setting"]) for result in results)
    given = {place: flags(place[1]) for place in found}
    named = list(dict.fromkeys(flag for one in given.values() for flag in one))
    known = axes.defaults()
    given = {place: {flag: one.get(flag, known.get(flag)) for flag in named if flag in one or flag in known}
             for place, one in given.items()}
    shared = set.intersection(*({*one.items()} for one in given.values())) if len(given) > 1 else set()
    models = len({model for model, _ in found}) > 1
    return {place: " ".join([*([place[0]] if models else []), *(f"{flag} {value}" for flag, value in one.items()
                                                                if (flag, value) not in shared)]) or "defaults"
            for place, one in given.items()}


def styles(names: list[str]) -> list[tuple[int, int]]:
    """(colour, dash) for each label: settings that differ in their last flag alone share a colour, if every one has several flags."""
    parts = [name.split(" --") for name in names]
    if any(len(part) != len(parts[0]) or len(part) < 2 for part in parts):
        return [(i, 0) for i in range(len(names))]
    first, last = (list(dict.fromkeys(part)) for part in (["".join(p[:-1]) for p in parts], [p[-1] for p in parts]))
    return [(first.index("".join(part[:-1])), last.index(part[-1])) for part in parts]


def speed(row: dict) -> float:
    """Tokens a second in the median repetition of a bench row: what a disturbed one took counts less than in their mean."""
    return (row["n_prompt"] + row["n_gen"]) / statistics.median(row["samples_s"])


def commands(results: list[dict]) -> list[str]:
    return list(dict.fromkeys(result["command"] for result in results))
