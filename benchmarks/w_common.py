"""Source substitutions and Python constants of variants; what they compile is prepared by all cores at once."""
import re, os
from concurrent.futures import ProcessPoolExecutor
from edgeattn.kernels_cuda import compile, matmul_nbits as mm

original = compile.source
saved = {k: getattr(mm, k) for k in dir(mm) if k.isupper()}


def use(name_of_source, keep, subs, consts):
    def source(name):
        text = original(name)
        if name == name_of_source:
            for a, b in subs:
                assert a in text, a
                text = text.replace(a, b)
            lines = []
            for l in text.splitlines(True):
                m = re.match(r"GEM(?:V|M|M_P)\((\w+),", l)
                if not m or m[1] in keep:
                    lines.append(l)
            text = "".join(lines)
        return text
    compile.source = source
    compile.module.cache_clear(), compile._function.cache_clear()
    for k, v in (saved | consts).items():
        setattr(mm, k, v)


def _prepare(job):
    try:
        if len(job) == 1:
            return compile._built(job[0], 90) and None
        use(*job)
        compile._built(job[0], 90)
    except Exception as e:
        return str(e)[-300:]


def prepare(jobs):
    import multiprocessing
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count()), mp_context=multiprocessing.get_context("spawn")) as pool:
        for job, error in zip(jobs, pool.map(_prepare, jobs)):
            if error:
                print("does not compile:", job, error)
