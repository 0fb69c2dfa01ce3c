"""`PYTHONPATH=tests/fuzz sh benchmarks/gpu.sh python tests/fuzz/fuzz_gptq.py -max_total_time=150 -rss_limit_mb=1024 -timeout=10`, with atheris installed."""
import atheris

with atheris.instrument_imports(include=["edgeattn.exporters"]):
    from importing import fuzz

if __name__ == "__main__":
    fuzz("gptq")
